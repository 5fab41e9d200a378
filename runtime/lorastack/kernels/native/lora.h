// Low-rank updates of a step's segments, straight from the adapters' flat buffers.
//
// A is [rank, K] and B is [out, rank], both row by row. Here the shrunk tokens stay in float32; on AMX
// lora_tiles.h takes over.
#pragma once

#include <algorithm>

#include "abi.h"
#include "matmul.h"

namespace lorastack::LORASTACK_ISA {

// One target of one segment. begin, end: its tokens; index: which output of the group; shrunk: where
// its shrunk tokens lie, [end - begin][rank] or tiles, see `shrunk_floats` of the traits.
template <class T>
struct LoraPart {
  int32_t begin, end, index, rank;
  const T *a, *b;
  float scale;
  int64_t shrunk;
};

constexpr int SHRINK_ROWS = 8;  // rows of an A in one chunk

template <class T>
INLINE int shrink_chunks(const LoraPart<T>& lora) {
  return ceil_div(lora.rank, SHRINK_ROWS);
}

// One row of an A times NUM tokens.
template <class Isa, int NUM, class T, class X>
INLINE void shrink_row(const T* a, const X* x, size_t ldx, int k, float* out) {
  Floats sums[NUM];
  unroll<NUM>([&](auto n) INLINE_LAMBDA { sums[n] = zero(); });
  const int whole = k / Isa::DIMS * Isa::DIMS;
  for (int i = 0; i < whole; i += Isa::DIMS) {
    const auto v = Isa::load_weights(a + i);
    prefetch(a + 2 * (size_t)k + i);  // two rows ahead
    unroll<NUM>([&](auto n) INLINE_LAMBDA {
      sums[n] = Isa::dot(v, Isa::load_activations(x + n * ldx + i), sums[n]);
    });
  }
  if (whole < k) {
    const auto v = Isa::load_weights(a + whole, k - whole);
    unroll<NUM>([&](auto n) INLINE_LAMBDA {
      sums[n] = Isa::dot(v, Isa::load_activations(x + n * ldx + whole, k - whole), sums[n]);
    });
  }
  unroll<NUM>([&](auto n) INLINE_LAMBDA { out[n] = sum(sums[n]); });
}

constexpr int SHRINK_TOKENS = 4;  // that share a reading of A

// One row of an A times up to SHRINK_TOKENS tokens.
template <class Isa, class T, class X>
INLINE void shrink_row(const T* a, const X* x, size_t ldx, int num, int k, float* out) {
  with_count<SHRINK_TOKENS>(
      num, [&](auto count) INLINE_LAMBDA { shrink_row<Isa, count.value>(a, x, ldx, k, out); });
}

// SHRINK_ROWS rows of one A times all its tokens.
template <class Isa, class T, class X>
INLINE void shrink_rows(const LoraPart<T>& lora, int chunk, const X* x, size_t ldx, int k,
                        float* shrunk) {
  const int begin = chunk * SHRINK_ROWS, end = std::min(begin + SHRINK_ROWS, lora.rank);
  for (int r = begin; r < end; r++) {
    for (int t = lora.begin; t < lora.end; t += SHRINK_TOKENS) {
      float sums[SHRINK_TOKENS];
      const int num = std::min(lora.end - t, SHRINK_TOKENS);
      shrink_row<Isa>(lora.a + (size_t)r * k, x + t * ldx, ldx, num, k, sums);
      for (int n = 0; n < num; n++)
        shrunk[lora.shrunk + (int64_t)(t + n - lora.begin) * lora.rank + r] = sums[n];
    }
  }
}

// 16 outputs of target `index` of a group from `column` on, and where their sums lie.
struct Panel {
  int index, column, out_size;  // column may lie behind the outputs
  float* sums;
};

// Adds a group's updates to the sums of one panel: rows row..row + rows of the step. ld: of the sums.
template <class Isa, class T>
INLINE void expand_panel(const LoraPart<T>* parts, int count, const float* shrunk,
                         const Panel& panel, int row, int rows, size_t ld) {
  using E = typename Isa::E;
  const int width = std::min(panel.out_size - panel.column, LANES);
  if (width <= 0) return;
  for (int p = 0; p < count; p++) {
    const LoraPart<T>& lora = parts[p];
    const int begin = std::max(lora.begin, row), end = std::min(lora.end, row + rows);
    if (lora.index != panel.index || begin >= end) continue;
    Floats deltas[BLOCK_ROWS];
    for (int t = begin; t < end; t++) deltas[t - begin] = zero();
    for (int r = 0; r < lora.rank; r += LANES) {
      const int num = std::min(lora.rank - r, LANES);
      Floats columns[LANES];
      for (int n = 0; n < LANES; n++) {
        const T* b = lora.b + (size_t)(panel.column + n) * lora.rank + r;
        columns[n] = n >= width ? zero() : num == LANES ? E::load(b) : E::load(b, first(num));
      }
      transpose_16(columns);
      for (int t = begin; t < end; t++) {
        const float* s = shrunk + lora.shrunk + (int64_t)(t - lora.begin) * lora.rank + r;
        Floats delta = deltas[t - begin];
        for (int i = 0; i < num; i++) delta = fma(columns[i], set(s[i]), delta);
        deltas[t - begin] = delta;
      }
    }
    for (int t = begin; t < end; t++) {
      float* sums = panel.sums + (size_t)(t - row) * ld;
      store(sums, fma(deltas[t - begin], set(lora.scale), load(sums)));
    }
  }
}

}  // namespace lorastack::LORASTACK_ISA
