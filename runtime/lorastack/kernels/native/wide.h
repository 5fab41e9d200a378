// Multiplication without dot products of bfloat16: weights of any kind are widened to float32 on their
// way into a fused multiply-add. Activations are float32.
#pragma once

#include "untiled.h"

namespace lorastack::LORASTACK_ISA {

// Element: of weights and KV. ROWS by PANELS sums stay in registers; QUERIES by PARTS in attention.
template <class Element, int ROWS, int PANELS, int QUERIES, int PARTS>
struct Wide : Untiled<Wide<Element, ROWS, PANELS, QUERIES, PARTS>> {
  using E = Element;  // of weights, KV, LoRAs and heads
  using A = F32;      // of activations
  using T = typename E::T;
  using Packed = float;  // heads' states, see `multiply_16`
  static constexpr int FEW_ROWS = ROWS;  // up to so many rows, weights are read once
  static constexpr int MAX_QUERIES = QUERIES, VALUE_PARTS = PARTS;
  static constexpr bool PADS_STATES = true;  // lm_head's rows are copied into padded activations

  template <class Source>
  INLINE void block(const float* x, size_t ldx, int rows, Source& source, int k, Block* out) {
    for (int half = 0; half < 2; half += PANELS) {
      // Groups of nearly equal size.
      for (int row = 0, groups = ceil_div(rows, ROWS); groups; groups--) {
        const int count = ceil_div(rows - row, groups);
        group<ROWS>(count, x + row * ldx, ldx, source, k, half, &out->sums[row][half * LANES]);
        row += count;
      }
    }
  }

  // sums[o][t]: row o of a matrix [16][k] times state t of a tile [k][16].
  INLINE void multiply_16(const T* matrix, const float* tile, int k, float (*sums)[LANES]) {
    constexpr int OUTPUTS = ROWS >= 8 ? 8 : 4, LINE = 64 / sizeof(T);
    const T* next = matrix + (size_t)LANES * k;
    for (int row = 0; row < LANES; row += OUTPUTS) {
      const T* const rows = matrix + (size_t)row * k;
      Floats totals[OUTPUTS];
      for (int o = 0; o < OUTPUTS; o++) totals[o] = zero();
      for (int line = 0; line < k; line += LINE) {
        for (int o = 0; o < OUTPUTS; o++) prefetch_far(next + (size_t)(row + o) * k + line);
        const int end = line + LINE < k ? line + LINE : k;
        for (int i = line; i < end; i++) {
          const Floats states = load(tile + (size_t)i * LANES);
#pragma GCC unroll 8
          for (int o = 0; o < OUTPUTS; o++)
            totals[o] = fma(states, set(float_of(rows[(size_t)o * k + i])), totals[o]);
        }
      }
      for (int o = 0; o < OUTPUTS; o++) store(sums[row + o], totals[o]);
    }
  }

  // Packs the elements i..i + 16 of 16 states for `multiply_16`. columns: one vector a state.
  static constexpr int PACK_INPUTS = LANES;
  INLINE Floats load_packed(const T* state) { return E::load(state); }

  // What a dot product takes at once.
  using Dims = Floats;
  static constexpr int DIMS = LANES;
  INLINE Dims load_activations(const float* p) { return load(p); }
  INLINE Dims load_activations(const float* p, int count) { return load(p, first(count)); }
  INLINE Dims load_weights(const T* p) { return E::load(p); }
  INLINE Dims load_weights(const T* p, int count) { return E::load(p, first(count)); }
  INLINE Floats dot(Dims a, Dims b, Floats sums) { return fma(a, b, sums); }

 private:
  INLINE float float_of(float x) { return x; }
  INLINE float float_of(uint16_t x) {
    const uint32_t word = (uint32_t)x << 16;
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
  }

  template <int M, class Source>
  INLINE void group(int count, const float* x, size_t ldx, Source& source, int k, int half,
                    float* out) {
    if constexpr (M > 1)
      if (count < M) return group<M - 1>(count, x, ldx, source, k, half, out);
    rows<M>(x, ldx, source, k, half, out);
  }

  template <int M, class Source>
  static void rows(const float* x, size_t ldx, Source& source, int k, int half, float* out) {
    Floats sums[M][PANELS];
    for (int m = 0; m < M; m++)
      for (int p = 0; p < PANELS; p++) sums[m][p] = zero();
    for (int i = 0; i < k; i += K_STEP) {
      const T* tiles[PANELS];
      for (int p = 0; p < PANELS; p++) tiles[p] = source.tile(i, half + p);
      if constexpr (E::half) {
        for (int j = 0; j < K_STEP; j += 2) {
          Ints words[PANELS];
          for (int p = 0; p < PANELS; p++) words[p] = load_ints(tiles[p] + j * LANES);
          Floats weights[PANELS];
          for (int p = 0; p < PANELS; p++) weights[p] = even_halves(words[p]);
          add_products<M>(x + i + j, ldx, weights, sums);
          for (int p = 0; p < PANELS; p++) weights[p] = odd_halves(words[p]);
          add_products<M>(x + i + j + 1, ldx, weights, sums);
        }
      } else {
        for (int j = 0; j < K_STEP; j++) {
          Floats weights[PANELS];
          for (int p = 0; p < PANELS; p++) weights[p] = load(tiles[p] + j * LANES);
          add_products<M>(x + i + j, ldx, weights, sums);
        }
      }
    }
    for (int m = 0; m < M; m++)
      for (int p = 0; p < PANELS; p++) store(out + m * BLOCK_COLS + p * LANES, sums[m][p]);
  }

  // One input of M rows.
  template <int M>
  INLINE void add_products(const float* x, size_t ldx, const Floats (&weights)[PANELS],
                           Floats (&sums)[M][PANELS]) {
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      const Floats input = set(x[m * ldx]);
      for (int p = 0; p < PANELS; p++) sums[m][p] = fma(weights[p], input, sums[m][p]);
    }
  }
};

}  // namespace lorastack::LORASTACK_ISA
