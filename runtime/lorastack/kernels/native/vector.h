// Vectors of 16 lanes, the one vocabulary in which the kernels are written.
//
// An instruction set implements it in the file that its source names (LORASTACK_VECTOR). What each
// must keep, so that the same kernel gives the same bits everywhere:
// - fma and fnma round once (in vector_plain.h only where the machine does); fnma(a, b, c) is c - a b;
// - max and min give their second argument if either is NaN, select(m, a, b) is `a` in the lanes of m;
// - less, greater, at_least, at_most and equal are false for NaN, not_less and not_equal true;
// - sum and sums_16 add lanes i and i + 8, then i and i + 4, i and i + 2, i and i + 1;
// - nibbles<J>(a): the J-th signed number of 4 bits of each lane, the lowest first;
// - scale_by_power(a, n) is a 2^n for whole n that keep 2^n a normal number;
// - masked loads read nothing outside their mask and give 0 there; a mask is a run from lane 0 for
//   loads and stores of 16 bits;
// - store_halves rounds to the nearest bfloat16, of two the even one; NaN stays NaN.
#pragma once

#include LORASTACK_VECTOR

namespace lorastack::LORASTACK_ISA {

// bfloat16 and float32 elements behind one interface.
struct BF16 {
  using T = uint16_t;
  static constexpr bool half = true;
  INLINE Floats load(const T* p) { return load_halves(p); }
  INLINE Floats load(const T* p, Mask m) { return load_halves(p, m); }
  INLINE void store(T* p, Floats v) { store_halves(p, v); }
  INLINE void store(T* p, Floats v, Mask m) { store_halves(p, v, m); }
  INLINE Floats rounded(Floats v) {
    T halves[LANES];
    store(halves, v);
    return load(halves);
  }
};

struct F32 {
  using T = float;
  static constexpr bool half = false;
  INLINE Floats load(const T* p) { return LORASTACK_ISA::load(p); }
  INLINE Floats load(const T* p, Mask m) { return LORASTACK_ISA::load(p, m); }
  INLINE void store(T* p, Floats v) { LORASTACK_ISA::store(p, v); }
  INLINE void store(T* p, Floats v, Mask m) { LORASTACK_ISA::store(p, v, m); }
  INLINE Floats rounded(Floats v) { return v; }
};

// The first of each word of two bfloat16.
INLINE Floats even_halves(Ints words) { return from_bits(shift_left<16>(words)); }

// e^x for x <= 0 to about 2 ulp; 0 below -87; NaN stays NaN.
INLINE Floats exp(Floats x) {
  const Floats live = set(-87.0f);
  const Mask alive = not_less(x, live);
  x = max(live, x);  // keeps NaN
  const Floats n = round(mul(x, set(1.44269504f)));
  Floats r = fnma(n, set(0.693145752f), x);
  r = fnma(n, set(1.42860677e-6f), r);
  Floats p = set(1.9875691500e-4f);
  p = fma(p, r, set(1.3981999507e-3f));
  p = fma(p, r, set(8.3334519073e-3f));
  p = fma(p, r, set(4.1665795894e-2f));
  p = fma(p, r, set(1.6666665459e-1f));
  p = fma(p, r, set(5.0000001201e-1f));
  p = fma(mul(p, r), r, add(r, set(1.0f)));
  return keep(alive, scale_by_power(p, n));
}

// x sigmoid(x). exp of minus the absolute value cannot overflow.
INLINE Floats silu(Floats x) {
  const Floats e = exp(sub(zero(), abs(x))), one = set(1.0f);
  return mul(x, div(select(less(x, zero()), e, one), add(one, e)));
}

}  // namespace lorastack::LORASTACK_ISA
