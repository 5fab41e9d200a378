// Multiplication by AMX tiles of bfloat16; what has no use for them is as in dot.h.
#pragma once

#include "attention_tiles.h"
#include "dot.h"
#include "lora_tiles.h"
#include "tiles.h"

namespace lorastack::LORASTACK_ISA {

constexpr int MANY_INPUTS = 2048;

using Dots = Dot<12, 2, 4, 16, BLOCK_ROWS>;

struct Amx : Dots {
  static constexpr int MAX_QUERIES = TILE_QUERIES;

  // All eight tiles have 16 rows.
  struct State {
    State() { configure_tiles(BLOCK_ROWS); }
    ~State() { _tile_release(); }
  };

  template <class Source>
  INLINE void block(const uint16_t* x, size_t ldx, int rows, Source& source, int k, bool,
                    Block* out) {
    // Where X does not fit the first cache, rows of padding are not read. Setting the tiles up takes
    // as long as reading a dozen.
    const bool exact = k >= MANY_INPUTS && rows % 16;
    if (exact) configure_tiles(rows);
    if (rows <= 16)
      multiply<false>(x, ldx, source, k, out);
    else
      multiply<true>(x, ldx, source, k, out);
    if (exact) configure_tiles(BLOCK_ROWS);
  }

  INLINE void multiply_16(const uint16_t* matrix, const uint16_t* tile, int k,
                          float (*sums)[LANES]) {
    const uint16_t* next = matrix + (size_t)LANES * k;
    before_tile_loads();
    _tile_zero(0);
    for (int i = 0; i < k; i += K_STEP) {
      for (int o = 0; o < LANES; o++) prefetch_far(next + (size_t)o * k + i);
      _tile_loadd(1, matrix + i, k * (int)sizeof(uint16_t));
      _tile_loadd(2, tile + (size_t)i * LANES, 64);
      _tile_dpbf16ps(0, 1, 2);
    }
    _tile_stored(0, sums, sizeof sums[0]);
  }

  INLINE int64_t shrunk_floats(int begin, int end, int rank) {
    return shrunk_tile_floats(begin, end, rank);
  }

  INLINE void shrink(const LoraPart<uint16_t>& lora, int chunk, const uint16_t* x, size_t ldx,
                     int k, float* shrunk) {
    shrink_tiles<Dots>(lora, chunk, x, ldx, k, shrunk);
  }

  INLINE void expand(const LoraPart<uint16_t>* parts, int count, float* shrunk,
                     const Panel (&panels)[2], int row, int rows) {
    expand_tiles(parts, count, shrunk, panels, row, rows, BLOCK_COLS);
  }

  INLINE void attend(const Query<uint16_t>* queries, int count, const RowCache<uint16_t>& kv,
                     int size, float scale, bool, int page_size, float* scratch, int capacity) {
    attend_tiles(queries, count, kv, size, scale, page_size % 16 == 0, scratch, capacity);
  }

 private:
  // TWO: rows 17 to 32 too.
  template <bool TWO, class Source>
  static void multiply(const uint16_t* x, size_t ldx, Source& source, int k, Block* out) {
    const int stride = (int)ldx * 2;
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (TWO) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int i = 0; i < k; i += K_STEP) {
      const uint16_t *low = source.tile(i, 0), *high = source.tile(i, 1);
      before_tile_loads();
      _tile_loadd(4, x + i, stride);
      if constexpr (TWO) _tile_loadd(5, x + 16 * ldx + i, stride);
      _tile_loadd(6, low, 64);
      _tile_loadd(7, high, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (TWO) {
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, out->sums[0], sizeof out->sums[0]);
    _tile_stored(1, out->sums[0] + LANES, sizeof out->sums[0]);
    if constexpr (TWO) {
      _tile_stored(2, out->sums[16], sizeof out->sums[0]);
      _tile_stored(3, out->sums[16] + LANES, sizeof out->sums[0]);
    }
  }
};

}  // namespace lorastack::LORASTACK_ISA
