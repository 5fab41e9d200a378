// The vocabulary of vector.h in plain C++: loops over 16 lanes, which compilers vectorise for whatever
// the machine has.
#pragma once

#include <math.h>

#include "common.h"

namespace lorastack::LORASTACK_ISA {

struct Floats {
  alignas(64) float at[LANES];
};
struct Ints {
  alignas(64) int32_t at[LANES];
};
// All bits of a lane, or none.
struct Mask {
  alignas(64) int32_t at[LANES];
};

// A vector of `make(i)` for every lane i.
template <class Vector, class Make>
INLINE Vector each_lane(Make&& make) {
  constexpr int NUM = sizeof(Vector::at) / sizeof(Vector::at[0]);
  Vector v;
  for (int i = 0; i < NUM; i++) v.at[i] = make(i);
  return v;
}

INLINE Floats from_bits(Ints a) {
  Floats v;
  memcpy(&v, &a, sizeof v);
  return v;
}
INLINE Ints bits_of(Floats a) {
  Ints v;
  memcpy(&v, &a, sizeof v);
  return v;
}

INLINE Mask first(int n) {
  return each_lane<Mask>([=](int i) { return i < n ? -1 : 0; });
}
INLINE unsigned bits(Mask m) {
  unsigned all = 0;
  for (int i = 0; i < LANES; i++) all |= (unsigned)(m.at[i] & 1) << i;
  return all;
}
INLINE Mask operator&(Mask a, Mask b) {
  return each_lane<Mask>([&](int i) { return a.at[i] & b.at[i]; });
}
INLINE Mask operator|(Mask a, Mask b) {
  return each_lane<Mask>([&](int i) { return a.at[i] | b.at[i]; });
}

INLINE Floats set(float x) {
  return each_lane<Floats>([=](int) { return x; });
}
INLINE Floats zero() { return set(0.0f); }
INLINE Floats load(const float* p) {
  Floats v;
  memcpy(&v, p, sizeof v);
  return v;
}
INLINE Floats load(const float* p, Mask m) {
  return each_lane<Floats>([&](int i) { return m.at[i] ? p[i] : 0.0f; });
}
INLINE void store(float* p, Floats v) { memcpy(p, &v, sizeof v); }
INLINE void store(float* p, Floats v, Mask m) {
  for (int i = 0; i < LANES; i++)
    if (m.at[i]) p[i] = v.at[i];
}

// One rounding where the machine has the instruction, else two: a call for each lane is too slow.
#ifdef __FP_FAST_FMAF
INLINE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
INLINE double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
template <class T>
INLINE T fused(T a, T b, T c) {
  return a * b + c;
}
#endif

#define LORASTACK_LANES(Vector, name, result)                   \
  INLINE Vector name(Vector a, Vector b) {                      \
    return each_lane<Vector>([&](int i) { return result; });    \
  }
LORASTACK_LANES(Floats, add, a.at[i] + b.at[i])
LORASTACK_LANES(Floats, sub, a.at[i] - b.at[i])
LORASTACK_LANES(Floats, mul, a.at[i] * b.at[i])
LORASTACK_LANES(Floats, div, a.at[i] / b.at[i])
LORASTACK_LANES(Floats, max, a.at[i] > b.at[i] ? a.at[i] : b.at[i])
LORASTACK_LANES(Floats, min, a.at[i] < b.at[i] ? a.at[i] : b.at[i])
LORASTACK_LANES(Ints, add, (int32_t)((uint32_t)a.at[i] + (uint32_t)b.at[i]))
LORASTACK_LANES(Ints, bits_and, a.at[i] & b.at[i])
LORASTACK_LANES(Ints, max, a.at[i] > b.at[i] ? a.at[i] : b.at[i])
LORASTACK_LANES(Ints, min, a.at[i] < b.at[i] ? a.at[i] : b.at[i])
LORASTACK_LANES(Ints, max_unsigned, (uint32_t)a.at[i] > (uint32_t)b.at[i] ? a.at[i] : b.at[i])
INLINE Floats fma(Floats a, Floats b, Floats c) {
  return each_lane<Floats>([&](int i) { return fused(a.at[i], b.at[i], c.at[i]); });
}
INLINE Floats fnma(Floats a, Floats b, Floats c) {
  return each_lane<Floats>([&](int i) { return fused(-a.at[i], b.at[i], c.at[i]); });
}
INLINE Floats abs(Floats a) {
  return each_lane<Floats>([&](int i) { return fabsf(a.at[i]); });
}
// Adding and taking 1.5 * 2^23 away rounds small numbers; larger ones and NaN are left.
INLINE float rounded(float x) {
  const float up = x + 12582912.0f;
  return fabsf(x) < 4194304.0f ? up - 12582912.0f : x;
}
INLINE Floats round(Floats a) {
  return each_lane<Floats>([&](int i) { return rounded(a.at[i]); });
}
INLINE Floats floor(Floats a) {
  return each_lane<Floats>([&](int i) {
    const float near = rounded(a.at[i]);
    return near > a.at[i] ? near - 1.0f : near;
  });
}
INLINE Ints to_ints(Floats a) {
  return each_lane<Ints>([&](int i) {
    const float near = rounded(a.at[i]);
    return fabsf(near) < 2147483648.0f ? (int32_t)near : INT32_MIN;
  });
}
INLINE Floats to_floats(Ints a) {
  return each_lane<Floats>([&](int i) { return (float)a.at[i]; });
}
INLINE Floats scale_by_power(Floats a, Floats n) {
  const Ints whole = to_ints(n);
  const Ints power = each_lane<Ints>(
      [&](int i) { return (int32_t)(((uint32_t)whole.at[i] + 127u) << 23); });
  return mul(a, from_bits(power));
}
INLINE float sum(Floats a) {
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; i++) a.at[i] += a.at[i + width];
  return a.at[0];
}
INLINE float largest(Floats a) {
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; i++) a.at[i] = a.at[i] > a.at[i + width] ? a.at[i] : a.at[i + width];
  return a.at[0];
}

#define LORASTACK_COMPARE(Vector, name, truth)                        \
  INLINE Mask name(Vector a, Vector b) {                              \
    return each_lane<Mask>([&](int i) { return (truth) ? -1 : 0; });  \
  }
LORASTACK_COMPARE(Floats, less, a.at[i] < b.at[i])
LORASTACK_COMPARE(Floats, greater, a.at[i] > b.at[i])
LORASTACK_COMPARE(Floats, at_least, a.at[i] >= b.at[i])
LORASTACK_COMPARE(Floats, at_most, a.at[i] <= b.at[i])
LORASTACK_COMPARE(Floats, equal, a.at[i] == b.at[i])
LORASTACK_COMPARE(Floats, not_less, !(a.at[i] < b.at[i]))
LORASTACK_COMPARE(Floats, not_equal, !(a.at[i] == b.at[i]))
LORASTACK_COMPARE(Floats, unordered, a.at[i] != a.at[i] || b.at[i] != b.at[i])
LORASTACK_COMPARE(Ints, less, a.at[i] < b.at[i])
#undef LORASTACK_COMPARE
INLINE Floats select(Mask m, Floats a, Floats b) {
  return each_lane<Floats>([&](int i) { return m.at[i] ? a.at[i] : b.at[i]; });
}
INLINE Ints select(Mask m, Ints a, Ints b) {
  return each_lane<Ints>([&](int i) { return m.at[i] ? a.at[i] : b.at[i]; });
}
INLINE Floats keep(Mask m, Floats a) { return select(m, a, zero()); }

INLINE Ints set(int x) {
  return each_lane<Ints>([=](int) { return x; });
}
INLINE Ints lanes() {
  return each_lane<Ints>([](int i) { return i; });
}
INLINE Ints load_ints(const void* p) {
  Ints v;
  memcpy(&v, p, sizeof v);
  return v;
}
INLINE Ints load_ints(const int32_t* p, Mask m) {
  return each_lane<Ints>([&](int i) { return m.at[i] ? p[i] : 0; });
}
INLINE void store_ints(void* p, Ints v) { memcpy(p, &v, sizeof v); }
template <int N>
INLINE Ints shift_left(Ints a) {
  return each_lane<Ints>([&](int i) { return (int32_t)((uint32_t)a.at[i] << N); });
}
template <int N>
INLINE Ints shift_right(Ints a) {
  return each_lane<Ints>([&](int i) { return (int32_t)((uint32_t)a.at[i] >> N); });
}

// bfloat16.
INLINE Floats load_halves(const uint16_t* p) {
  return from_bits(each_lane<Ints>([&](int i) { return (int32_t)((uint32_t)p[i] << 16); }));
}
INLINE void store_upper_halves(uint16_t* p, Ints v) {
  for (int i = 0; i < LANES; i++) p[i] = (uint16_t)((uint32_t)v.at[i] >> 16);
}
INLINE Ints join_halves(Floats even, Floats odd) {
  const Ints below = shift_right<16>(bits_of(even));
  const Ints above = bits_and(bits_of(odd), set((int)0xffff0000));
  return each_lane<Ints>([&](int i) { return below.at[i] | above.at[i]; });
}

// The second of each word of two.
INLINE Floats odd_halves(Ints words) { return from_bits(bits_and(words, set((int)0xffff0000))); }

// Codes.
INLINE Ints load_bytes(const void* p) {
  return each_lane<Ints>([&](int i) { return ((const int8_t*)p)[i]; });
}
template <int J>
INLINE Floats nibbles(Ints a) {
  return each_lane<Floats>([&](int i) { return (float)((((a.at[i] >> 4 * J) & 15) ^ 8) - 8); });
}
INLINE void store_bytes_in_turn(int8_t* p, Ints even, Ints odd) {
  for (int i = 0; i < LANES; i++) {
    p[2 * i] = (int8_t)even.at[i];
    p[2 * i + 1] = (int8_t)odd.at[i];
  }
}

// Squares.
// A call: nothing is gained by unrolling them everywhere.
__attribute__((noinline)) static void transpose_16(Floats v[16]) {
  for (int i = 0; i < LANES; i++)
    for (int j = 0; j < i; j++) {
      const float held = v[i].at[j];
      v[i].at[j] = v[j].at[i];
      v[j].at[i] = held;
    }
}
__attribute__((noinline)) static Floats sums_16(Floats v[16]) {
  Floats sums;
  for (int i = 0; i < LANES; i++) sums.at[i] = sum(v[i]);
  return sums;
}

// Eight lanes of 64 bits.
struct Longs {
  alignas(64) uint64_t at[LANES / 2];
};
struct Doubles {
  alignas(64) double at[LANES / 2];
};
INLINE Longs set_long(uint64_t x) {
  return each_lane<Longs>([=](int) { return x; });
}
INLINE Longs low_longs(Ints a) {
  return each_lane<Longs>([&](int i) { return (uint64_t)(int64_t)a.at[i]; });
}
INLINE Longs high_longs(Ints a) {
  return each_lane<Longs>([&](int i) { return (uint64_t)(int64_t)a.at[LANES / 2 + i]; });
}
LORASTACK_LANES(Longs, add, a.at[i] + b.at[i])
LORASTACK_LANES(Longs, mul, a.at[i] * b.at[i])
LORASTACK_LANES(Longs, bits_xor, a.at[i] ^ b.at[i])
LORASTACK_LANES(Doubles, add, a.at[i] + b.at[i])
LORASTACK_LANES(Doubles, sub, a.at[i] - b.at[i])
LORASTACK_LANES(Doubles, mul, a.at[i] * b.at[i])
LORASTACK_LANES(Doubles, max, a.at[i] > b.at[i] ? a.at[i] : b.at[i])
template <int N>
INLINE Longs shift_right(Longs a) {
  return each_lane<Longs>([&](int i) { return a.at[i] >> N; });
}
INLINE Floats to_floats(Longs low, Longs high) {
  return each_lane<Floats>([&](int i) {
    return i < LANES / 2 ? (float)(int64_t)low.at[i] : (float)(int64_t)high.at[i - LANES / 2];
  });
}

INLINE Doubles set_double(double x) {
  return each_lane<Doubles>([=](int) { return x; });
}
INLINE Doubles low_doubles(Floats a) {
  return each_lane<Doubles>([&](int i) { return (double)a.at[i]; });
}
INLINE Doubles high_doubles(Floats a) {
  return each_lane<Doubles>([&](int i) { return (double)a.at[LANES / 2 + i]; });
}
INLINE Doubles fma(Doubles a, Doubles b, Doubles c) {
  return each_lane<Doubles>([&](int i) { return fused(a.at[i], b.at[i], c.at[i]); });
}
INLINE Doubles fnma(Doubles a, Doubles b, Doubles c) {
  return each_lane<Doubles>([&](int i) { return fused(-a.at[i], b.at[i], c.at[i]); });
}
INLINE Doubles round(Doubles a) {
  return each_lane<Doubles>([&](int i) { return nearbyint(a.at[i]); });
}
INLINE Doubles scale_by_power(Doubles a, Doubles n) {
  return each_lane<Doubles>([&](int i) { return ldexp(a.at[i], (int)n.at[i]); });
}
INLINE Doubles keep_low(Mask m, Doubles a) {
  return each_lane<Doubles>([&](int i) { return m.at[i] ? a.at[i] : 0.0; });
}
INLINE Doubles keep_high(Mask m, Doubles a) {
  return each_lane<Doubles>([&](int i) { return m.at[LANES / 2 + i] ? a.at[i] : 0.0; });
}
INLINE double sum(Doubles a) {
  for (int width = LANES / 4; width; width /= 2)
    for (int i = 0; i < width; i++) a.at[i] += a.at[i + width];
  return a.at[0];
}

#undef LORASTACK_LANES

}  // namespace lorastack::LORASTACK_ISA

#include "vector_partial.h"
