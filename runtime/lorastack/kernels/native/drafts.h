// Medusa heads, from the states of a step's rows to the best tokens of each head.
//
// The matrices are read as they lie in the adapter, row by row: 16 rows times 16 states at a time, each
// sum over the inputs in order. The states are packed before each phase, like matmul.h's weights: in
// bfloat16 [K/2][16][2], in float32 [K][16].
#pragma once

#include <math.h>
#include <omp.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "draft.h"

#include "lora.h"
#include "matmul.h"

namespace lorastack::LORASTACK_ISA {

// A matrix [outputs][hidden] and the states that it multiplies, `stride` elements apart. The results
// are those of the tokens first, first + step, ...
template <class T>
struct Product {
  const T *matrix, *bias;
  const int64_t* ids;
  const T* states;
  size_t stride;
  int outputs, count, first, step;
  int tile = 0;  // of 16 packed states, where its own begin
  int mass = 0;  // of a tile's strips, where its own begin

  int tiles() const { return ceil_div(count, LANES); }
  int strips() const { return ceil_div(outputs, LANES); }
};

// The products of one phase.
template <class T>
struct Products {
  std::vector<Product<T>> all;
  int tiles = 0, strips = 0, masses = 0;  // strip: 16 rows of a matrix

  void add(Product<T> product) {
    if (!product.count) return;
    product.tile = tiles;
    product.mass = masses;
    tiles += product.tiles();
    strips += product.strips();
    masses += product.tiles() * product.strips();
    all.push_back(product);
  }

  // The product that has tile `tile` of all; `tile` becomes the product's own number of it.
  const Product<T>& with_tile(int& tile) const {
    const Product<T>* product = all.data();
    for (; tile >= product->tiles(); product++) tile -= product->tiles();
    return *product;
  }

  const Product<T>& with_strip(int& strip) const {
    const Product<T>* product = all.data();
    for (; strip >= product->strips(); product++) strip -= product->strips();
    return *product;
  }
};

// What 16 states' logits of one strip come to: sum(e^logit) = total e^peak. A logit that is not finite
// makes the total NaN.
struct alignas(64) Mass {
  float peak[LANES], total[LANES];
};

// e^(logit - peak) to 3e-6; NaN for a logit that is not finite. peak: not below a finite logit.
INLINE __m512 share_512(__m512 logit, __m512 peak) {
  const __m512 x = _mm512_mul_ps(_mm512_sub_ps(logit, peak), _mm512_set1_ps(1.44269504f));
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEG_INF);
  const __m512 f = _mm512_sub_ps(x, n);  // of minus infinity NaN
  __m512 p = _mm512_set1_ps(0.0135341659f);  // 2^f on [0, 1], of least relative error
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.0520114712f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.241442740f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.693003833f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.00000262f));
  // A scale of minus infinity would make NaN 0.
  return _mm512_scalef_ps(p, _mm512_max_ps(n, _mm512_set1_ps(-200.0f)));
}

// A proposal. place: which of the outputs.
struct Candidate {
  float value = -INFINITY;
  int32_t place = INT32_MAX;

  bool before(const Candidate& other) const {
    return value > other.value || (value == other.value && place < other.place);
  }
};

// Takes its place among the `num` best, in any order of arrival.
INLINE void offer(Candidate* best, int num, Candidate found) {
  if (!found.before(best[num - 1])) return;
  int at = num - 1;
  for (; at > 0 && found.before(best[at - 1]); at--) best[at] = best[at - 1];
  best[at] = found;
}

// For those lanes of 16 values that may be among the best of their list.
template <class Take>
INLINE void for_better(__m512 values, __m512 least, __mmask16 real, Take&& take) {
  values = _mm512_max_ps(values, _mm512_set1_ps(-INFINITY));  // instead of NaN
  unsigned better = _mm512_mask_cmp_ps_mask(real, values, least, _CMP_GE_OQ);
  if (!better) return;
  alignas(64) float found[LANES];
  _mm512_store_ps(found, values);
  for (; better; better &= better - 1) {
    const int lane = __builtin_ctz(better);
    take(lane, found[lane]);
  }
}

// The best; where there are fewer outputs, the first again. peak, total: see Mass, of all outputs.
INLINE void write_best(const Candidate* best, int num, const int64_t* ids, float peak, float total,
                       int64_t* out, float* logprobs) {
  const float log_total = logf(total);
  for (int i = 0; i < num; i++) {
    const Candidate& found = best[i].place == INT32_MAX ? best[0] : best[i];
    out[i] = ids ? ids[found.place] : found.place;
    logprobs[i] = found.value - peak - log_total;
  }
}

// sums[o][t]: row o of a matrix times state t of packed ones, 16 by 16.
template <class Isa>
INLINE void multiply_16(const typename Isa::E::T* matrix, const typename Isa::E::T* tile, int k,
                        float (*sums)[LANES]) {
  using E = typename Isa::E;
  using T = typename E::T;
  constexpr int LINE = 64 / sizeof(T);
  const T* next = matrix + (size_t)LANES * k;
#ifdef __AMX_BF16__
  if constexpr (Isa::tiles) {
    _tile_zero(0);
    for (int i = 0; i < k; i += LINE) {
      for (int o = 0; o < LANES; o++) _mm_prefetch(next + (size_t)o * k + i, _MM_HINT_T1);
      _tile_loadd(1, matrix + i, k * (int)sizeof(T));
      _tile_loadd(2, tile + (size_t)i * LANES, 64);
      _tile_dpbf16ps(0, 1, 2);
    }
    _tile_stored(0, sums, sizeof sums[0]);
    return;
  }
#endif
  constexpr int ROWS = 8, STEP = 4 / sizeof(T);
  for (int row = 0; row < LANES; row += ROWS) {
    const T* const rows = matrix + (size_t)row * k;
    __m512 found[ROWS];
    for (int o = 0; o < ROWS; o++) found[o] = _mm512_setzero_ps();
    for (int line = 0; line < k; line += LINE) {
      for (int o = 0; o < ROWS; o++)
        _mm_prefetch(next + (size_t)(row + o) * k + line, _MM_HINT_T1);
      for (int i = line; i < line + LINE; i += STEP) {
        const __m512 states = _mm512_loadu_ps(tile + (size_t)i * LANES);
#pragma GCC unroll 8
        for (int o = 0; o < ROWS; o++) {
          int word;
          memcpy(&word, rows + (size_t)o * k + i, 4);
          const __m512i weight = _mm512_set1_epi32(word);
          if constexpr (E::half)
            found[o] = _mm512_dpbf16_ps(found[o], (__m512bh)states, (__m512bh)weight);
          else
            found[o] = _mm512_fmadd_ps(states, _mm512_castsi512_ps(weight), found[o]);
        }
      }
    }
    for (int o = 0; o < ROWS; o++) _mm512_store_ps(sums[row + o], found[o]);
  }
}

struct alignas(64) Line {
  char bytes[64];
};

// What the threads share.
template <class T>
struct DraftPlan {
  std::vector<Products<T>> blocks;
  Products<T> outputs;
  std::vector<Line> packed;            // tiles of the phase at hand
  std::vector<Line> spare;             // a thread's last few rows of a matrix
  std::vector<Candidate> best;         // [threads][tiles of outputs][16][num]
  std::vector<float> least;            // of each list
  std::vector<Mass> masses;            // [tiles of outputs][strips]
  size_t tile_lines, num_lists;

  DraftPlan(const lorastack_draft& draft) {
    const int size = draft.hidden;
    const size_t square = (size_t)size * size;
    T* const states = (T*)draft.states;
    int first = 0;
    for (int g = 0; g < draft.num_groups; g++) {
      const lorastack_heads& heads = draft.groups[g];
      const T *weight = (const T*)heads.weight, *bias = (const T*)heads.bias;
      const T* const output = (const T*)heads.output;
      const int rows = heads.end - heads.begin, num = heads.heads;
      if ((int)blocks.size() < heads.blocks) blocks.resize(heads.blocks);
      // All heads' first blocks read the same states.
      blocks[0].add({weight, bias, nullptr, (const T*)draft.x + (size_t)heads.begin * size,
                     (size_t)size, num * size, rows, first, num});
      for (int at = num; at < heads.blocks * num; at++) {
        const int token = first + at % num;
        blocks[at / num].add({weight + at * square, bias + (size_t)at * size, nullptr,
                              states + (size_t)token * size, (size_t)num * size, size, rows, token,
                              num});
      }
      const size_t matrix = (size_t)heads.outputs * size;
      for (int head = 0; draft.candidates && head < (heads.own ? num : 1); head++) {
        const int step = heads.own ? num : 1;
        outputs.add({output + head * matrix, nullptr, heads.ids,
                     states + (size_t)(first + head) * size, (size_t)step * size, heads.outputs,
                     heads.own ? rows : rows * num, first + head, step});
      }
      first += rows * num;
    }
    int tiles = outputs.tiles;
    for (const Products<T>& each : blocks) tiles = std::max(tiles, each.tiles);
    tile_lines = (size_t)size * LANES * sizeof(T) / sizeof(Line);
    packed.resize(tiles * tile_lines);
    spare.resize(draft.num_threads * tile_lines);
    num_lists = (size_t)outputs.tiles * LANES;
    best.resize(draft.num_threads * num_lists * draft.num);
    least.resize(draft.num_threads * num_lists, -INFINITY);
    masses.resize(outputs.masses);
  }
};

template <class Isa>
struct Drafting {
  using E = typename Isa::E;
  using T = typename E::T;
  const lorastack_draft& draft;
  DraftPlan<T>& plan;
  const int thread;
  Member member;

  T* packed(int tile) { return (T*)(plan.packed.data() + tile * plan.tile_lines); }

  // Tile `index` of a product: 16 words of 16 states at a time, transposed.
  void pack(const Product<T>& product, int index) {
    constexpr int WORDS = 4 / sizeof(T) * LANES;  // elements
    const int begin = index * LANES, count = std::min(product.count - begin, LANES);
    T* const tile = packed(product.tile + index);
    for (int i = 0; i < draft.hidden; i += WORDS) {
      __m512 words[LANES];
      for (int t = 0; t < LANES; t++)
        words[t] = t < count ? _mm512_loadu_ps(product.states + (begin + t) * product.stride + i)
                             : _mm512_setzero_ps();
      transpose_16(words);
      for (int w = 0; w < LANES; w++)
        _mm512_store_ps(tile + (size_t)i * LANES + w * WORDS, words[w]);
    }
  }

  // 16 rows of a matrix, or what is left of it, times all its states.
  template <class Epilogue>
  void multiply(const Product<T>& product, int row, Epilogue&& epilogue) {
    const int size = draft.hidden, rows = std::min(product.outputs - row, LANES);
    const T* matrix = product.matrix + (size_t)row * size;
    if (rows < LANES) {
      T* const spare = (T*)(plan.spare.data() + thread * plan.tile_lines);
      memcpy(spare, matrix, (size_t)rows * size * sizeof(T));
      matrix = spare;
    }
    for (int index = 0; index * LANES < product.count; index++) {
      alignas(64) float sums[LANES][LANES];
      multiply_16<Isa>(matrix, packed(product.tile + index), size, sums);
      epilogue(product, row, rows, index, sums);
    }
  }

  template <class Epilogue>
  void run_phase(const Products<T>& products, Epilogue&& epilogue) {
    member.phase(products.tiles, [&](int tile) {
      const Product<T>& product = products.with_tile(tile);
      pack(product, tile);
    });
    member.phase(products.strips, [&](int strip) {
      const Product<T>& product = products.with_strip(strip);
      multiply(product, strip * LANES, epilogue);
    });
  }

  // r + SiLU(W r + b), 16 values of 16 states; hidden is a multiple of 16, so of one head.
  void finish_block(const Product<T>& product, int row, int index, float (*sums)[LANES]) {
    const int begin = index * LANES, count = std::min(product.count - begin, LANES);
    const int head = row / draft.hidden, column = row % draft.hidden;
    const __m512 bias = E::load(product.bias + row);
    __m512 values[LANES];
    for (int o = 0; o < LANES; o++) values[o] = _mm512_load_ps(sums[o]);
    transpose_16(values);
    for (int t = 0; t < count; t++) {
      const int token = product.first + (begin + t) * product.step + head;
      const __m512 old = E::load(product.states + (begin + t) * product.stride + column);
      E::store((T*)draft.states + (size_t)token * draft.hidden + column,
               _mm512_add_ps(old, silu_512(_mm512_add_ps(values[t], bias))));
    }
  }

  // Weighs `rows` outputs from `row` on and offers them to the lists of 16 states.
  void choose(const Product<T>& product, int row, int rows, int index, float (*sums)[LANES]) {
    __m512 peak = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
    for (int o = 0; o < rows; o++) peak = _mm512_max_ps(_mm512_load_ps(sums[o]), peak);
    for (int o = 0; o < rows; o++)
      total = _mm512_add_ps(total, share_512(_mm512_load_ps(sums[o]), peak));
    Mass& mass = masses(product, index)[row / LANES];
    _mm512_store_ps(mass.peak, peak);
    _mm512_store_ps(mass.total, total);
    const __mmask16 real = first(product.count - index * LANES);
    const size_t list = thread * plan.num_lists + (size_t)(product.tile + index) * LANES;
    float* const least = plan.least.data() + list;
    const __m512i lines = _mm512_mullo_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
        _mm512_set1_epi32(LANES));
    unsigned better = _mm512_mask_cmp_ps_mask(real, peak, _mm512_loadu_ps(least), _CMP_GE_OQ);
    for (; better; better &= better - 1) {
      const int t = __builtin_ctz(better);
      Candidate* const best = plan.best.data() + (list + t) * draft.num;
      const __m512 column = _mm512_i32gather_ps(lines, sums[0] + t, sizeof(float));
      for_better(column, _mm512_set1_ps(least[t]), first(rows),
                 [&](int o, float value) { offer(best, draft.num, {value, row + o}); });
      least[t] = best[draft.num - 1].value;
    }
  }

  // The best of all threads' lists, for the 16 states of a tile, and the masses of all strips.
  void merge(const Product<T>& product, int index) {
    const Mass all = sum(product, index);
    const int begin = index * LANES, count = std::min(product.count - begin, LANES);
    for (int t = 0; t < count; t++) {
      const size_t list = (size_t)(product.tile + index) * LANES + t;
      Candidate* const best = plan.best.data() + list * draft.num;
      for (int other = 1; other < draft.num_threads; other++) {
        const Candidate* const found = best + other * plan.num_lists * draft.num;
        for (int i = 0; i < draft.num; i++) offer(best, draft.num, found[i]);
      }
      const size_t at = (product.first + (size_t)(begin + t) * product.step) * draft.num;
      write_best(best, draft.num, product.ids, all.peak[t], all.total[t], draft.candidates + at,
                 draft.logprobs + at);
    }
  }

  // In the order of strips, whoever weighed them.
  Mass sum(const Product<T>& product, int index) {
    const Mass* const strips = masses(product, index);
    __m512 peak = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
    for (int strip = 0; strip < product.strips(); strip++)
      peak = _mm512_max_ps(_mm512_load_ps(strips[strip].peak), peak);
    for (int strip = 0; strip < product.strips(); strip++) {
      const __m512 scale = share_512(_mm512_load_ps(strips[strip].peak), peak);
      total = _mm512_fmadd_ps(_mm512_load_ps(strips[strip].total), scale, total);
    }
    Mass all;
    _mm512_store_ps(all.peak, peak);
    _mm512_store_ps(all.total, total);
    return all;
  }

  // Of each strip with tile `index`.
  Mass* masses(const Product<T>& product, int index) {
    return plan.masses.data() + product.mass + (size_t)index * product.strips();
  }

  void run() {
    begin_tiles<Isa>();
    for (const Products<T>& block : plan.blocks)
      run_phase(block, [&](const Product<T>& product, int row, int, int index,
                           float (*sums)[LANES]) { finish_block(product, row, index, sums); });
    run_phase(plan.outputs, [&](const Product<T>& product, int row, int rows, int index,
                                float (*sums)[LANES]) { choose(product, row, rows, index, sums); });
    end_tiles<Isa>();
    member.phase(plan.outputs.tiles, [&](int tile) {
      const Product<T>& product = plan.outputs.with_tile(tile);
      merge(product, tile);
    });
  }
};

template <class Isa>
void draft_with(const lorastack_draft& draft) {
  DraftPlan<typename Isa::E::T> plan(draft);
  const int64_t phases = 2 * (int64_t)plan.blocks.size() + 3;
  std::vector<Counter> counters(num_counters(phases, draft.num_threads));
  Team team{counters.data(), draft.num_threads};
#pragma omp parallel num_threads(draft.num_threads)
  {
    const int thread = omp_get_thread_num();
    Drafting<Isa>{draft, plan, thread, Member(team, thread)}.run();
  }
}

INLINE void top_of(const float* row, int columns, int num, int64_t* places, float* logprobs) {
  std::vector<Candidate> best(num);
  for (int i = 0; i < columns; i += LANES) {
    const __mmask16 real = first(columns - i);
    for_better(_mm512_maskz_loadu_ps(real, row + i), _mm512_set1_ps(best[num - 1].value), real,
               [&](int lane, float value) { offer(best.data(), num, {value, i + lane}); });
  }
  const __m512 peak = _mm512_set1_ps(best[0].value);
  __m512 total = _mm512_setzero_ps();
  for (int i = 0; i < columns; i += LANES) {
    const __mmask16 real = first(columns - i);
    const __m512 logits = _mm512_maskz_loadu_ps(real, row + i);
    total = _mm512_mask_add_ps(total, real, total, share_512(logits, peak));
  }
  write_best(best.data(), num, nullptr, best[0].value, _mm512_reduce_add_ps(total), places,
             logprobs);
}

}  // namespace lorastack::LORASTACK_ISA

// The entry point of one instruction set, for dispatch.cpp.
#define LORASTACK_EXPORT_DRAFT(name, Isa)                                 \
  namespace lorastack::name {                                             \
  void run_draft(const lorastack_draft& draft) { draft_with<Isa>(draft); } \
  }
