// Low-rank updates of a step's segments, straight from the adapters' flat buffers.
//
// A is [rank, K] and B is [out, rank], both row by row. Here the shrunk tokens stay in float32; on AMX
// lora_tiles.h takes over.
#pragma once

#include <algorithm>

#include "matmul.h"

namespace lorastack::LORASTACK_ISA {

// One target of one segment. begin, end: its tokens; index: which output of the group; shrunk: where
// its shrunk tokens lie, [end - begin][rank] or tiles, see `shrunk_floats`.
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

#ifndef __AMX_BF16__
// Floats that the shrunk tokens of a segment take.
INLINE int64_t shrunk_floats(int begin, int end, int rank) { return (int64_t)(end - begin) * rank; }
#endif

// One row of an A times up to four tokens.
template <class E>
INLINE void shrink_row(const typename E::T* a, const typename E::T* x, size_t ldx, int num, int k,
                       float* out) {
  __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(),
                    _mm512_setzero_ps()};
  if constexpr (E::half) {
    for (int i = 0; i < k; i += 32) {
      const __mmask32 mask = k - i >= 32 ? 0xffffffffu : (1u << (k - i)) - 1;
      const __m512bh v = (__m512bh)_mm512_maskz_loadu_epi16(mask, a + i);
      _mm_prefetch((const char*)(a + 2 * k + i), _MM_HINT_T0);  // two rows ahead
      for (int n = 0; n < num; n++)
        sums[n] =
            _mm512_dpbf16_ps(sums[n], v, (__m512bh)_mm512_loadu_si512(x + n * ldx + i));
    }
  } else {
    for (int i = 0; i < k; i += 16) {
      const __m512 v = E::load(a + i, first(k - i));
      for (int n = 0; n < num; n++)
        sums[n] = _mm512_fmadd_ps(v, E::load(x + n * ldx + i), sums[n]);
    }
  }
  for (int n = 0; n < num; n++) out[n] = _mm512_reduce_add_ps(sums[n]);
}

// SHRINK_ROWS rows of one A times all its tokens.
template <class E>
INLINE void shrink(const LoraPart<typename E::T>& lora, int chunk, const typename E::T* x,
                   size_t ldx, int k, float* shrunk) {
  const int begin = chunk * SHRINK_ROWS, end = std::min(begin + SHRINK_ROWS, lora.rank);
  for (int r = begin; r < end; r++) {
    for (int t = lora.begin; t < lora.end; t += 4) {
      float sums[4];
      const int num = std::min(lora.end - t, 4);
      shrink_row<E>(lora.a + (size_t)r * k, x + t * ldx, ldx, num, k, sums);
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
template <class E>
INLINE void expand(const LoraPart<typename E::T>* parts, int count, const float* shrunk,
                   const Panel& panel, int row, int rows, size_t ld) {
  using T = typename E::T;
  const int width = std::min(panel.out_size - panel.column, LANES);
  if (width <= 0) return;
  for (int p = 0; p < count; p++) {
    const LoraPart<T>& lora = parts[p];
    const int begin = lora.begin > row ? lora.begin : row;
    const int end = lora.end < row + rows ? lora.end : row + rows;
    if (lora.index != panel.index || begin >= end) continue;
    __m512 deltas[BLOCK_ROWS];
    for (int t = begin; t < end; t++) deltas[t - begin] = _mm512_setzero_ps();
    for (int r = 0; r < lora.rank; r += LANES) {
      const int num = lora.rank - r < LANES ? lora.rank - r : LANES;
      __m512 columns[LANES];
      for (int n = 0; n < LANES; n++)
        columns[n] = n < width ? E::load(lora.b + (size_t)(panel.column + n) * lora.rank + r, first(num))
                               : _mm512_setzero_ps();
      transpose_16(columns);
      for (int t = begin; t < end; t++) {
        const float* s = shrunk + lora.shrunk + (int64_t)(t - lora.begin) * lora.rank + r;
        __m512 delta = deltas[t - begin];
        for (int i = 0; i < num; i++)
          delta = _mm512_fmadd_ps(columns[i], _mm512_set1_ps(s[i]), delta);
        deltas[t - begin] = delta;
      }
    }
    for (int t = begin; t < end; t++) {
      float* sum = panel.sums + (size_t)(t - row) * ld;
      _mm512_storeu_ps(sum, _mm512_fmadd_ps(deltas[t - begin], _mm512_set1_ps(lora.scale),
                                            _mm512_loadu_ps(sum)));
    }
  }
}

}  // namespace lorastack::LORASTACK_ISA
