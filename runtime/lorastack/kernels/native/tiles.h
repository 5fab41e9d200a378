// AMX tiles: 16 rows of 64 bytes.
#pragma once

#include <initializer_list>

#include "vector.h"

namespace lorastack::LORASTACK_ISA {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// rows: of X; its first 16 and their sums are tiles 4, 0 and 1, those behind them 5, 2 and 3. The
// others have 16 rows.
INLINE void configure_tiles(int rows) {
  TileConfig config;
  for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = 16;
  const int last = (rows - 1) % 16 + 1;
  for (int i : {0, 1, 4}) config.rows[i] = rows > 16 ? 16 : last;
  for (int i : {2, 3, 5}) config.rows[i] = last;
  _tile_loadconfig(&config);
}

// The compiler does not know that tile loads read memory: what was just written is written first.
INLINE void before_tile_loads() { __asm__ volatile("" ::: "memory"); }

// Columns begin..end of a 16 x 16 tile, at their places in `columns`: few by gathers, many at once.
INLINE void tile_columns(const float (*tile)[LANES], int begin, int end, Floats columns[LANES]) {
  if (end - begin > 4) {
    for (int i = 0; i < LANES; i++) columns[i] = load(tile[i]);
    transpose_16(columns);
    return;
  }
  const Ints lines = _mm512_mullo_epi32(lanes(), set(LANES));
  for (int i = begin; i < end; i++)
    columns[i] = _mm512_i32gather_ps(lines, tile[0] + i, sizeof(float));
}

}  // namespace lorastack::LORASTACK_ISA
