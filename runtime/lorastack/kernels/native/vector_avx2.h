// The vocabulary of vector.h in AVX2 and FMA: a vector is two registers.
#pragma once

#include <immintrin.h>

#include "common.h"

namespace lorastack::LORASTACK_ISA {

struct Floats {
  __m256 lo, hi;
};
struct Ints {
  __m256i lo, hi;
};
// All bits of a lane, or none.
struct Mask {
  __m256 lo, hi;
};

INLINE Floats from_bits(Ints a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
INLINE Ints bits_of(Floats a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
INLINE Ints bits_of(Mask a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }

INLINE Mask first(int n) {
  alignas(64) static constexpr int32_t LINE[2 * LANES] = {-1, -1, -1, -1, -1, -1, -1, -1,
                                                          -1, -1, -1, -1, -1, -1, -1, -1};
  const int32_t* const at = LINE + LANES - (n < 0 ? 0 : n > LANES ? LANES : n);
  return {_mm256_loadu_ps((const float*)at), _mm256_loadu_ps((const float*)at + 8)};
}
INLINE unsigned bits(Mask m) {
  return (unsigned)_mm256_movemask_ps(m.lo) | (unsigned)_mm256_movemask_ps(m.hi) << 8;
}
INLINE Mask operator&(Mask a, Mask b) {
  return {_mm256_and_ps(a.lo, b.lo), _mm256_and_ps(a.hi, b.hi)};
}
INLINE Mask operator|(Mask a, Mask b) {
  return {_mm256_or_ps(a.lo, b.lo), _mm256_or_ps(a.hi, b.hi)};
}

INLINE Floats zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE Floats set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE Floats load(const float* p, Mask m) {
  const Ints real = bits_of(m);
  return {_mm256_maskload_ps(p, real.lo), _mm256_maskload_ps(p + 8, real.hi)};
}
INLINE void store(float* p, Floats v) {
  _mm256_storeu_ps(p, v.lo);
  _mm256_storeu_ps(p + 8, v.hi);
}
INLINE void store(float* p, Floats v, Mask m) {
  const Ints real = bits_of(m);
  _mm256_maskstore_ps(p, real.lo, v.lo);
  _mm256_maskstore_ps(p + 8, real.hi, v.hi);
}

#define LORASTACK_BOTH(Vector, name, call) \
  INLINE Vector name(Vector a, Vector b) { return {call(a.lo, b.lo), call(a.hi, b.hi)}; }
LORASTACK_BOTH(Floats, add, _mm256_add_ps)
LORASTACK_BOTH(Floats, sub, _mm256_sub_ps)
LORASTACK_BOTH(Floats, mul, _mm256_mul_ps)
LORASTACK_BOTH(Floats, div, _mm256_div_ps)
LORASTACK_BOTH(Floats, max, _mm256_max_ps)
LORASTACK_BOTH(Floats, min, _mm256_min_ps)
INLINE Floats fma(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
INLINE Floats fnma(Floats a, Floats b, Floats c) {
  return {_mm256_fnmadd_ps(a.lo, b.lo, c.lo), _mm256_fnmadd_ps(a.hi, b.hi, c.hi)};
}
INLINE Floats abs(Floats a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
INLINE Floats round(Floats a) {
  constexpr int NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, NEAREST), _mm256_round_ps(a.hi, NEAREST)};
}
INLINE Floats floor(Floats a) { return {_mm256_floor_ps(a.lo), _mm256_floor_ps(a.hi)}; }
INLINE __m256 power_of_2(__m256 n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
INLINE Floats scale_by_power(Floats a, Floats n) {
  return mul(a, {power_of_2(n.lo), power_of_2(n.hi)});
}
INLINE float sum(Floats a) {
  const __m256 eight = _mm256_add_ps(a.lo, a.hi);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
INLINE float largest(Floats a) {
  const __m256 eight = _mm256_max_ps(a.lo, a.hi);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

#define LORASTACK_COMPARE(name, how)                                              \
  INLINE Mask name(Floats a, Floats b) {                                          \
    return {_mm256_cmp_ps(a.lo, b.lo, how), _mm256_cmp_ps(a.hi, b.hi, how)};      \
  }
LORASTACK_COMPARE(less, _CMP_LT_OQ)
LORASTACK_COMPARE(greater, _CMP_GT_OQ)
LORASTACK_COMPARE(at_least, _CMP_GE_OQ)
LORASTACK_COMPARE(at_most, _CMP_LE_OQ)
LORASTACK_COMPARE(equal, _CMP_EQ_OQ)
LORASTACK_COMPARE(not_less, _CMP_NLT_UQ)
LORASTACK_COMPARE(not_equal, _CMP_NEQ_UQ)
LORASTACK_COMPARE(unordered, _CMP_UNORD_Q)
#undef LORASTACK_COMPARE
INLINE Floats select(Mask m, Floats a, Floats b) {
  return {_mm256_blendv_ps(b.lo, a.lo, m.lo), _mm256_blendv_ps(b.hi, a.hi, m.hi)};
}
INLINE Floats keep(Mask m, Floats a) {
  return {_mm256_and_ps(m.lo, a.lo), _mm256_and_ps(m.hi, a.hi)};
}

INLINE Ints set(int x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
INLINE Ints lanes() {
  return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
          _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)};
}
INLINE Ints load_ints(const void* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
INLINE Ints load_ints(const int32_t* p, Mask m) {
  const Ints real = bits_of(m);
  return {_mm256_maskload_epi32(p, real.lo), _mm256_maskload_epi32(p + 8, real.hi)};
}
INLINE void store_ints(void* p, Ints v) {
  _mm256_storeu_si256((__m256i*)p, v.lo);
  _mm256_storeu_si256((__m256i*)p + 1, v.hi);
}
LORASTACK_BOTH(Ints, add, _mm256_add_epi32)
LORASTACK_BOTH(Ints, bits_and, _mm256_and_si256)
LORASTACK_BOTH(Ints, max, _mm256_max_epi32)
LORASTACK_BOTH(Ints, min, _mm256_min_epi32)
LORASTACK_BOTH(Ints, max_unsigned, _mm256_max_epu32)
template <int N>
INLINE Ints shift_left(Ints a) {
  return {_mm256_slli_epi32(a.lo, N), _mm256_slli_epi32(a.hi, N)};
}
template <int N>
INLINE Ints shift_right(Ints a) {
  return {_mm256_srli_epi32(a.lo, N), _mm256_srli_epi32(a.hi, N)};
}
INLINE Mask less(Ints a, Ints b) {
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(b.lo, a.lo)),
          _mm256_castsi256_ps(_mm256_cmpgt_epi32(b.hi, a.hi))};
}
INLINE Ints select(Mask m, Ints a, Ints b) {
  return bits_of(select(m, from_bits(a), from_bits(b)));
}
INLINE Floats to_floats(Ints a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
INLINE Ints to_ints(Floats a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }

// bfloat16.
INLINE Floats load_halves(const uint16_t* p) {
  const Ints wide = {_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)),
                     _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p + 1))};
  return from_bits(shift_left<16>(wide));
}
INLINE void store_upper_halves(uint16_t* p, Ints v) {
  const Ints upper = shift_right<16>(v);
  const __m256i mixed = _mm256_packus_epi32(upper.lo, upper.hi);
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(mixed, 0xd8));
}
INLINE Ints join_halves(Floats even, Floats odd) {
  const Ints below = shift_right<16>(bits_of(even)), above = bits_of(odd);
  return {_mm256_blend_epi16(below.lo, above.lo, 0xaa), _mm256_blend_epi16(below.hi, above.hi, 0xaa)};
}

// The second of each word of two. Two shifts need no register for a mask: they are full of sums.
INLINE Floats odd_halves(Ints words) {
  return from_bits(shift_left<16>(shift_right<16>(words)));
}

// Codes.
INLINE Ints load_bytes(const void* p) {
  const __m128i bytes = _mm_loadu_si128((const __m128i*)p);
  return {_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))};
}
template <int J>
INLINE Floats nibbles(Ints a) {
  const Ints top = shift_left<28 - 4 * J>(a);
  return to_floats({_mm256_srai_epi32(top.lo, 28), _mm256_srai_epi32(top.hi, 28)});
}
INLINE void store_bytes_in_turn(int8_t* p, Ints even, Ints odd) {
  const Ints low = bits_and(even, set(0xff)), high = shift_left<8>(bits_and(odd, set(0xff)));
  const __m256i mixed =
      _mm256_packus_epi32(_mm256_or_si256(low.lo, high.lo), _mm256_or_si256(low.hi, high.hi));
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(mixed, 0xd8));
}

// Squares.
INLINE void transpose_8(__m256 v[8]) {
  __m256 t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    v[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    v[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    v[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    v[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {
    const __m256 a = v[i], b = v[i + 4];
    v[i] = _mm256_permute2f128_ps(a, b, 0x20);
    v[i + 4] = _mm256_permute2f128_ps(a, b, 0x31);
  }
}
INLINE void transpose_16(Floats v[16]) {
  __m256 corner[4][8];
  for (int i = 0; i < 8; i++) {
    corner[0][i] = v[i].lo;
    corner[1][i] = v[i].hi;
    corner[2][i] = v[i + 8].lo;
    corner[3][i] = v[i + 8].hi;
  }
  for (auto& each : corner) transpose_8(each);
  for (int i = 0; i < 8; i++) {
    v[i] = {corner[0][i], corner[2][i]};
    v[i + 8] = {corner[1][i], corner[3][i]};
  }
}

// The sums of 8 vectors of 8 lanes.
INLINE __m256 sums_8(__m256 v[8]) {
  for (int i = 0; i < 4; i++) {
    const __m256 a = v[i], b = v[i + 4];
    v[i] = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  }
  // The lower four lanes belong to v[i], the upper to v[i + 4].
  for (int i = 0; i < 2; i++) {
    const __m256 a = v[i], b = v[i + 2];
    v[i] = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  }
  return _mm256_add_ps(_mm256_unpacklo_ps(v[0], v[1]), _mm256_unpackhi_ps(v[0], v[1]));
}
INLINE Floats sums_16(Floats v[16]) {
  __m256 low[8], high[8];
  for (int i = 0; i < 8; i++) {
    low[i] = _mm256_add_ps(v[i].lo, v[i].hi);
    high[i] = _mm256_add_ps(v[i + 8].lo, v[i + 8].hi);
  }
  return {sums_8(low), sums_8(high)};
}

// Eight lanes of 64 bits.
struct Longs {
  __m256i lo, hi;
};
struct Doubles {
  __m256d lo, hi;
};

INLINE Longs set_long(uint64_t x) {
  return {_mm256_set1_epi64x((int64_t)x), _mm256_set1_epi64x((int64_t)x)};
}
INLINE Longs longs_of(__m256i a) {
  return {_mm256_cvtepi32_epi64(_mm256_castsi256_si128(a)),
          _mm256_cvtepi32_epi64(_mm256_extracti128_si256(a, 1))};
}
INLINE Longs low_longs(Ints a) { return longs_of(a.lo); }
INLINE Longs high_longs(Ints a) { return longs_of(a.hi); }
INLINE Longs add(Longs a, Longs b) {
  return {_mm256_add_epi64(a.lo, b.lo), _mm256_add_epi64(a.hi, b.hi)};
}
INLINE __m256i mul_longs(__m256i a, __m256i b) {
  const __m256i cross = _mm256_mullo_epi32(a, _mm256_shuffle_epi32(b, 0xb1));
  const __m256i upper = _mm256_add_epi32(_mm256_slli_epi64(cross, 32), cross);
  const __m256i mask = _mm256_set1_epi64x((int64_t)0xffffffff00000000);
  return _mm256_add_epi64(_mm256_mul_epu32(a, b), _mm256_and_si256(upper, mask));
}
INLINE Longs mul(Longs a, Longs b) { return {mul_longs(a.lo, b.lo), mul_longs(a.hi, b.hi)}; }
INLINE Longs bits_xor(Longs a, Longs b) {
  return {_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)};
}
template <int N>
INLINE Longs shift_right(Longs a) {
  return {_mm256_srli_epi64(a.lo, N), _mm256_srli_epi64(a.hi, N)};
}
// Of numbers below 2^52, which the lower bits of a float64 hold.
INLINE __m128 floats_of(__m256i a) {
  const __m256d unit = _mm256_set1_pd(0x1p52);
  const __m256d sum = _mm256_castsi256_pd(_mm256_or_si256(a, _mm256_castpd_si256(unit)));
  return _mm256_cvtpd_ps(_mm256_sub_pd(sum, unit));
}
INLINE __m256 floats_of(Longs a) { return _mm256_set_m128(floats_of(a.hi), floats_of(a.lo)); }
INLINE Floats to_floats(Longs low, Longs high) { return {floats_of(low), floats_of(high)}; }

INLINE Doubles set_double(double x) { return {_mm256_set1_pd(x), _mm256_set1_pd(x)}; }
INLINE Doubles doubles_of(__m256 a) {
  return {_mm256_cvtps_pd(_mm256_castps256_ps128(a)), _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1))};
}
INLINE Doubles low_doubles(Floats a) { return doubles_of(a.lo); }
INLINE Doubles high_doubles(Floats a) { return doubles_of(a.hi); }
LORASTACK_BOTH(Doubles, add, _mm256_add_pd)
LORASTACK_BOTH(Doubles, sub, _mm256_sub_pd)
LORASTACK_BOTH(Doubles, mul, _mm256_mul_pd)
LORASTACK_BOTH(Doubles, max, _mm256_max_pd)
INLINE Doubles fma(Doubles a, Doubles b, Doubles c) {
  return {_mm256_fmadd_pd(a.lo, b.lo, c.lo), _mm256_fmadd_pd(a.hi, b.hi, c.hi)};
}
INLINE Doubles fnma(Doubles a, Doubles b, Doubles c) {
  return {_mm256_fnmadd_pd(a.lo, b.lo, c.lo), _mm256_fnmadd_pd(a.hi, b.hi, c.hi)};
}
INLINE Doubles round(Doubles a) {
  constexpr int NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_pd(a.lo, NEAREST), _mm256_round_pd(a.hi, NEAREST)};
}
INLINE __m256d power_of_2(__m256d n) {
  const __m256i exponent = _mm256_cvtepi32_epi64(_mm256_cvtpd_epi32(n));
  return _mm256_castsi256_pd(
      _mm256_slli_epi64(_mm256_add_epi64(exponent, _mm256_set1_epi64x(1023)), 52));
}
INLINE Doubles scale_by_power(Doubles a, Doubles n) {
  return mul(a, {power_of_2(n.lo), power_of_2(n.hi)});
}
INLINE Doubles keep_lanes(__m256 m, Doubles a) {
  const Longs real = longs_of(_mm256_castps_si256(m));
  return {_mm256_and_pd(_mm256_castsi256_pd(real.lo), a.lo),
          _mm256_and_pd(_mm256_castsi256_pd(real.hi), a.hi)};
}
INLINE Doubles keep_low(Mask m, Doubles a) { return keep_lanes(m.lo, a); }
INLINE Doubles keep_high(Mask m, Doubles a) { return keep_lanes(m.hi, a); }
INLINE double sum(Doubles a) {
  const __m256d four = _mm256_add_pd(a.lo, a.hi);
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

#undef LORASTACK_BOTH

}  // namespace lorastack::LORASTACK_ISA

#include "vector_partial.h"
