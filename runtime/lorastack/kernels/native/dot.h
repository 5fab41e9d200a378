// Multiplication by dot products of pairs of bfloat16, in AVX512-BF16 and NEON. Activations are bfloat16,
// and sizes are multiples of 32.
#pragma once

#include "pairs.h"
#include "untiled.h"

namespace lorastack::LORASTACK_ISA {

// Sums of ROWS rows by PANELS panels stay in registers; attention takes QUERIES at once, with SUMS for
// their values. FEW_ROWS: up to so many rows, codes are unpacked on the way.
template <int ROWS, int PANELS, int QUERIES, int SUMS, int FEW_ROWS = ROWS>
struct Dot : Untiled<Dot<ROWS, PANELS, QUERIES, SUMS, FEW_ROWS>> {
  using E = BF16;
  using A = BF16;
  using Packed = uint16_t;
  static constexpr int MAX_QUERIES = QUERIES, VALUE_SUMS = SUMS;
  static constexpr bool PADS_STATES = false;

  INLINE int rows_in_cache(int) { return INT32_MAX; }

  template <class Work>
  INLINE void with_panels(const lorastack_matrix& matrix, int pair, int rows, uint16_t* unpacked,
                          Work&& work) {
    with_pair<FEW_ROWS>(matrix, pair, rows, unpacked, work);
  }

  template <class Source>
  INLINE void block(const uint16_t* x, size_t ldx, int rows, Source& source, int k, bool,
                    Block* out) {
    for (int half = 0; half < 2; half += PANELS)
      groups<ROWS>(x, ldx, rows, source, k, half, &out->sums[0][half * LANES]);
  }

  // sums[o][t]: row o of a matrix [16][k] times state t of a tile [k/2][16][2].
  INLINE void multiply_16(const uint16_t* matrix, const uint16_t* tile, int k,
                          float (*sums)[LANES]) {
    constexpr int OUTPUTS = ROWS >= 8 ? 8 : 4;
    for (int row = 0; row < LANES; row += OUTPUTS)
      multiply_states<OUTPUTS>(matrix + (size_t)row * k, tile, k, sums + row);
  }

  static constexpr int PACK_INPUTS = 2 * LANES;
  INLINE Floats load_packed(const uint16_t* state) { return from_bits(load_ints(state)); }
  // Two inputs of 16 states into a tile, rounded to the states' type.
  INLINE void store_pair(uint16_t* tile, Floats even, Floats odd) {
    store_line(tile, E::rounded(even), E::rounded(odd));
  }

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

  template <int OUTPUTS>
  __attribute__((noinline)) static void multiply_states(const uint16_t* rows, const uint16_t* tile,
                                                        int k, float (*out)[LANES]) {
    Floats sums[OUTPUTS];
    unroll<OUTPUTS>([&](auto o) INLINE_LAMBDA { sums[o] = zero(); });
    for (int line = 0; line < k; line += K_STEP) {
      for (int o = 0; o < OUTPUTS; o++) prefetch_far(rows + (size_t)(LANES + o) * k + line);
      for (int i = line; i < line + K_STEP; i += 2) {
        const Ints states = load_ints(tile + (size_t)i * LANES);
        unroll<OUTPUTS>([&](auto o) INLINE_LAMBDA {
          sums[o] = dot(states, pair(rows + (size_t)o * k + i), sums[o]);
        });
      }
    }
    unroll<OUTPUTS>([&](auto o) INLINE_LAMBDA { store(out[o], sums[o]); });
  }

  // As many rows at once as there are, up to M.
  template <int M, class Source>
  INLINE void groups(const uint16_t* x, size_t ldx, int rows, Source& source, int k, int half,
                     float* out) {
    int m = 0;
    for (; rows - m >= M; m += M) group<M>(x + m * ldx, ldx, source, k, half, out + m * BLOCK_COLS);
    constexpr int FEWER = M > 8 ? 8 : M > 4 ? 4 : M / 2;
    if constexpr (FEWER > 0)
      groups<FEWER>(x + m * ldx, ldx, rows - m, source, k, half, out + m * BLOCK_COLS);
  }

  // Not inlined: next to other code GCC keeps sums in memory.
  template <int M, class Source>
  __attribute__((noinline)) static void group(const uint16_t* x, size_t ldx, Source& source, int k,
                                              int half, float* out) {
    Floats sums[M * PANELS];
    unroll<M * PANELS>([&](auto i) INLINE_LAMBDA { sums[i] = zero(); });
    for (int i = 0; i < k; i += K_STEP) {
      const uint16_t* tiles[PANELS];
      unroll<PANELS>([&](auto p) INLINE_LAMBDA { tiles[p] = source.tile(i, half + p); });
      for (int j = 0; j < K_STEP; j += 2) {
        Ints weights[PANELS];
        unroll<PANELS>([&](auto p) INLINE_LAMBDA { weights[p] = load_ints(tiles[p] + j * LANES); });
        unroll<M>([&](auto m) INLINE_LAMBDA {
          const Ints inputs = pair(x + m * ldx + i + j);
          unroll<PANELS>([&](auto p) INLINE_LAMBDA {
            sums[m * PANELS + p] = dot(weights[p], inputs, sums[m * PANELS + p]);
          });
        });
      }
    }
    unroll<M>([&](auto m) INLINE_LAMBDA {
      unroll<PANELS>([&](auto p) INLINE_LAMBDA {
        store(out + m * BLOCK_COLS + p * LANES, sums[m * PANELS + p]);
      });
    });
  }
};

}  // namespace lorastack::LORASTACK_ISA
