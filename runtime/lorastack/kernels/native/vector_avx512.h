// The vocabulary of vector.h in AVX-512 (F, BW, VL, DQ): a vector is one register.
#pragma once

#include <immintrin.h>

#include "common.h"

namespace lorastack::LORASTACK_ISA {

using Floats = __m512;
using Ints = __m512i;
using Mask = __mmask16;

INLINE Mask first(int n) { return (Mask)(n >= LANES ? 0xffff : n > 0 ? (1u << n) - 1 : 0); }
INLINE unsigned bits(Mask m) { return m; }

INLINE Floats zero() { return _mm512_setzero_ps(); }
INLINE Floats set(float x) { return _mm512_set1_ps(x); }
INLINE Floats load(const float* p) { return _mm512_loadu_ps(p); }
INLINE Floats load(const float* p, Mask m) { return _mm512_maskz_loadu_ps(m, p); }
INLINE void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
INLINE void store(float* p, Floats v, Mask m) { _mm512_mask_storeu_ps(p, m, v); }

INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
INLINE Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
INLINE Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
INLINE Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
INLINE Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
INLINE Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
INLINE Floats abs(Floats a) { return _mm512_abs_ps(a); }
INLINE Floats round(Floats a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT); }
INLINE Floats floor(Floats a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEG_INF); }
INLINE Floats scale_by_power(Floats a, Floats n) { return _mm512_scalef_ps(a, n); }
INLINE float sum(Floats a) { return _mm512_reduce_add_ps(a); }
INLINE float largest(Floats a) { return _mm512_reduce_max_ps(a); }

INLINE Mask less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
INLINE Mask greater(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
INLINE Mask at_least(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
INLINE Mask at_most(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
INLINE Mask equal(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
INLINE Mask not_less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }
INLINE Mask not_equal(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ); }
INLINE Mask unordered(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q); }
INLINE Floats select(Mask m, Floats a, Floats b) { return _mm512_mask_mov_ps(b, m, a); }
INLINE Floats keep(Mask m, Floats a) { return _mm512_maskz_mov_ps(m, a); }

INLINE Ints set(int x) { return _mm512_set1_epi32(x); }
INLINE Ints lanes() {
  return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
INLINE Ints load_ints(const void* p) { return _mm512_loadu_si512(p); }
INLINE Ints load_ints(const int32_t* p, Mask m) { return _mm512_maskz_loadu_epi32(m, p); }
INLINE void store_ints(void* p, Ints v) { _mm512_storeu_si512(p, v); }
INLINE Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
INLINE Ints bits_and(Ints a, Ints b) { return _mm512_and_si512(a, b); }
template <int N>
INLINE Ints shift_left(Ints a) { return _mm512_slli_epi32(a, N); }
template <int N>
INLINE Ints shift_right(Ints a) { return _mm512_srli_epi32(a, N); }
INLINE Ints max(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
INLINE Ints min(Ints a, Ints b) { return _mm512_min_epi32(a, b); }
INLINE Ints max_unsigned(Ints a, Ints b) { return _mm512_max_epu32(a, b); }
INLINE Mask less(Ints a, Ints b) { return _mm512_cmplt_epi32_mask(a, b); }
INLINE Ints select(Mask m, Ints a, Ints b) { return _mm512_mask_mov_epi32(b, m, a); }
INLINE Ints bits_of(Floats a) { return _mm512_castps_si512(a); }
INLINE Floats from_bits(Ints a) { return _mm512_castsi512_ps(a); }
INLINE Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
INLINE Ints to_ints(Floats a) { return _mm512_cvtps_epi32(a); }

// Stores the lanes of the mask one after the other.
INLINE void store_compressed(float* p, Floats v, Mask m) { _mm512_mask_compressstoreu_ps(p, m, v); }
INLINE void store_compressed(int32_t* p, Ints v, Mask m) {
  _mm512_mask_compressstoreu_epi32(p, m, v);
}

// bfloat16.
INLINE Floats load_halves(const uint16_t* p) {
  return from_bits(
      shift_left<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p))));
}
INLINE Floats load_halves(const uint16_t* p, Mask m) {
  return from_bits(shift_left<16>(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p))));
}
INLINE void store_upper_halves(uint16_t* p, Ints v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(shift_right<16>(v)));
}
INLINE void store_upper_halves(uint16_t* p, Ints v, Mask m) {
  _mm512_mask_cvtepi32_storeu_epi16(p, m, shift_right<16>(v));
}
INLINE Ints join_halves(Floats even, Floats odd) {
  constexpr int AND_OR = 0xea;  // (a & b) | c
  return _mm512_ternarylogic_epi32(bits_of(odd), set((int)0xffff0000),
                                   shift_right<16>(bits_of(even)), AND_OR);
}

// The first `count` of 32 elements of 16 bits, as words of two.
INLINE Ints load_pairs(const uint16_t* p, int count) {
  return _mm512_maskz_loadu_epi16(count >= 32 ? 0xffffffffu : (1u << count) - 1, p);
}
#ifdef __AVX512BF16__
INLINE void store_halves(uint16_t* p, Floats v) {
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v));
}
INLINE void store_halves(uint16_t* p, Floats v, Mask m) {
  _mm256_mask_storeu_epi16(p, m, (__m256i)_mm512_cvtneps_pbh(v));
}
// Sums + a b of each pair of bfloat16.
INLINE Floats add_dots(Ints a, Ints b, Floats sums) {
  return _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)b);
}
#endif

// The second of each word of two.
INLINE Floats odd_halves(Ints words) { return from_bits(bits_and(words, set((int)0xffff0000))); }

// Codes.
INLINE Ints load_bytes(const void* p) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
}
template <int J>
INLINE Floats nibbles(Ints a) {
  const Floats values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  return _mm512_permutexvar_ps(shift_right<4 * J>(a), values);
}
INLINE void store_bytes_in_turn(int8_t* p, Ints even, Ints odd) {
  const Ints both = _mm512_mask_mov_epi16(even, 0xaaaaaaaa, _mm512_slli_epi32(odd, 16));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi16_epi8(both));
}

// Squares.
INLINE void transpose_16(Floats v[16]) {
  Floats t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    const __m512d a = _mm512_castps_pd(t[i]), b = _mm512_castps_pd(t[i + 2]);
    const __m512d c = _mm512_castps_pd(t[i + 1]), d = _mm512_castps_pd(t[i + 3]);
    v[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
    v[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    v[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(c, d));
    v[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_f32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(v[i], v[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; i++) {
    v[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
  }
}

INLINE Floats sums_16(Floats v[16]) {
  for (int i = 0; i < 8; i++) {
    Floats a = v[i], b = v[i + 8];
    v[i] = add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
  for (int i = 0; i < 4; i++) {
    Floats a = v[i], b = v[i + 4];
    v[i] = add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  // Lanes of 128 bits now belong to v[i], v[i + 4], v[i + 8], v[i + 12].
  const Floats lo = add(_mm512_unpacklo_ps(v[0], v[2]), _mm512_unpackhi_ps(v[0], v[2]));
  const Floats hi = add(_mm512_unpacklo_ps(v[1], v[3]), _mm512_unpackhi_ps(v[1], v[3]));
  const Floats all = add(_mm512_unpacklo_ps(lo, hi), _mm512_unpackhi_ps(lo, hi));
  const Ints order = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15);
  return _mm512_permutexvar_ps(order, all);
}

// Eight lanes of 64 bits.
struct Longs {
  __m512i v;
};
struct Doubles {
  __m512d v;
};

INLINE Longs set_long(uint64_t x) { return {_mm512_set1_epi64((int64_t)x)}; }
INLINE Longs low_longs(Ints a) { return {_mm512_cvtepi32_epi64(_mm512_castsi512_si256(a))}; }
INLINE Longs high_longs(Ints a) { return {_mm512_cvtepi32_epi64(_mm512_extracti32x8_epi32(a, 1))}; }
INLINE Longs add(Longs a, Longs b) { return {_mm512_add_epi64(a.v, b.v)}; }
INLINE Longs mul(Longs a, Longs b) { return {_mm512_mullo_epi64(a.v, b.v)}; }
INLINE Longs bits_xor(Longs a, Longs b) { return {_mm512_xor_si512(a.v, b.v)}; }
template <int N>
INLINE Longs shift_right(Longs a) { return {_mm512_srli_epi64(a.v, N)}; }
INLINE Floats to_floats(Longs low, Longs high) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtepi64_ps(low.v)),
                            _mm512_cvtepi64_ps(high.v), 1);
}

INLINE Doubles set_double(double x) { return {_mm512_set1_pd(x)}; }
INLINE Doubles low_doubles(Floats a) { return {_mm512_cvtps_pd(_mm512_castps512_ps256(a))}; }
INLINE Doubles high_doubles(Floats a) { return {_mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1))}; }
INLINE Doubles add(Doubles a, Doubles b) { return {_mm512_add_pd(a.v, b.v)}; }
INLINE Doubles sub(Doubles a, Doubles b) { return {_mm512_sub_pd(a.v, b.v)}; }
INLINE Doubles mul(Doubles a, Doubles b) { return {_mm512_mul_pd(a.v, b.v)}; }
INLINE Doubles max(Doubles a, Doubles b) { return {_mm512_max_pd(a.v, b.v)}; }
INLINE Doubles fma(Doubles a, Doubles b, Doubles c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
INLINE Doubles fnma(Doubles a, Doubles b, Doubles c) { return {_mm512_fnmadd_pd(a.v, b.v, c.v)}; }
INLINE Doubles round(Doubles a) { return {_mm512_roundscale_pd(a.v, 0)}; }
INLINE Doubles scale_by_power(Doubles a, Doubles n) { return {_mm512_scalef_pd(a.v, n.v)}; }
INLINE Doubles keep_low(Mask m, Doubles a) { return {_mm512_maskz_mov_pd((__mmask8)m, a.v)}; }
INLINE Doubles keep_high(Mask m, Doubles a) { return {_mm512_maskz_mov_pd((__mmask8)(m >> 8), a.v)}; }
INLINE double sum(Doubles a) { return _mm512_reduce_add_pd(a.v); }

}  // namespace lorastack::LORASTACK_ISA

#ifndef __AVX512BF16__
#include "vector_rounding.h"

namespace lorastack::LORASTACK_ISA {

INLINE void store_halves(uint16_t* p, Floats v, Mask m) {
  store_upper_halves(p, rounded_halves(v), m);
}

}  // namespace lorastack::LORASTACK_ISA
#endif
