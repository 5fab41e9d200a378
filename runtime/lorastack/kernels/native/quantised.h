// Weights of 8 and 4 bits: panels of codes, made bfloat16 on the way into a product.
//
// A panel's K_STEP inputs are one tile, in memory as codes and unpacked as bfloat16 [K_STEP/2][16][2].
// int8: [K][16]. Codes are exact in bfloat16; the sums are multiplied by the outputs' scales.
// int4: [K/8][16][8 nibbles], the first input lowest. A tile has a scale an output; code * scale is
// exact in bfloat16, as kernels/quantize.py says.
// Scales: bfloat16 [groups][16] a panel, one group for int8, one a tile for int4.
#pragma once

#include "abi.h"
#include "vector.h"

namespace lorastack::LORASTACK_ISA {

constexpr int TILE = K_STEP * LANES;  // weights
constexpr int CODES_AHEAD = 2048;     // bytes of codes that are prefetched

// Stores a line of two inputs, whose floats are exact in bfloat16.
INLINE void store_line(uint16_t* out, Floats even, Floats odd) {
  store_ints(out, join_halves(even, odd));
}

struct Int8 {
  static constexpr int BYTES = TILE;  // of a tile
  static constexpr bool GROUPED = false;

  INLINE void unpack(const uint8_t* codes, const uint16_t*, uint16_t* out) {
    for (int i = 0; i < TILE; i += 2 * LANES)
      store_line(out + i, floats(codes + i), floats(codes + i + LANES));
  }

  INLINE Floats floats(const uint8_t* codes) { return to_floats(load_bytes(codes)); }
};

struct Int4 {
  static constexpr int BYTES = TILE / 2;
  static constexpr bool GROUPED = true;

  INLINE void unpack(const uint8_t* codes, const uint16_t* scales, uint16_t* out) {
    const Floats scale = load_halves(scales);
    for (int i = 0; i < TILE; codes += 64) {
      Ints nibbles = load_ints(codes);
      for (int pair = 0; pair < 4; pair++, i += 2 * LANES) {
        const Floats even = lowest_nibbles(nibbles), odd = lowest_nibbles(shift_right<4>(nibbles));
        store_line(out + i, mul(even, scale), mul(odd, scale));
        nibbles = shift_right<8>(nibbles);
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
      prefetch(codes + CODES_AHEAD + line);
    Kind::unpack(codes, scales_[half] + (Kind::GROUPED ? tile * LANES : 0), out);
  }

  INLINE_METHOD const uint16_t* tile(int k, int half) {
    if (k == 0) unpack(0, half, unpacked_[0][half]);
    const int next = k + K_STEP;
    if (next < end_) unpack(next, half, unpacked_[next / K_STEP % 2][half]);
    return unpacked_[k / K_STEP % 2][half];
  }

 private:
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
