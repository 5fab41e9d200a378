// The best logit of a row.
#pragma once

#include <math.h>

#include <algorithm>

#include "vector.h"

namespace lorastack::LORASTACK_ISA {

// The largest of `columns` values and its place, the first among equals; NaN if there is one.
INLINE void best_of(const float* row, int columns, float* value, int64_t* place) {
  Ints at = lanes(), places = at;
  Floats best = set(-INFINITY);
  Mask unordered_seen = first(0);
  for (int i = 0; i < columns; i += LANES, at = add(at, set(LANES))) {
    const Mask real = first(columns - i);
    const Floats logits = load(row + i, real);
    unordered_seen = unordered_seen | unordered(logits, logits);  // none where nothing is read
    const Mask better = real & greater(logits, best);
    best = select(better, logits, best);
    places = select(better, at, places);
  }
  const float top = largest(best);
  int32_t lane_places[LANES];
  store_ints(lane_places, places);
  int32_t lowest = INT32_MAX;
  for (unsigned left = bits(equal(best, set(top))); left; left &= left - 1)
    lowest = std::min(lowest, lane_places[__builtin_ctz(left)]);
  *place = lowest;
  *value = bits(unordered_seen) ? NAN : top;
}

}  // namespace lorastack::LORASTACK_ISA
