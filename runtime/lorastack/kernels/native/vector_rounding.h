// Rounding to bfloat16 by integer operations.
#pragma once

#include "common.h"

namespace lorastack::LORASTACK_ISA {

// The nearest bfloat16, of two the even one, in the upper half of each lane.
INLINE Ints rounded_halves(Floats v) {
  const Ints u = bits_of(v), last = bits_and(shift_right<16>(u), set(1));
  const Ints rounded = add(u, add(last, set(0x7fff)));
  return select(unordered(v, v), set(0x7fc00000), rounded);
}
INLINE void store_halves(uint16_t* p, Floats v) { store_upper_halves(p, rounded_halves(v)); }

}  // namespace lorastack::LORASTACK_ISA
