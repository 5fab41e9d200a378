// Weights of 8 and 4 bits: panels of codes, and bfloat16 panels made of them.
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
    for (int i = 0; i < TILE; codes += 64, i += 8 * LANES) {
      const Ints words = load_ints(codes);
      unroll<4>([&](auto pair) INLINE_LAMBDA {
        store_line(out + i + pair * 2 * LANES, mul(nibbles<2 * pair.value>(words), scale),
                   mul(nibbles<2 * pair.value + 1>(words), scale));
      });
    }
  }
};

// Panel `panel` of a matrix of codes.
template <class Kind>
struct CodePanel {
  const uint8_t* codes;
  const uint16_t* scales;

  CodePanel(const lorastack_matrix& matrix, int panel) {
    const size_t tiles = matrix.k / K_STEP, groups = Kind::GROUPED ? tiles : 1;
    codes = (const uint8_t*)matrix.weight + panel * tiles * Kind::BYTES;
    scales = (const uint16_t*)matrix.scales + panel * groups * LANES;
  }

  // Unpacks the tile that begins at input k.
  INLINE_METHOD void unpack(int k, uint16_t* out) const {
    const size_t tile = k / K_STEP;
    const uint8_t* tile_codes = codes + tile * Kind::BYTES;
    for (int line = 0; line < Kind::BYTES; line += 64) prefetch(tile_codes + CODES_AHEAD + line);
    Kind::unpack(tile_codes, scales + (Kind::GROUPED ? tile * LANES : 0), out);
  }
};

// Unpacks a whole pair into two panels, one behind the other.
template <class Kind>
void unpack_pair(const lorastack_matrix& matrix, int pair, uint16_t* out) {
  for (int half = 0; half < 2; half++) {
    const CodePanel<Kind> panel(matrix, 2 * pair + half);
    for (int k = 0; k < matrix.k; k += K_STEP, out += TILE) panel.unpack(k, out);
  }
}

}  // namespace lorastack::LORASTACK_ISA
