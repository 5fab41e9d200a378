// bfloat16 weights to codes and scales, with the bits of the plain reference in quantize.py: sums are
// taken in the order that is defined there, and build.py forbids to fuse products with them.
#define LORASTACK_ISA avx512
#include <math.h>

#include <algorithm>

#include "common.h"
#include "abi.h"

namespace lorastack::avx512 {

namespace {

constexpr int GROUP = 32;  // inputs that share a scale in int4

// Weights begin..begin + 32 of a row, zeros behind its end: the even ones are the lower halves.
INLINE __m512i load(const uint16_t* row, int inputs, int begin) {
  const int count = inputs - begin;
  const __mmask32 real = count >= GROUP ? ~0u : count > 0 ? (1u << count) - 1 : 0;
  return _mm512_maskz_loadu_epi16(real, row + begin);
}

INLINE __m512i even_bits(__m512i pairs) { return _mm512_slli_epi32(pairs, 16); }
INLINE __m512i odd_bits(__m512i pairs) {
  return _mm512_and_epi32(pairs, _mm512_set1_epi32((int)0xffff0000));
}
INLINE __m512 even(__m512i pairs) { return _mm512_castsi512_ps(even_bits(pairs)); }
INLINE __m512 odd(__m512i pairs) { return _mm512_castsi512_ps(odd_bits(pairs)); }

INLINE __m512 without_tiny(__m512 scale) {
  const __m512 tiny = _mm512_set1_ps(0x1p-100f);
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(_mm512_abs_ps(scale), tiny, _CMP_NLT_UQ), scale);
}

// A positive scale rounded up to bfloat16.
INLINE __m512 rounded_up(__m512 scale) {
  const __m512i above = _mm512_add_epi32(_mm512_castps_si512(scale), _mm512_set1_epi32(0xffff));
  return odd(above);
}

// The nearest number of 5 significant bits, of two the even one. Subnormal numbers are tiny anyway.
INLINE __m512 shortened(__m512 scale) {
  constexpr int DROPPED = 19;  // of the 23 bits that follow the first
  const __m512i bits = _mm512_castps_si512(scale);
  const __m512i last = _mm512_and_epi32(_mm512_srli_epi32(bits, DROPPED), _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(last, _mm512_set1_epi32((1 << (DROPPED - 1)) - 1));
  const __m512i kept = _mm512_srli_epi32(_mm512_add_epi32(bits, half), DROPPED);
  return _mm512_castsi512_ps(_mm512_slli_epi32(kept, DROPPED));
}

INLINE __m512 inverse_of(__m512 scale) {
  const __mmask16 some = _mm512_cmp_ps_mask(scale, _mm512_setzero_ps(), _CMP_NEQ_UQ);
  return _mm512_maskz_div_ps(some, _mm512_set1_ps(1), scale);
}

INLINE __m512 squared_error(__m512 weight, __m512 inverse) {
  const __m512 exact = _mm512_mul_ps(weight, inverse);
  const __m512 nearest = _mm512_roundscale_ps(exact, _MM_FROUND_TO_NEAREST_INT);
  const __m512 code =
      _mm512_min_ps(_mm512_max_ps(nearest, _mm512_set1_ps(-8)), _mm512_set1_ps(7));
  const __m512 off = _mm512_sub_ps(code, exact);
  return _mm512_mul_ps(off, off);
}

// Sums for 16 groups, in units of their scales: neighbours are added first, then neighbouring sums.
template <int NUM>
INLINE __m512 squared_errors(const __m512i* pairs, __m512 inverse) {
  if constexpr (NUM == 1)
    return _mm512_add_ps(squared_error(even(*pairs), inverse), squared_error(odd(*pairs), inverse));
  else
    return _mm512_add_ps(squared_errors<NUM / 2>(pairs, inverse),
                         squared_errors<NUM / 2>(pairs + NUM / 2, inverse));
}

// bfloat16 scales of the 16 groups from `begin` on, one a lane.
INLINE __m512 int4_scales(const uint16_t* row, int inputs, int begin) {
  __m512 groups[LANES];
  for (int i = 0; i < LANES; i++)
    groups[i] = _mm512_castsi512_ps(load(row, inputs, begin + i * GROUP));
  transpose_16(groups);
  // Bits are a sign and a magnitude: the lowest negative number is the largest unsigned integer.
  // Where there is none, `low` is `high`.
  __m512i pairs[LANES], lowest = _mm512_setzero_si512(), highest = lowest;
  for (int i = 0; i < LANES; i++) {
    pairs[i] = _mm512_castps_si512(groups[i]);
    lowest = _mm512_max_epu16(lowest, pairs[i]);
    highest = _mm512_max_epi16(highest, pairs[i]);
  }
  const __m512 low = _mm512_castsi512_ps(_mm512_max_epu32(even_bits(lowest), odd_bits(lowest)));
  const __m512i high = _mm512_max_epi32(even_bits(highest), odd_bits(highest));
  const __mmask16 below = _mm512_cmpge_epi32_mask(_mm512_castps_si512(_mm512_abs_ps(low)), high);
  const __m512 extreme = _mm512_mask_mov_ps(_mm512_castsi512_ps(high), below, low);
  const __m512 largest = _mm512_abs_ps(extreme);
  __m512 best = _mm512_set1_ps(INFINITY);
  __m512 scale = largest;  // stays where all weights are 0 or one is not finite
  for (const float code : {8.8f, 8.2f, 7.6f, 7.0f}) {
    const __m512 tried = without_tiny(shortened(_mm512_div_ps(extreme, _mm512_set1_ps(-code))));
    const __m512 step = _mm512_div_ps(tried, largest);  // so that no square overflows or vanishes
    const __m512 error =
        _mm512_mul_ps(squared_errors<LANES>(pairs, inverse_of(tried)), _mm512_mul_ps(step, step));
    const __mmask16 better = _mm512_cmp_ps_mask(error, best, _CMP_LT_OQ);
    best = _mm512_mask_mov_ps(best, better, error);
    scale = _mm512_mask_mov_ps(scale, better, tried);
  }
  return scale;
}

// The bfloat16 scale of a whole row, in every lane.
INLINE __m512 int8_scale(const uint16_t* row, int inputs) {
  __m512i most = _mm512_setzero_si512();
  for (int i = 0; i < inputs; i += GROUP)
    most = _mm512_max_epu16(
        most, _mm512_and_si512(load(row, inputs, i), _mm512_set1_epi16(0x7fff)));
  const int bits = (int)_mm512_reduce_max_epu32(_mm512_max_epu32(even_bits(most), odd_bits(most)));
  const __m512 largest = _mm512_castsi512_ps(_mm512_set1_epi32(bits));
  return without_tiny(rounded_up(_mm512_div_ps(largest, _mm512_set1_ps(127))));
}

INLINE __m512i code_of(__m512 weight, __m512 inverse, int least, int most) {
  const __m512i nearest = _mm512_cvtps_epi32(_mm512_mul_ps(weight, inverse));
  return _mm512_min_epi32(_mm512_max_epi32(nearest, _mm512_set1_epi32(least)),
                          _mm512_set1_epi32(most));
}

// Stores 32 codes.
INLINE void store_codes(__m512i pairs, __m512 inverse, int least, int most, int8_t* codes) {
  const __m512i evens = code_of(even(pairs), inverse, least, most);
  const __m512i odds = code_of(odd(pairs), inverse, least, most);
  const __m512i both = _mm512_mask_mov_epi16(evens, 0xaaaaaaaa, _mm512_slli_epi32(odds, 16));
  _mm256_storeu_si256((__m256i*)codes, _mm512_cvtepi16_epi8(both));
}

INLINE void store_scales(__m512 scales, int num, uint16_t* out) {
  _mm512_mask_cvtepi32_storeu_epi16(out, first(num),
                                    _mm512_srli_epi32(_mm512_castps_si512(scales), 16));
}

void quantise_int8(const uint16_t* row, int inputs, int8_t* codes, uint16_t* scales) {
  const __m512 scale = int8_scale(row, inputs), inverse = inverse_of(scale);
  store_scales(scale, 1, scales);
  for (int i = 0; i < inputs; i += GROUP)
    store_codes(load(row, inputs, i), inverse, -127, 127, codes + i);
}

void quantise_int4(const uint16_t* row, int inputs, int8_t* codes, uint16_t* scales) {
  for (int begin = 0; begin < inputs; begin += LANES * GROUP) {
    const int num = std::min(LANES, ceil_div(inputs - begin, GROUP));
    const __m512 group_scales = int4_scales(row, inputs, begin);
    store_scales(group_scales, num, scales + begin / GROUP);
    alignas(64) float inverses[LANES];
    _mm512_store_ps(inverses, inverse_of(group_scales));
    for (int i = 0; i < num; i++) {
      const int place = begin + i * GROUP;
      const __m512 inverse = _mm512_set1_ps(inverses[i]);
      store_codes(load(row, inputs, place), inverse, -8, 7, codes + place);
    }
  }
}

}  // namespace

void run_quantise(const uint16_t* weights, int rows, int inputs, int kind, int8_t* codes,
                  uint16_t* scales, int num_threads) {
  const size_t groups = ceil_div(inputs, GROUP);
#pragma omp parallel for num_threads(num_threads)
  for (int row = 0; row < rows; row++) {
    const uint16_t* weight = weights + (size_t)row * inputs;
    int8_t* const row_codes = codes + row * groups * GROUP;
    if (kind == LORASTACK_INT8)
      quantise_int8(weight, inputs, row_codes, scales + row);
    else
      quantise_int4(weight, inputs, row_codes, scales + row * groups);
  }
}

}  // namespace lorastack::avx512
