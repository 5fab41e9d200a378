// Multiplication by dot products of pairs of bfloat16, in AVX512-BF16. Activations are bfloat16, and
// sizes are multiples of 32.
#pragma once

#include "pairs.h"
#include "untiled.h"

namespace lorastack::LORASTACK_ISA {

struct Dot : Untiled<Dot> {
  using E = BF16;
  using A = BF16;
  using Packed = uint16_t;
  static constexpr int FEW_ROWS = 12;  // up to so many rows, weights are read once
  static constexpr int MAX_QUERIES = 4, VALUE_PARTS = 4;
  static constexpr bool PADS_STATES = false;

  template <class Work>
  INLINE void with_panels(const lorastack_matrix& matrix, int pair, int rows, uint16_t* unpacked,
                          Work&& work) {
    with_pair<FEW_ROWS>(matrix, pair, rows, unpacked, work);
  }

  template <class Source>
  INLINE void block(const uint16_t* x, size_t ldx, int rows, Source& source, int k, bool,
                    Block* out) {
    int m = 0;
    for (; rows - m >= 12; m += 12) group<12>(x + m * ldx, ldx, source, k, out, m);
    for (; rows - m >= 8; m += 8) group<8>(x + m * ldx, ldx, source, k, out, m);
    for (; rows - m >= 4; m += 4) group<4>(x + m * ldx, ldx, source, k, out, m);
    for (; rows - m >= 2; m += 2) group<2>(x + m * ldx, ldx, source, k, out, m);
    for (; rows - m >= 1; m += 1) group<1>(x + m * ldx, ldx, source, k, out, m);
  }

  // sums[o][t]: row o of a matrix [16][k] times state t of a tile [k/2][16][2].
  INLINE void multiply_16(const uint16_t* matrix, const uint16_t* tile, int k,
                          float (*sums)[LANES]) {
    constexpr int OUTPUTS = 8, LINE = 32;
    const uint16_t* next = matrix + (size_t)LANES * k;
    for (int row = 0; row < LANES; row += OUTPUTS) {
      const uint16_t* const rows = matrix + (size_t)row * k;
      Floats totals[OUTPUTS];
      for (int o = 0; o < OUTPUTS; o++) totals[o] = zero();
      for (int line = 0; line < k; line += LINE) {
        for (int o = 0; o < OUTPUTS; o++) prefetch_far(next + (size_t)(row + o) * k + line);
        for (int i = line; i < line + LINE; i += 2) {
          const Ints states = load_ints(tile + (size_t)i * LANES);
#pragma GCC unroll 8
          for (int o = 0; o < OUTPUTS; o++)
            totals[o] = dot(states, pair(rows + (size_t)o * k + i), totals[o]);
        }
      }
      for (int o = 0; o < OUTPUTS; o++) store(sums[row + o], totals[o]);
    }
  }

  static constexpr int PACK_INPUTS = 2 * LANES;
  INLINE Floats load_packed(const uint16_t* state) { return from_bits(load_ints(state)); }

  // What a dot product takes at once: 16 pairs.
  using Dims = Ints;
  static constexpr int DIMS = 2 * LANES;
  INLINE Dims load_activations(const uint16_t* p) { return load_ints(p); }
  INLINE Dims load_activations(const uint16_t* p, int count) { return load_weights(p, count); }
  INLINE Dims load_weights(const uint16_t* p) { return load_ints(p); }
  INLINE Dims load_weights(const uint16_t* p, int count) { return load_pairs(p, count); }
  INLINE Floats dot(Dims a, Dims b, Floats sums) { return add_dots(a, b, sums); }

 private:
  INLINE Ints pair(const uint16_t* p) {
    int word;
    memcpy(&word, p, sizeof word);
    return set(word);
  }

  template <int M, class Source>
  static void group(const uint16_t* x, size_t ldx, Source& source, int k, Block* out, int row) {
    Floats sums[M][2];
    for (int m = 0; m < M; m++) sums[m][0] = sums[m][1] = zero();
    for (int i = 0; i < k; i += K_STEP) {
      const uint16_t *low = source.tile(i, 0), *high = source.tile(i, 1);
      for (int j = 0; j < K_STEP; j += 2) {
        const Ints v0 = load_ints(low + j * LANES), v1 = load_ints(high + j * LANES);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) {
          const Ints b = pair(x + m * ldx + i + j);
          sums[m][0] = dot(v0, b, sums[m][0]);
          sums[m][1] = dot(v1, b, sums[m][1]);
        }
      }
    }
    for (int m = 0; m < M; m++) {
      store(out->sums[row + m], sums[m][0]);
      store(out->sums[row + m] + LANES, sums[m][1]);
    }
  }
};

}  // namespace lorastack::LORASTACK_ISA
