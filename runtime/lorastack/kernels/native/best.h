// The best logit of a row.
#pragma once

#include <math.h>

#include "common.h"

namespace lorastack::LORASTACK_ISA {

// The largest of `columns` values and its place, the first among equals; NaN if there is one.
INLINE void best_of(const float* row, int columns, float* value, int64_t* place) {
  const __m512i step = _mm512_set1_epi32(LANES);
  __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512i places = at;
  __m512 best = _mm512_set1_ps(-INFINITY);
  __mmask16 unordered = 0;
  for (int i = 0; i < columns; i += LANES, at = _mm512_add_epi32(at, step)) {
    const __mmask16 real = first(columns - i);
    const __m512 logits = _mm512_maskz_loadu_ps(real, row + i);
    unordered |= _mm512_mask_cmp_ps_mask(real, logits, logits, _CMP_UNORD_Q);
    const __mmask16 better = _mm512_mask_cmp_ps_mask(real, logits, best, _CMP_GT_OQ);
    best = _mm512_mask_mov_ps(best, better, logits);
    places = _mm512_mask_mov_epi32(places, better, at);
  }
  const float top = _mm512_reduce_max_ps(best);
  const __mmask16 equal = _mm512_cmp_ps_mask(best, _mm512_set1_ps(top), _CMP_EQ_OQ);
  *place = (int64_t)_mm512_mask_reduce_min_epu32(equal, places);
  *value = unordered ? NAN : top;
}

}  // namespace lorastack::LORASTACK_ISA
