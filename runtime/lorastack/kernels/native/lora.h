// Low-rank updates of a step's segments, straight from the adapters' flat buffers.
//
// A is [rank, K] and B is [out, rank], both row by row. The shrunk tokens stay in float32.
#pragma once

#include "matmul.h"

namespace lorastack::LORASTACK_ISA {

// One target of one segment. begin, end: its tokens; index: which output of the group; shrunk: where
// its shrunk tokens lie, [end - begin][rank].
template <class T>
struct LoraPart {
  int32_t begin, end, index, rank;
  const T *a, *b;
  float scale;
  int64_t shrunk;
};

constexpr int SHRINK_ROWS = 8;  // of an A, in one chunk

template <class T>
INLINE int shrink_chunks(const LoraPart<T>& lora) {
  return ceil_div(lora.rank, SHRINK_ROWS);
}

// SHRINK_ROWS rows of one A with all its tokens. chunk: counted over all parts.
template <class E>
INLINE void shrink(const LoraPart<typename E::T>* parts, int chunk, const typename E::T* x,
                   size_t ldx, int k, float* shrunk) {
  using T = typename E::T;
  for (; chunk >= shrink_chunks(*parts); parts++) chunk -= shrink_chunks(*parts);
  const LoraPart<T>& lora = *parts;
  const int begin = chunk * SHRINK_ROWS;
  const int end = begin + SHRINK_ROWS < lora.rank ? begin + SHRINK_ROWS : lora.rank;
  for (int r = begin; r < end; r++) {
    const T* a = lora.a + (size_t)r * k;
    for (int t = lora.begin; t < lora.end; t += 4) {
      const int num = lora.end - t < 4 ? lora.end - t : 4;
      __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(),
                        _mm512_setzero_ps()};
      if constexpr (E::half) {
        for (int i = 0; i < k; i += 32) {
          const __mmask32 mask = k - i >= 32 ? 0xffffffffu : (1u << (k - i)) - 1;
          const __m512bh v = (__m512bh)_mm512_maskz_loadu_epi16(mask, a + i);
          for (int n = 0; n < num; n++)
            sums[n] = _mm512_dpbf16_ps(sums[n], v,
                                       (__m512bh)_mm512_loadu_si512(x + (t + n) * ldx + i));
        }
      } else {
        for (int i = 0; i < k; i += 16) {
          const __m512 v = E::load(a + i, first(k - i));
          for (int n = 0; n < num; n++)
            sums[n] = _mm512_fmadd_ps(v, E::load(x + (t + n) * ldx + i), sums[n]);
        }
      }
      for (int n = 0; n < num; n++)
        shrunk[lora.shrunk + (int64_t)(t + n - lora.begin) * lora.rank + r] =
            _mm512_reduce_add_ps(sums[n]);
    }
  }
}

// Adds a group's updates to the sums of one panel: rows row..row + rows of the step, up to 16
// outputs of target `index` from `column` on. out_size: the target's outputs; ld: of the sums.
template <class E>
INLINE void expand(const LoraPart<typename E::T>* parts, int count, const float* shrunk, int index,
                   int column, int out_size, int row, int rows, float* sums, size_t ld) {
  using T = typename E::T;
  const int width = out_size - column < LANES ? out_size - column : LANES;
  for (int p = 0; p < count; p++) {
    const LoraPart<T>& lora = parts[p];
    const int begin = lora.begin > row ? lora.begin : row;
    const int end = lora.end < row + rows ? lora.end : row + rows;
    if (lora.index != index || begin >= end) continue;
    __m512 deltas[BLOCK_ROWS];
    for (int t = begin; t < end; t++) deltas[t - begin] = _mm512_setzero_ps();
    for (int r = 0; r < lora.rank; r += LANES) {
      const int num = lora.rank - r < LANES ? lora.rank - r : LANES;
      __m512 columns[LANES];
      for (int n = 0; n < LANES; n++)
        columns[n] = n < width ? E::load(lora.b + (size_t)(column + n) * lora.rank + r, first(num))
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
      float* sum = sums + (size_t)(t - row) * ld;
      _mm512_storeu_ps(sum, _mm512_fmadd_ps(deltas[t - begin], _mm512_set1_ps(lora.scale),
                                            _mm512_loadu_ps(sum)));
    }
  }
}

}  // namespace lorastack::LORASTACK_ISA
