// Low-rank updates on AMX tiles.
//
// Shrunk tokens are scaled, rounded to bfloat16 and laid out as tiles [pair of ranks][token][2] of 16
// tokens of the step and 32 ranks; others' tokens are zeros there. Every adapter's update is added
// to the same 16 outputs x 16 tokens, and a token's sum is that of its own adapters alone.
#pragma once

#include "lora.h"
#include "tiles.h"

namespace lorastack::LORASTACK_ISA {

constexpr int TILE_TOKENS = 16, TILE_RANKS = 32, TILE_ELEMENTS = TILE_TOKENS * TILE_RANKS;

// Floats that the shrunk tokens of a segment take.
INLINE int64_t shrunk_tile_floats(int begin, int end, int rank) {
  const int tiles = begin < end ? (end - 1) / TILE_TOKENS - begin / TILE_TOKENS + 1 : 0;
  return (int64_t)tiles * ceil_div(rank, TILE_RANKS) * TILE_ELEMENTS / 2;
}

INLINE uint16_t* shrunk_tile(const LoraPart<uint16_t>& lora, float* shrunk, int tokens, int ranks) {
  const int place = (tokens - lora.begin / TILE_TOKENS) * ceil_div(lora.rank, TILE_RANKS) + ranks;
  return (uint16_t*)(shrunk + lora.shrunk) + (size_t)place * TILE_ELEMENTS;
}

INLINE uint16_t rounded(float value) {
  return (uint16_t)_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(value)), 0);
}

// What `shrink_rows` does, into tiles: SHRINK_ROWS ranks of one part times all its tokens. Isa: of
// the dot products.
template <class Isa>
INLINE void shrink_tiles(const LoraPart<uint16_t>& lora, int chunk, const uint16_t* x, size_t ldx,
                         int k, float* shrunk) {
  const int begin = chunk * SHRINK_ROWS, end = std::min(begin + SHRINK_ROWS, lora.rank);
  const int tile = begin / TILE_RANKS, first_pair = begin % TILE_RANKS / 2;
  // The last chunk also clears what pads the ranks.
  const int pairs = (end == lora.rank ? TILE_RANKS : begin % TILE_RANKS + SHRINK_ROWS) / 2;
  for (int tokens = lora.begin / TILE_TOKENS; tokens * TILE_TOKENS < lora.end; tokens++) {
    uint16_t* out = shrunk_tile(lora, shrunk, tokens, tile);
    for (int pair = first_pair; pair < pairs; pair++)
      store_ints(out + pair * TILE_RANKS, set(0));
    const int last = std::min(lora.end, (tokens + 1) * TILE_TOKENS);
    for (int r = begin; r < end; r++) {
      uint16_t* line = out + (r % TILE_RANKS / 2) * TILE_RANKS + r % 2;
      for (int t = std::max(lora.begin, tokens * TILE_TOKENS); t < last; t += SHRINK_TOKENS) {
        float sums[SHRINK_TOKENS];
        const int num = std::min(last - t, SHRINK_TOKENS);
        shrink_row<Isa>(lora.a + (size_t)r * k, x + t * ldx, ldx, num, k, sums);
        for (int n = 0; n < num; n++)
          line[(t + n) % TILE_TOKENS * 2] = rounded(sums[n] * lora.scale);
      }
    }
  }
}

// 16 rows of B from `column` on, 32 ranks from `rank` on, as the rows of a tile. What a row reads of
// the next one meets zeros; at the end of B there is none, and the tile is a copy.
INLINE void load_b(const LoraPart<uint16_t>& lora, int column, int out_size, int rank) {
  const uint16_t* b = lora.b + (size_t)column * lora.rank + rank;
  const int64_t left = (int64_t)out_size * lora.rank - ((int64_t)column * lora.rank + rank);
  if (left >= 15ll * lora.rank + TILE_RANKS) {
    _tile_loadd(4, b, lora.rank * (int)sizeof(uint16_t));
    return;
  }
  alignas(64) uint16_t copy[16][TILE_RANKS];
  const int width = std::min(lora.rank - rank, TILE_RANKS);
  for (int i = 0; i < 16; i++)
    store_ints(copy[i], column + i < out_size ? load_pairs(b + (size_t)i * lora.rank, width) : set(0));
  before_tile_loads();
  _tile_loadd(4, copy, 64);
}

// Adds [16 outputs][16 tokens] to the first `count` tokens' sums.
INLINE void add_columns(const float (*tile)[TILE_TOKENS], int count, float* sums, size_t ld) {
  Floats columns[LANES];
  tile_columns(tile, 0, count, columns);
  for (int t = 0; t < count; t++, sums += ld) store(sums, add(load(sums), columns[t]));
}

// Adds a group's updates to both panels of a block, whose rows are tokens row..row + rows.
static void expand_tiles(const LoraPart<uint16_t>* parts, int count, float* shrunk,
                         const Panel* panels, int row, int rows, size_t ld) {
  const int step = panels[0].index == panels[1].index ? 2 * LANES : LANES;
  for (int begin = row; begin < row + rows; begin += TILE_TOKENS) {
    const int tokens = begin / TILE_TOKENS, num = std::min(TILE_TOKENS, row + rows - begin);
    bool touched[2] = {false, false};
    _tile_zero(0);
    _tile_zero(1);
    for (int p = 0; p < count; p++) {
      const LoraPart<uint16_t>& lora = parts[p];
      if (lora.end <= begin || lora.begin >= begin + num) continue;
      for (int side = 0; side < 2; side++) {
        const Panel& panel = panels[side];
        if (lora.index != panel.index || panel.column >= panel.out_size) continue;
        touched[side] = true;
        const char* next = (const char*)(lora.b + (size_t)(panel.column + step) * lora.rank);
        for (int line = 0; line < LANES * lora.rank * 2; line += 64)
          prefetch(next + line);
        for (int rank = 0; rank < lora.rank; rank += TILE_RANKS) {
          load_b(lora, panel.column, panel.out_size, rank);
          _tile_loadd(5, shrunk_tile(lora, shrunk, tokens, rank / TILE_RANKS), 64);
          if (side == 0)
            _tile_dpbf16ps(0, 4, 5);
          else
            _tile_dpbf16ps(1, 4, 5);
        }
      }
    }
    alignas(64) float updates[2][16][TILE_TOKENS];
    _tile_stored(0, updates[0], 64);
    _tile_stored(1, updates[1], 64);
    for (int side = 0; side < 2; side++)
      if (touched[side]) add_columns(updates[side], num, panels[side].sums + (begin - row) * ld, ld);
  }
}

}  // namespace lorastack::LORASTACK_ISA
