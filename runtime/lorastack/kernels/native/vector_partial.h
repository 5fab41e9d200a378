// Parts of vectors, for instruction sets without masks for them: the lanes go through memory.
#pragma once

#include "vector_rounding.h"

namespace lorastack::LORASTACK_ISA {

template <class T>
INLINE void store_lanes(T* p, const T (&all)[LANES], Mask m) {
  for (unsigned left = bits(m); left; left &= left - 1) *p++ = all[__builtin_ctz(left)];
}

// Stores the lanes of the mask one after the other.
INLINE void store_compressed(float* p, Floats v, Mask m) {
  float all[LANES];
  store(all, v);
  store_lanes(p, all, m);
}
INLINE void store_compressed(int32_t* p, Ints v, Mask m) {
  int32_t all[LANES];
  store_ints(all, v);
  store_lanes(p, all, m);
}

INLINE Floats load_halves(const uint16_t* p, Mask m) {
  const unsigned count = __builtin_popcount(bits(m));
  if (count == LANES) return load_halves(p);
  uint16_t all[LANES] = {};
  memcpy(all, p, count * sizeof(uint16_t));
  return load_halves(all);
}
INLINE void store_upper_halves(uint16_t* p, Ints v, Mask m) {
  const unsigned count = __builtin_popcount(bits(m));
  if (count == LANES) return store_upper_halves(p, v);
  uint16_t all[LANES];
  store_upper_halves(all, v);
  memcpy(p, all, count * sizeof(uint16_t));
}
INLINE void store_halves(uint16_t* p, Floats v, Mask m) {
  store_upper_halves(p, rounded_halves(v), m);
}

// The first `count` of 32 elements of 16 bits, as words of two.
INLINE Ints load_pairs(const uint16_t* p, int count) {
  if (count >= 2 * LANES) return load_ints(p);
  uint16_t pairs[2 * LANES] = {};
  memcpy(pairs, p, count * sizeof(uint16_t));
  return load_ints(pairs);
}

}  // namespace lorastack::LORASTACK_ISA
