// AVX-512 and AMX on a CPU that has neither: every intrinsic of the kernels as a loop over its lanes,
// by the pseudo-code of Intel's Software Developer's Manual. `make check-x86` includes it before the
// kernels' sources: their calls find these names, in their own namespace, before those of GCC.
#pragma once

#include <immintrin.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#undef _mm512_setr_ps
#undef _mm512_setr_epi32
#define EMULATED static inline __attribute__((always_inline))

namespace lorastack {

namespace lanes {

using Ints = __v16si;
using Unsigned = __v16su;
using Shorts = __v32hi;
using Longs = __v8di;
using HalfInts = __v8si;
using HalfShorts = __v16hi;
using HalfBytes = __v32qi;

template <class To, class From>
EMULATED To as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class V, class Lane>
EMULATED V each(Lane lane) {
  V v{};
  for (int i = 0; i < (int)(sizeof v / sizeof v[0]); i++) v[i] = lane(i);
  return v;
}

template <int N, class Lane>
EMULATED unsigned mask(Lane lane) {
  unsigned m = 0;
  for (int i = 0; i < N; i++) m |= (unsigned)lane(i) << i;
  return m;
}

EMULATED bool in(unsigned m, int i) { return m >> i & 1; }

// Lanes i and i + 8, then i and i + 4, ...: the order of GCC's reductions.
template <class V, class Scalar, class Op>
EMULATED Scalar reduce(V v, Op op) {
  constexpr int N = sizeof(V) / sizeof(Scalar);
  Scalar a[N];
  memcpy(a, &v, sizeof v);
  for (int half = N / 2; half; half /= 2)
    for (int i = 0; i < half; i++) a[i] = op(a[i + half], a[i]);
  return a[0];
}

template <class Scalar>
EMULATED Scalar larger(Scalar a, Scalar b) { return a > b ? a : b; }

template <class Scalar>
EMULATED Scalar rounded(Scalar x, int how) {
  switch (how & 3) {
    case _MM_FROUND_TO_NEAREST_INT: return __builtin_rint(x);
    case _MM_FROUND_TO_NEG_INF: return __builtin_floor(x);
    default: __builtin_trap();
  }
}

template <class Scalar>
EMULATED Scalar scaled(Scalar x, Scalar power) {
  return power != power ? power : (Scalar)ldexp(x, (int)fmax(-4000, fmin(4000, floor(power))));
}

// The instructions of bfloat16 treat denormal numbers as zero, and make none.
EMULATED float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }
EMULATED float widened(uint16_t half) { return flushed(as<float>((uint32_t)half << 16)); }
EMULATED uint16_t narrowed(float x) {
  const uint32_t bits = as<uint32_t>(flushed(x));
  return x != x ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
EMULATED float fused(uint16_t a, uint16_t b, float sum) {
  return flushed(fmaf(widened(a), widened(b), flushed(sum)));
}

}  // namespace lanes

// Loads and stores.
EMULATED __m512 _mm512_loadu_ps(const void* p) {
  __m512 v;
  memcpy(&v, p, sizeof v);
  return v;
}
EMULATED __m512i _mm512_loadu_si512(const void* p) {
  __m512i v;
  memcpy(&v, p, sizeof v);
  return v;
}
EMULATED void _mm512_storeu_ps(void* p, __m512 v) { memcpy(p, &v, sizeof v); }
EMULATED void _mm512_storeu_si512(void* p, __m512i v) { memcpy(p, &v, sizeof v); }
EMULATED void _mm512_store_si512(void* p, __m512i v) {
  if ((uintptr_t)p % 64) __builtin_trap();
  memcpy(p, &v, sizeof v);
}
EMULATED __m512 _mm512_maskz_loadu_ps(__mmask16 m, const void* p) {
  return lanes::each<__m512>([=](int i) { return lanes::in(m, i) ? ((const float*)p)[i] : 0; });
}
EMULATED __m512i _mm512_maskz_loadu_epi32(__mmask16 m, const void* p) {
  return (__m512i)lanes::each<lanes::Ints>(
      [=](int i) { return lanes::in(m, i) ? ((const int32_t*)p)[i] : 0; });
}
EMULATED __m512i _mm512_maskz_loadu_epi16(__mmask32 m, const void* p) {
  return (__m512i)lanes::each<lanes::Shorts>(
      [=](int i) { return lanes::in(m, i) ? ((const int16_t*)p)[i] : 0; });
}
EMULATED __m256i _mm256_maskz_loadu_epi16(__mmask16 m, const void* p) {
  return (__m256i)lanes::each<lanes::HalfShorts>(
      [=](int i) { return lanes::in(m, i) ? ((const int16_t*)p)[i] : 0; });
}
EMULATED void _mm512_mask_storeu_ps(void* p, __mmask16 m, __m512 v) {
  for (int i = 0; i < 16; i++)
    if (lanes::in(m, i)) ((float*)p)[i] = v[i];
}
EMULATED void _mm256_mask_storeu_epi16(void* p, __mmask16 m, __m256i v) {
  for (int i = 0; i < 16; i++)
    if (lanes::in(m, i)) ((int16_t*)p)[i] = ((lanes::HalfShorts)v)[i];
}
EMULATED void _mm512_mask_cvtepi32_storeu_epi16(void* p, __mmask16 m, __m512i v) {
  for (int i = 0; i < 16; i++)
    if (lanes::in(m, i)) ((int16_t*)p)[i] = (int16_t)((lanes::Ints)v)[i];
}
EMULATED void _mm512_mask_compressstoreu_ps(void* p, __mmask16 m, __m512 v) {
  for (int i = 0, to = 0; i < 16; i++)
    if (lanes::in(m, i)) ((float*)p)[to++] = v[i];
}
EMULATED void _mm512_mask_compressstoreu_epi32(void* p, __mmask16 m, __m512i v) {
  for (int i = 0, to = 0; i < 16; i++)
    if (lanes::in(m, i)) ((int32_t*)p)[to++] = ((lanes::Ints)v)[i];
}
EMULATED __m512 _mm512_i32gather_ps(__m512i index, const void* p, int scale) {
  return lanes::each<__m512>([=](int i) {
    float x;
    memcpy(&x, (const char*)p + (ptrdiff_t)((lanes::Ints)index)[i] * scale, sizeof x);
    return x;
  });
}

// The same bits as another type.
EMULATED __m512i _mm512_castps_si512(__m512 a) { return (__m512i)a; }
EMULATED __m512 _mm512_castsi512_ps(__m512i a) { return (__m512)a; }
EMULATED __m512d _mm512_castps_pd(__m512 a) { return (__m512d)a; }
EMULATED __m512 _mm512_castpd_ps(__m512d a) { return (__m512)a; }
EMULATED __m256i _mm512_extracti32x8_epi32(__m512i a, int half) {
  return (__m256i)lanes::each<lanes::HalfInts>([=](int i) { return ((lanes::Ints)a)[8 * half + i]; });
}
EMULATED __m256 _mm512_extractf32x8_ps(__m512 a, int half) {
  return lanes::each<__m256>([=](int i) { return a[8 * half + i]; });
}
EMULATED __m256i _mm512_castsi512_si256(__m512i a) { return _mm512_extracti32x8_epi32(a, 0); }
EMULATED __m256 _mm512_castps512_ps256(__m512 a) { return _mm512_extractf32x8_ps(a, 0); }
EMULATED __m512 _mm512_castps256_ps512(__m256 a) {
  return lanes::each<__m512>([=](int i) { return i < 8 ? a[i] : NAN; });
}
EMULATED __m512 _mm512_insertf32x8(__m512 a, __m256 b, int half) {
  return lanes::each<__m512>([=](int i) { return i / 8 == half ? b[i % 8] : a[i]; });
}

// float32.
EMULATED __m512 _mm512_set1_ps(float x) {
  return lanes::each<__m512>([=](int) { return x; });
}
EMULATED __m512 _mm512_setzero_ps() { return __m512{}; }
template <class... X>
EMULATED __m512 _mm512_setr_ps(X... x) { return __m512{(float)x...}; }
EMULATED __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
EMULATED __m512 _mm512_sub_ps(__m512 a, __m512 b) { return a - b; }
EMULATED __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
EMULATED __m512 _mm512_div_ps(__m512 a, __m512 b) { return a / b; }
EMULATED __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return lanes::each<__m512>([=](int i) { return fmaf(a[i], b[i], c[i]); });
}
EMULATED __m512 _mm512_fmsub_ps(__m512 a, __m512 b, __m512 c) {
  return lanes::each<__m512>([=](int i) { return fmaf(a[i], b[i], -c[i]); });
}
EMULATED __m512 _mm512_fnmadd_ps(__m512 a, __m512 b, __m512 c) {
  return lanes::each<__m512>([=](int i) { return fmaf(-a[i], b[i], c[i]); });
}
EMULATED __m512 _mm512_max_ps(__m512 a, __m512 b) {
  return lanes::each<__m512>([=](int i) { return lanes::larger(a[i], b[i]); });
}
EMULATED __m512 _mm512_min_ps(__m512 a, __m512 b) {
  return lanes::each<__m512>([=](int i) { return a[i] < b[i] ? a[i] : b[i]; });
}
EMULATED __m512 _mm512_abs_ps(__m512 a) { return (__m512)((lanes::Ints)a & 0x7fffffff); }
EMULATED __m512 _mm512_roundscale_ps(__m512 a, int how) {
  return lanes::each<__m512>([=](int i) { return lanes::rounded(a[i], how); });
}
EMULATED __m512 _mm512_scalef_ps(__m512 a, __m512 n) {
  return lanes::each<__m512>([=](int i) { return lanes::scaled(a[i], n[i]); });
}
EMULATED float _mm512_reduce_add_ps(__m512 a) {
  return lanes::reduce<__m512, float>(a, [](float x, float y) { return x + y; });
}
EMULATED float _mm512_reduce_max_ps(__m512 a) {
  return lanes::reduce<__m512, float>(a, lanes::larger<float>);
}
EMULATED __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int what) {
  return lanes::mask<16>([=](int i) {
    switch (what) {
      case _CMP_LT_OQ: return a[i] < b[i];
      case _CMP_GT_OQ: return a[i] > b[i];
      case _CMP_GE_OQ: return a[i] >= b[i];
      case _CMP_LE_OQ: return a[i] <= b[i];
      case _CMP_EQ_OQ: return a[i] == b[i];
      case _CMP_NLT_UQ: return !(a[i] < b[i]);
      case _CMP_NEQ_UQ: return a[i] != b[i];
      case _CMP_UNORD_Q: return a[i] != a[i] || b[i] != b[i];
      default: __builtin_trap();
    }
  });
}
EMULATED __m512 _mm512_mask_mov_ps(__m512 other, __mmask16 m, __m512 a) {
  return lanes::each<__m512>([=](int i) { return lanes::in(m, i) ? a[i] : other[i]; });
}
EMULATED __m512 _mm512_maskz_mov_ps(__mmask16 m, __m512 a) {
  return _mm512_mask_mov_ps(__m512{}, m, a);
}

// Orders.
EMULATED __m512 _mm512_permutexvar_ps(__m512i order, __m512 a) {
  return lanes::each<__m512>([=](int i) { return a[((lanes::Ints)order)[i] & 15]; });
}
EMULATED __m512 _mm512_permutex2var_ps(__m512 a, __m512i order, __m512 b) {
  return lanes::each<__m512>([=](int i) {
    const int from = ((lanes::Ints)order)[i];
    return from & 16 ? b[from & 15] : a[from & 15];
  });
}
EMULATED __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int order) {
  return lanes::each<__m512>([=](int i) {
    const int from = 4 * (order >> i / 4 * 2 & 3) + i % 4;
    return i < 8 ? a[from] : b[from];
  });
}
// Elements `first` and on of each 128 bits, in turn from a and b.
template <class V>
EMULATED V unpacked(V a, V b, bool high) {
  constexpr int N = 16 / sizeof a[0];
  return lanes::each<V>([=](int i) {
    const int from = i / N * N + (high ? N / 2 : 0) + i % N / 2;
    return i % 2 ? b[from] : a[from];
  });
}
EMULATED __m512 _mm512_unpacklo_ps(__m512 a, __m512 b) { return unpacked(a, b, false); }
EMULATED __m512 _mm512_unpackhi_ps(__m512 a, __m512 b) { return unpacked(a, b, true); }
EMULATED __m512d _mm512_unpacklo_pd(__m512d a, __m512d b) { return unpacked(a, b, false); }
EMULATED __m512d _mm512_unpackhi_pd(__m512d a, __m512d b) { return unpacked(a, b, true); }
EMULATED __m512i _mm512_unpacklo_epi16(__m512i a, __m512i b) {
  return (__m512i)unpacked((lanes::Shorts)a, (lanes::Shorts)b, false);
}
EMULATED __m512i _mm512_unpackhi_epi16(__m512i a, __m512i b) {
  return (__m512i)unpacked((lanes::Shorts)a, (lanes::Shorts)b, true);
}

// Integers.
EMULATED __m512i _mm512_set1_epi32(int x) {
  return (__m512i)lanes::each<lanes::Ints>([=](int) { return x; });
}
EMULATED __m512i _mm512_set1_epi64(long long x) {
  return (__m512i)lanes::each<lanes::Longs>([=](int) { return x; });
}
template <class... X>
EMULATED __m512i _mm512_setr_epi32(X... x) { return (__m512i)lanes::Ints{x...}; }
EMULATED __m512i _mm512_add_epi32(__m512i a, __m512i b) {
  return (__m512i)((lanes::Unsigned)a + (lanes::Unsigned)b);
}
EMULATED __m512i _mm512_add_epi64(__m512i a, __m512i b) { return (__m512i)((__v8du)a + (__v8du)b); }
EMULATED __m512i _mm512_mullo_epi32(__m512i a, __m512i b) {
  return (__m512i)((lanes::Unsigned)a * (lanes::Unsigned)b);
}
EMULATED __m512i _mm512_mullo_epi64(__m512i a, __m512i b) { return (__m512i)((__v8du)a * (__v8du)b); }
EMULATED __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
EMULATED __m512i _mm512_xor_si512(__m512i a, __m512i b) { return a ^ b; }
EMULATED __m512i _mm512_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
  __m512i result{};
  for (int k = 0; k < 8; k++)
    if (table >> k & 1) result |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
  return result;
}
EMULATED __m512i _mm512_slli_epi32(__m512i a, int n) { return (__m512i)((lanes::Unsigned)a << n); }
EMULATED __m512i _mm512_srli_epi32(__m512i a, int n) { return (__m512i)((lanes::Unsigned)a >> n); }
EMULATED __m512i _mm512_srli_epi64(__m512i a, int n) { return (__m512i)((__v8du)a >> n); }
EMULATED __m512i _mm512_max_epi32(__m512i a, __m512i b) {
  return (__m512i)lanes::each<lanes::Ints>(
      [=](int i) { return lanes::larger(((lanes::Ints)a)[i], ((lanes::Ints)b)[i]); });
}
EMULATED __m512i _mm512_min_epi32(__m512i a, __m512i b) {
  return (__m512i)lanes::each<lanes::Ints>([=](int i) {
    const int x = ((lanes::Ints)a)[i], y = ((lanes::Ints)b)[i];
    return x < y ? x : y;
  });
}
EMULATED __m512i _mm512_max_epu32(__m512i a, __m512i b) {
  return (__m512i)lanes::each<lanes::Unsigned>(
      [=](int i) { return lanes::larger(((lanes::Unsigned)a)[i], ((lanes::Unsigned)b)[i]); });
}
EMULATED __mmask16 _mm512_cmplt_epi32_mask(__m512i a, __m512i b) {
  return lanes::mask<16>([=](int i) { return ((lanes::Ints)a)[i] < ((lanes::Ints)b)[i]; });
}
EMULATED __m512i _mm512_mask_mov_epi32(__m512i other, __mmask16 m, __m512i a) {
  return (__m512i)_mm512_mask_mov_ps((__m512)other, m, (__m512)a);
}
EMULATED __m512i _mm512_mask_mov_epi16(__m512i other, __mmask32 m, __m512i a) {
  return (__m512i)lanes::each<lanes::Shorts>(
      [=](int i) { return lanes::in(m, i) ? ((lanes::Shorts)a)[i] : ((lanes::Shorts)other)[i]; });
}

// From one type to another.
EMULATED __m512 _mm512_cvtepi32_ps(__m512i a) {
  return lanes::each<__m512>([=](int i) { return (float)((lanes::Ints)a)[i]; });
}
EMULATED __m512i _mm512_cvtps_epi32(__m512 a) {
  return (__m512i)lanes::each<lanes::Ints>([=](int i) {
    const float x = __builtin_rintf(a[i]);
    return x >= -0x1p31f && x < 0x1p31f ? (int)x : INT32_MIN;
  });
}
EMULATED __m512i _mm512_cvtepi8_epi32(__m128i a) {
  return (__m512i)lanes::each<lanes::Ints>([=](int i) { return (int8_t)((__v16qi)a)[i]; });
}
EMULATED __m512i _mm512_cvtepu16_epi32(__m256i a) {
  return (__m512i)lanes::each<lanes::Ints>([=](int i) { return (uint16_t)((__v16hi)a)[i]; });
}
EMULATED __m256i _mm512_cvtepi32_epi16(__m512i a) {
  return (__m256i)lanes::each<lanes::HalfShorts>([=](int i) { return (int16_t)((lanes::Ints)a)[i]; });
}
EMULATED __m256i _mm512_cvtepi16_epi8(__m512i a) {
  return (__m256i)lanes::each<lanes::HalfBytes>([=](int i) { return (int8_t)((lanes::Shorts)a)[i]; });
}
EMULATED __m512i _mm512_cvtepi32_epi64(__m256i a) {
  return (__m512i)lanes::each<lanes::Longs>([=](int i) { return ((lanes::HalfInts)a)[i]; });
}
EMULATED __m256 _mm512_cvtepi64_ps(__m512i a) {
  return lanes::each<__m256>([=](int i) { return (float)((lanes::Longs)a)[i]; });
}
EMULATED __m512d _mm512_cvtps_pd(__m256 a) {
  return lanes::each<__m512d>([=](int i) { return (double)a[i]; });
}

// float64.
EMULATED __m512d _mm512_set1_pd(double x) {
  return lanes::each<__m512d>([=](int) { return x; });
}
EMULATED __m512d _mm512_add_pd(__m512d a, __m512d b) { return a + b; }
EMULATED __m512d _mm512_sub_pd(__m512d a, __m512d b) { return a - b; }
EMULATED __m512d _mm512_mul_pd(__m512d a, __m512d b) { return a * b; }
EMULATED __m512d _mm512_max_pd(__m512d a, __m512d b) {
  return lanes::each<__m512d>([=](int i) { return lanes::larger(a[i], b[i]); });
}
EMULATED __m512d _mm512_fmadd_pd(__m512d a, __m512d b, __m512d c) {
  return lanes::each<__m512d>([=](int i) { return fma(a[i], b[i], c[i]); });
}
EMULATED __m512d _mm512_fnmadd_pd(__m512d a, __m512d b, __m512d c) {
  return lanes::each<__m512d>([=](int i) { return fma(-a[i], b[i], c[i]); });
}
EMULATED __m512d _mm512_roundscale_pd(__m512d a, int how) {
  return lanes::each<__m512d>([=](int i) { return lanes::rounded(a[i], how); });
}
EMULATED __m512d _mm512_scalef_pd(__m512d a, __m512d n) {
  return lanes::each<__m512d>([=](int i) { return lanes::scaled(a[i], n[i]); });
}
EMULATED __m512d _mm512_maskz_mov_pd(__mmask8 m, __m512d a) {
  return lanes::each<__m512d>([=](int i) { return lanes::in(m, i) ? a[i] : 0; });
}
EMULATED double _mm512_reduce_add_pd(__m512d a) {
  return lanes::reduce<__m512d, double>(a, [](double x, double y) { return x + y; });
}

// bfloat16.
EMULATED __m256i _mm512_cvtneps_pbh(__m512 a) {
  return (__m256i)lanes::each<lanes::HalfShorts>([=](int i) { return (int16_t)lanes::narrowed(a[i]); });
}
EMULATED __m128i _mm_cvtneps_pbh(__m128 a) {
  return (__m128i)lanes::each<__v8hi>([=](int i) { return i < 4 ? (int16_t)lanes::narrowed(a[i]) : 0; });
}
EMULATED __m512 _mm512_dpbf16_ps(__m512 sums, __m512bh a, __m512bh b) {
  const auto x = (lanes::Shorts)a, y = (lanes::Shorts)b;
  return lanes::each<__m512>([=](int i) {
    const float odd = lanes::fused((uint16_t)x[2 * i + 1], (uint16_t)y[2 * i + 1], sums[i]);
    return lanes::fused((uint16_t)x[2 * i], (uint16_t)y[2 * i], odd);
  });
}

}  // namespace lorastack
