// Multiplication without dot products of bfloat16: weights of any kind are widened to float32 on their
// way into a fused multiply-add. Activations are float32.
#pragma once

#include <algorithm>

#include "quantised.h"
#include "untiled.h"

namespace lorastack::LORASTACK_ISA {

constexpr int LINE = 64;
constexpr int AHEAD = 2048;  // bytes ahead of the weights being read

// A panel as it is multiplied. BYTES: of K_STEP inputs, a tile; weights<J>(k): of input k + J, where k
// is a multiple of STRIDE and J below it.
template <class T>
struct WeightPanel {
  static constexpr int BYTES = K_STEP * LANES * sizeof(T), STRIDE = 2;
  const T* at;

  INLINE_METHOD const char* address() const { return (const char*)at; }
  INLINE_METHOD void begin_tile() {}
  INLINE_METHOD void skip(int k) { at += (size_t)k * LANES; }

  template <int J>
  INLINE_METHOD Floats weights(int k) const {
    if constexpr (sizeof(T) == sizeof(float)) {
      return load(at + (size_t)(k + J) * LANES);
    } else {
      const Ints words = load_ints(at + (size_t)k * LANES);
      return J ? odd_halves(words) : even_halves(words);
    }
  }
};

// The sums are scaled afterwards.
struct Int8Panel {
  static constexpr int BYTES = Int8::BYTES, STRIDE = 2;
  const uint8_t* at;

  INLINE_METHOD const char* address() const { return (const char*)at; }
  INLINE_METHOD void begin_tile() {}
  INLINE_METHOD void skip(int k) { at += (size_t)k * LANES; }

  template <int J>
  INLINE_METHOD Floats weights(int k) const {
    return Int8::floats(at + (size_t)(k + J) * LANES);
  }
};

struct Int4Panel {
  static constexpr int BYTES = Int4::BYTES, STRIDE = 8;
  const uint8_t* at;
  const uint16_t* scales;
  alignas(64) float tile_scales[LANES] = {};

  INLINE_METHOD const char* address() const { return (const char*)at; }
  INLINE_METHOD void skip(int k) {
    at += (size_t)k * LANES / 2;
    scales += (size_t)k / K_STEP * LANES;
  }

  template <int J>
  INLINE_METHOD Floats weights(int k) const {
    return mul(nibbles<J>(load_ints(at + (size_t)k * LANES / 2)), load(tile_scales));
  }
  INLINE_METHOD void begin_tile() { store(tile_scales, load_halves(scales)); }
};

// Element: of weights and KV. ROWS by PANELS sums stay in registers; attention takes QUERIES at
// once, with SUMS for their values.
template <class Element, int ROWS, int PANELS, int QUERIES, int SUMS>
struct Wide : Untiled<Wide<Element, ROWS, PANELS, QUERIES, SUMS>> {
  using E = Element;  // of weights, KV, LoRAs and heads
  using A = F32;      // of activations
  using T = typename E::T;
  using Packed = float;  // heads' states, see `multiply_16`
  static constexpr int MAX_QUERIES = QUERIES, VALUE_SUMS = SUMS;
  static constexpr bool PADS_STATES = true;  // lm_head's rows are copied into padded activations

  // Rows of float32 inputs that stay in the second cache, beside the weights: whole blocks.
  INLINE int rows_in_cache(int k) {
    constexpr int BYTES = 256 << 10;
    return std::max(1, BYTES / (k * (int)sizeof(float)) / BLOCK_ROWS) * BLOCK_ROWS;
  }

  // Calls work(first panel of the pair, whether it is to be fetched). int8 is cheap to decode for every
  // group of rows, int4 is unpacked where there is more than one.
  template <class Work>
  INLINE void with_panels(const lorastack_matrix& matrix, int pair, int rows, T* unpacked,
                          Work&& work) {
    if constexpr (E::half) {
      if (matrix.kind == LORASTACK_INT8) {
        const CodePanel<Int8> codes(matrix, 2 * pair);
        return work(Int8Panel{codes.codes}, true);
      }
      if (matrix.kind == LORASTACK_INT4 && rows <= ROWS) {
        const CodePanel<Int4> codes(matrix, 2 * pair);
        return work(Int4Panel{codes.codes, codes.scales}, true);
      }
      if (matrix.kind == LORASTACK_INT4) {
        unpack_pair<Int4>(matrix, pair, unpacked);
        return work(WeightPanel<T>{unpacked}, false);
      }
    }
    work(WeightPanel<T>{(const T*)matrix.weight + (size_t)pair * matrix.k * BLOCK_COLS}, true);
  }

  // fetch: nobody has read these panels before.
  template <class Panel>
  INLINE void block(const float* x, size_t ldx, int rows, Panel panel, int k, bool fetch,
                    Block* out) {
    constexpr int LINES = Panel::BYTES / LINE;
    const int groups = ceil_div(rows, ROWS), panel_bytes = k / K_STEP * Panel::BYTES;
    for (int half = 0; half < 2; half += PANELS, panel.skip(k * PANELS)) {
      // Many groups fetch the next panels together, a part of every tile each, so that memory is read
      // all the time; few are as fast with the first one reading ahead.
      const bool spread = groups > 2;
      for (int row = 0, g = 0; g < groups; g++) {
        int count = ceil_div(rows - row, groups - g);
        if (count > 6) count = std::min(count + count % 2, rows - row);  // see `with_rows`
        Fetch ahead = {AHEAD, 0, g == 0 ? LINES : 0};
        if (spread) ahead = {panel_bytes * PANELS, LINES * g / groups, LINES * (g + 1) / groups};
        if (!fetch) ahead.end = ahead.first;
        float* const sums = &out->sums[row][half * LANES];
        with_rows<ROWS>(count, [&](auto num, int first) INLINE_LAMBDA {
          add_products<num.value>(x + (row + first) * ldx, ldx, panel, k, ahead,
                                  sums + first * BLOCK_COLS);
        });
        row += count;
      }
    }
  }

  // sums[o][t]: row o of a matrix [16][k] times state t of a tile [k][16]; k is even.
  INLINE void multiply_16(const T* matrix, const float* tile, int k, float (*sums)[LANES]) {
    constexpr int OUTPUTS = ROWS >= 8 ? 8 : ROWS >= 4 ? 4 : 2;
    for (int row = 0; row < LANES; row += OUTPUTS)
      multiply_states<OUTPUTS>(matrix + (size_t)row * k, tile, k, sums + row);
  }

  // The inputs of a state that `pack` takes at once.
  static constexpr int PACK_INPUTS = LANES;
  INLINE Floats load_packed(const T* state) { return E::load(state); }
  // Two inputs of 16 states into a tile, rounded to the states' type.
  INLINE void store_pair(float* tile, Floats even, Floats odd) {
    store(tile, E::rounded(even));
    store(tile + LANES, E::rounded(odd));
  }

  // What a dot product takes at once.
  using Dims = Floats;
  static constexpr int DIMS = LANES;
  INLINE Dims load_activations(const float* p) { return load(p); }
  INLINE Dims load_activations(const float* p, int count) { return load(p, first(count)); }
  INLINE Dims load_weights(const T* p) { return E::load(p); }
  INLINE Dims load_weights(const T* p, int count) { return E::load(p, first(count)); }
  INLINE Floats dot(Dims a, Dims b, Floats sums) { return fma(a, b, sums); }

 private:
  // What a group of rows fetches with each tile: lines first..end, so many bytes ahead.
  struct Fetch {
    int distance, first, end;
  };

  // Calls work(count, first) with constant counts that make up `count`. Above 6 rows only every other
  // count is compiled, and a row is left for a second call.
  template <int M, class Work>
  INLINE void with_rows(int count, Work&& work) {
    if constexpr (M > 1)
      if (count < M) return with_rows<(M > 6 ? M - 2 : M - 1)>(count, work);
    work(std::integral_constant<int, M>{}, 0);
    if constexpr (M >= 6)
      if (count > M) work(std::integral_constant<int, 1>{}, M);
  }

  // sums[m] = x[m] times the panels, in the order of the inputs. Not inlined: next to other code GCC
  // keeps sums in memory.
  template <int M, class Panel>
  __attribute__((noinline)) static void add_products(const float* x, size_t ldx, Panel panel, int k,
                                                     Fetch ahead, float* out) {
    constexpr int INPUTS = 8;  // that are unrolled
    Panel panels[PANELS];
    unroll<PANELS>([&](auto p) INLINE_LAMBDA {
      panels[p] = panel;
      panels[p].skip(k * p);
    });
    Floats sums[M * PANELS];
    unroll<M * PANELS>([&](auto i) INLINE_LAMBDA { sums[i] = zero(); });
    for (int i = 0; i < k; i += K_STEP, x += K_STEP) {
      unroll<PANELS>([&](auto p) INLINE_LAMBDA { panels[p].begin_tile(); });
      for (int line = ahead.first; line < ahead.end; line++)
        unroll<PANELS>([&](auto p) INLINE_LAMBDA {
          prefetch(panels[p].address() + ahead.distance + line * LINE);
        });
      for (int j = 0; j < K_STEP; j += INPUTS)
        unroll<INPUTS>([&](auto input) INLINE_LAMBDA {
          constexpr int J = input % Panel::STRIDE;
          Floats weights[PANELS];
          unroll<PANELS>([&](auto p) INLINE_LAMBDA {
            weights[p] = panels[p].template weights<J>(j + input - J);
          });
          unroll<M>([&](auto m) INLINE_LAMBDA {
            const Floats b = set(x[m * ldx + j + input]);
            unroll<PANELS>([&](auto p) INLINE_LAMBDA {
              sums[m * PANELS + p] = fma(weights[p], b, sums[m * PANELS + p]);
            });
          });
          read_nothing_ahead();
        });
      unroll<PANELS>([&](auto p) INLINE_LAMBDA { panels[p].skip(K_STEP); });
    }
    unroll<M>([&](auto m) INLINE_LAMBDA {
      unroll<PANELS>([&](auto p) INLINE_LAMBDA {
        store(out + m * BLOCK_COLS + p * LANES, sums[m * PANELS + p]);
      });
    });
  }

  template <int OUTPUTS>
  __attribute__((noinline)) static void multiply_states(const T* rows, const float* tile, int k,
                                                        float (*out)[LANES]) {
    constexpr int INPUTS = LINE / sizeof(T), STEP = 4 / sizeof(T);
    Floats sums[OUTPUTS];
    unroll<OUTPUTS>([&](auto o) INLINE_LAMBDA { sums[o] = zero(); });
    for (int line = 0; line < k; line += INPUTS) {
      for (int o = 0; o < OUTPUTS; o++)
        prefetch_far(rows + (size_t)(LANES + o) * k + line);
      const int end = line + INPUTS < k ? line + INPUTS : k;
      for (int i = line; i < end; i += STEP)
        unroll<STEP>([&](auto input) INLINE_LAMBDA {
          const Floats states = load(tile + (size_t)(i + input) * LANES);
          unroll<OUTPUTS>([&](auto o) INLINE_LAMBDA {
            sums[o] = fma(states, weight<input.value>(rows + (size_t)o * k + i), sums[o]);
          });
        });
    }
    unroll<OUTPUTS>([&](auto o) INLINE_LAMBDA { store(out[o], sums[o]); });
  }

  // Element J of a word, in every lane.
  template <int J>
  INLINE Floats weight(const T* word) {
    int bits;
    memcpy(&bits, word, sizeof bits);
    if constexpr (!E::half) return from_bits(set(bits));
    return J ? odd_halves(set(bits)) : even_halves(set(bits));
  }
};

}  // namespace lorastack::LORASTACK_ISA
