// Weights of 8 and 4 bits: panels of codes, made bfloat16 on the way into a product.
//
// A panel's K_STEP inputs are one tile, in memory as codes and unpacked as bfloat16 [K_STEP/2][16][2].
// int8: [K][16]. Codes are exact in bfloat16; the sums are multiplied by the outputs' scales.
// int4: [K/8][16][8 nibbles], the first input lowest. A tile has a scale an output; code * scale is
// exact in bfloat16, as kernels/quantize.py says.
// Scales: bfloat16 [groups][16] a panel, one group for int8, one a tile for int4.
#pragma once

#include "common.h"
#include "abi.h"

namespace lorastack::LORASTACK_ISA {

constexpr int TILE = K_STEP * LANES;  // weights
constexpr int CODES_AHEAD = 2048;     // bytes of codes that are prefetched

INLINE __m512 load_scales(const uint16_t* scales) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)scales));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

// Stores a line of two inputs, the upper halves of their floats, which are exact in bfloat16.
INLINE void store_line(uint16_t* out, __m512 even, __m512 odd) {
  constexpr int AND_OR = 0xea;  // (a & b) | c
  const __m512i upper = _mm512_set1_epi32((int)0xffff0000);
  const __m512i below = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
  const __m512i line =
      _mm512_ternarylogic_epi32(_mm512_castps_si512(odd), upper, below, AND_OR);
  _mm512_storeu_si512(out, line);
}

struct Int8 {
  static constexpr int BYTES = TILE;  // of a tile
  static constexpr bool GROUPED = false;

  INLINE void unpack(const uint8_t* codes, const uint16_t*, uint16_t* out) {
    for (int i = 0; i < TILE; i += 2 * LANES)
      store_line(out + i, floats(codes + i), floats(codes + i + LANES));
  }

  INLINE __m512 floats(const uint8_t* codes) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)codes)));
  }
};

struct Int4 {
  static constexpr int BYTES = TILE / 2;
  static constexpr bool GROUPED = true;

  INLINE void unpack(const uint8_t* codes, const uint16_t* scales, uint16_t* out) {
    const __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    const __m512 scale = load_scales(scales);
    for (int i = 0; i < TILE; codes += 64) {
      __m512i nibbles = _mm512_loadu_si512(codes);
      for (int pair = 0; pair < 4; pair++, i += 2 * LANES) {
        const __m512 even = _mm512_permutexvar_ps(nibbles, values);
        const __m512 odd = _mm512_permutexvar_ps(_mm512_srli_epi32(nibbles, 4), values);
        store_line(out + i, _mm512_mul_ps(even, scale), _mm512_mul_ps(odd, scale));
        nibbles = _mm512_srli_epi32(nibbles, 8);
      }
    }
  }
};

// A pair of panels of codes, unpacked tile by tile, each while the one before it is multiplied.
template <class Kind>
class Codes {
 public:
  Codes(const lorastack_matrix& matrix, int pair) : end_(matrix.k) {
    const size_t tiles = matrix.k / K_STEP, groups = Kind::GROUPED ? tiles : 1;
    for (int half = 0; half < 2; half++) {
      codes_[half] = (const uint8_t*)matrix.weight + (2 * pair + half) * tiles * Kind::BYTES;
      scales_[half] = (const uint16_t*)matrix.scales + (2 * pair + half) * groups * LANES;
    }
  }

  // Unpacks the tile of panel `half` that begins at input k.
  INLINE_METHOD void unpack(int k, int half, uint16_t* out) const {
    const size_t tile = k / K_STEP;
    const uint8_t* codes = codes_[half] + tile * Kind::BYTES;
    for (int line = 0; line < Kind::BYTES; line += 64)
      _mm_prefetch((const char*)codes + CODES_AHEAD + line, _MM_HINT_T0);
    Kind::unpack(codes, scales_[half] + (Kind::GROUPED ? tile * LANES : 0), out);
  }

  INLINE_METHOD Tiles<uint16_t> at(int k) {
    if (k == 0) unpack_both(0);
    if (k + K_STEP < end_) unpack_both(k + K_STEP);
    const auto& pair = unpacked_[k / K_STEP % 2];
    return {pair[0], pair[1]};
  }

 private:
  INLINE_METHOD void unpack_both(int k) {
    for (int half = 0; half < 2; half++) unpack(k, half, unpacked_[k / K_STEP % 2][half]);
  }

  const int end_;
  const uint8_t* codes_[2];
  const uint16_t* scales_[2];
  alignas(64) uint16_t unpacked_[2][2][TILE];
};

// Unpacks a whole pair into panels as `Plain` reads them.
template <class Kind>
void unpack_pair(const lorastack_matrix& matrix, int pair, uint16_t* out) {
  const Codes<Kind> codes(matrix, pair);
  for (int half = 0; half < 2; half++)
    for (int k = 0; k < matrix.k; k += K_STEP, out += TILE) codes.unpack(k, half, out);
}

}  // namespace lorastack::LORASTACK_ISA
