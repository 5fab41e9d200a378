// AMX's tiles of bfloat16, for avx512.h. What the hardware would refuse ends the process.
#pragma once

#include <initializer_list>

#include "avx512.h"

namespace lorastack {

struct Tiles {
  bool configured = false;
  uint16_t row_bytes[8] = {};
  uint8_t rows[8] = {};
  uint8_t data[8][16][64] = {};

  void need(int tile) const {
    if (!configured || !rows[tile] || rows[tile] > 16 || row_bytes[tile] > 64) __builtin_trap();
  }
};
static thread_local Tiles tiles;  // registers belong to a thread

EMULATED void load_config(const void* p) {
  tiles = Tiles{};
  const auto config = (const uint8_t*)p;
  if (config[0] != 1 || config[1]) __builtin_trap();  // palette, start row
  tiles.configured = true;
  memcpy(tiles.row_bytes, config + 16, sizeof tiles.row_bytes);
  memcpy(tiles.rows, config + 48, sizeof tiles.rows);
}
EMULATED void release_tiles() { tiles = Tiles{}; }
EMULATED void zero_tile(int tile) {
  tiles.need(tile);
  memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
}
EMULATED void load_tile(int tile, const void* p, ptrdiff_t stride) {
  zero_tile(tile);
  for (int r = 0; r < tiles.rows[tile]; r++)
    memcpy(tiles.data[tile][r], (const char*)p + r * stride, tiles.row_bytes[tile]);
}
EMULATED void store_tile(int tile, void* p, ptrdiff_t stride) {
  tiles.need(tile);
  for (int r = 0; r < tiles.rows[tile]; r++)
    memcpy((char*)p + r * stride, tiles.data[tile][r], tiles.row_bytes[tile]);
}
// Sums of the even and of the odd elements apart, then both.
EMULATED void multiply_tiles(int sums, int a, int b) {
  for (int tile : {sums, a, b}) tiles.need(tile);
  const int rows = tiles.rows[sums], pairs = tiles.rows[b], columns = tiles.row_bytes[sums] / 4;
  if (rows != tiles.rows[a] || tiles.row_bytes[b] != 4 * columns || tiles.row_bytes[a] != 4 * pairs)
    __builtin_trap();
  for (int m = 0; m < rows; m++) {
    float parts[2][16] = {}, all[16];
    const auto x = (const uint16_t*)tiles.data[a][m];
    for (int k = 0; k < pairs; k++) {
      const auto y = (const uint16_t*)tiles.data[b][k];
      for (int n = 0; n < columns; n++)
        for (int odd : {0, 1})
          parts[odd][n] = lanes::fused(x[2 * k + odd], y[2 * n + odd], parts[odd][n]);
    }
    memcpy(all, tiles.data[sums][m], sizeof all);
    for (int n = 0; n < columns; n++)
      all[n] = lanes::flushed(lanes::flushed(all[n]) + lanes::flushed(parts[0][n] + parts[1][n]));
    memcpy(tiles.data[sums][m], all, 4 * columns);
  }
}

}  // namespace lorastack

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig load_config
#define _tile_release release_tiles
#define _tile_zero zero_tile
#define _tile_loadd load_tile
#define _tile_stored store_tile
#define _tile_dpbf16ps multiply_tiles
