// Medusa heads, from the states of a step's rows to the best tokens of each head.
//
// The matrices are read as they lie in the adapter, row by row: 16 rows times 16 states at a time, each
// sum over the inputs in order. The states are packed before each phase, like matmul.h's weights: in
// bfloat16 [K/2][16][2], in float32 [K][16]. The logits are kept by state, to be looked through.
#pragma once

#include <math.h>
#include <omp.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "abi.h"

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
  int tile = 0;       // its first tile of 16 packed states
  size_t logits = 0;  // where its own begin among all logits: [count][outputs]

  int tiles() const { return ceil_div(count, LANES); }
  int strips() const { return ceil_div(outputs, LANES); }  // of 16 rows of the matrix
};

// The products of one phase.
template <class T>
struct Products {
  std::vector<Product<T>> all;
  int tiles = 0, strips = 0, states = 0;
  size_t logits = 0;

  void add(Product<T> product) {
    if (!product.count) return;
    product.tile = tiles;
    product.logits = logits;
    tiles += product.tiles();
    strips += product.strips();
    states += product.count;
    logits += (size_t)product.count * product.outputs;
    all.push_back(product);
  }

  // The product that holds item `index` of all, where `count` gives a product's items. `index`
  // becomes the item's number in the product.
  template <class Count>
  const Product<T>& find(int& index, Count&& count) const {
    const Product<T>* product = all.data();
    for (; index >= count(*product); product++) index -= count(*product);
    return *product;
  }
};

// One of a head's best outputs. value: its logit; place: its row of the output matrix.
struct TopToken {
  float value = -INFINITY;
  int32_t place = INT32_MAX;

  bool before(const TopToken& other) const {
    return value > other.value || (value == other.value && place < other.place);
  }
};

// Inserts a token into the `num` best; tokens may come in any order.
INLINE void offer(TopToken* best, int num, TopToken token) {
  if (!token.before(best[num - 1])) return;
  int at = num - 1;
  for (; at > 0 && token.before(best[at - 1]); at--) best[at] = best[at - 1];
  best[at] = token;
}

// e^(logit - peak) to 3e-6; NaN for a logit that is not finite. peak: not below a finite logit.
INLINE __m512 share_512(__m512 logit, __m512 peak) {
  const __m512 x = _mm512_mul_ps(_mm512_sub_ps(logit, peak), _mm512_set1_ps(1.44269504f));
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEG_INF);
  const __m512 f = _mm512_sub_ps(x, n);  // NaN for minus infinity
  __m512 p = _mm512_set1_ps(0.0135341659f);  // 2^f on [0, 1], of least relative error
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.0520114712f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.241442740f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.693003833f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.00000262f));
  // Minus infinity would make NaN 0, and a result below 2^-126 costs a hundred cycles.
  return _mm512_scalef_ps(p, _mm512_max_ps(n, _mm512_set1_ps(-126.0f)));
}

// The `num` best of a row of logits and their log-probabilities, see abi.h. ids: of the columns, or
// null.
INLINE void top_of(const float* row, int columns, int num, const int64_t* ids, int64_t* out,
                   float* logprobs) {
  std::vector<TopToken> best(num);
  for (int i = 0; i < columns; i += LANES) {
    const __mmask16 real = first(columns - i);
    const __m512 least = _mm512_set1_ps(best[num - 1].value);
    const __m512 logits = _mm512_max_ps(_mm512_maskz_loadu_ps(real, row + i),
                                        _mm512_set1_ps(-INFINITY));  // instead of NaN
    unsigned better = _mm512_mask_cmp_ps_mask(real, logits, least, _CMP_GE_OQ);
    if (!better) continue;
    alignas(64) float lanes[LANES];
    _mm512_store_ps(lanes, logits);
    for (; better; better &= better - 1) {
      const int lane = __builtin_ctz(better);
      offer(best.data(), num, {lanes[lane], i + lane});
    }
  }
  const __m512 peak = _mm512_set1_ps(best[0].value);
  __m512 total = _mm512_setzero_ps();
  for (int i = 0; i < columns; i += LANES) {
    const __mmask16 real = first(columns - i);
    const __m512 logits = _mm512_maskz_loadu_ps(real, row + i);
    total = _mm512_mask_add_ps(total, real, total, share_512(logits, peak));
  }
  const float log_total = logf(_mm512_reduce_add_ps(total));
  for (int i = 0; i < num; i++) {
    const TopToken& token = best[i].place == INT32_MAX ? best[0] : best[i];
    out[i] = ids ? ids[token.place] : token.place;
    logprobs[i] = token.value - best[0].value - log_total;
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
    __m512 totals[ROWS];
    for (int o = 0; o < ROWS; o++) totals[o] = _mm512_setzero_ps();
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
            totals[o] = _mm512_dpbf16_ps(totals[o], (__m512bh)states, (__m512bh)weight);
          else
            totals[o] = _mm512_fmadd_ps(states, _mm512_castsi512_ps(weight), totals[o]);
        }
      }
    }
    for (int o = 0; o < ROWS; o++) _mm512_store_ps(sums[row + o], totals[o]);
  }
}

struct alignas(64) Line {
  char bytes[64];
};

// What the threads share.
template <class T>
struct HeadsPlan {
  std::vector<Products<T>> blocks;
  Products<T> outputs;
  std::vector<Line> packed;         // tiles of the current phase
  std::vector<Line> spare;          // for each thread: the last rows of a matrix, if fewer than 16
  std::unique_ptr<float[]> logits;  // of each output and state
  size_t tile_lines;

  HeadsPlan(const lorastack_proposal& proposal) {
    const int size = proposal.hidden;
    const size_t square = (size_t)size * size;
    T* const states = (T*)proposal.states;
    int first = 0;
    for (int g = 0; g < proposal.num_groups; g++) {
      const lorastack_heads& heads = proposal.groups[g];
      const T *weight = (const T*)heads.weight, *bias = (const T*)heads.bias;
      const T* const output = (const T*)heads.output;
      const int rows = heads.end - heads.start, num = heads.heads;
      if ((int)blocks.size() < heads.blocks) blocks.resize(heads.blocks);
      // All heads' first blocks read the same states.
      blocks[0].add({weight, bias, nullptr, (const T*)proposal.x + (size_t)heads.start * size,
                     (size_t)size, num * size, rows, first, num});
      for (int at = num; at < heads.blocks * num; at++) {
        const int token = first + at % num;
        blocks[at / num].add({weight + at * square, bias + (size_t)at * size, nullptr,
                              states + (size_t)token * size, (size_t)num * size, size, rows, token,
                              num});
      }
      const size_t matrix = (size_t)heads.outputs * size;
      for (int head = 0; proposal.tokens && head < (heads.own ? num : 1); head++) {
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
    spare.resize(proposal.num_threads * tile_lines);
    logits.reset(new float[outputs.logits]);
  }
};

template <class Isa>
struct ProposalWorker {
  using E = typename Isa::E;
  using T = typename E::T;
  const lorastack_proposal& proposal;
  HeadsPlan<T>& plan;
  const int thread;
  Member member;

  T* packed(int tile) { return (T*)(plan.packed.data() + tile * plan.tile_lines); }

  // Tile `index` of a product: 16 words of 16 states at a time, transposed.
  void pack(const Product<T>& product, int index) {
    constexpr int WORDS = 4 / sizeof(T) * LANES;  // elements
    const int begin = index * LANES, count = std::min(product.count - begin, LANES);
    T* const tile = packed(product.tile + index);
    for (int i = 0; i < proposal.hidden; i += WORDS) {
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
    const int size = proposal.hidden, rows = std::min(product.outputs - row, LANES);
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
      const Product<T>& product = products.find(tile, [](auto& each) { return each.tiles(); });
      pack(product, tile);
    });
    member.phase(products.strips, [&](int strip) {
      const Product<T>& product = products.find(strip, [](auto& each) { return each.strips(); });
      multiply(product, strip * LANES, epilogue);
    });
  }

  // Stores r + SiLU(W r + b): 16 values of 16 states, of one head since hidden is a multiple of 16.
  void finish_block(const Product<T>& product, int row, int index, float (*sums)[LANES]) {
    const int begin = index * LANES, count = std::min(product.count - begin, LANES);
    const int head = row / proposal.hidden, column = row % proposal.hidden;
    const __m512 bias = E::load(product.bias + row);
    __m512 values[LANES];
    for (int o = 0; o < LANES; o++) values[o] = _mm512_load_ps(sums[o]);
    transpose_16(values);
    for (int t = 0; t < count; t++) {
      const int token = product.first + (begin + t) * product.step + head;
      const __m512 old = E::load(product.states + (begin + t) * product.stride + column);
      E::store((T*)proposal.states + (size_t)token * proposal.hidden + column,
               _mm512_add_ps(old, silu_512(_mm512_add_ps(values[t], bias))));
    }
  }

  // Stores logits row..row + rows of 16 states.
  void keep(const Product<T>& product, int row, int rows, int index, float (*sums)[LANES]) {
    const int begin = index * LANES, count = std::min(product.count - begin, LANES);
    __m512 columns[LANES];
    for (int o = 0; o < LANES; o++) columns[o] = _mm512_load_ps(sums[o]);
    transpose_16(columns);
    for (int t = 0; t < count; t++)
      _mm512_mask_storeu_ps(logits_of(product, begin + t) + row, first(rows), columns[t]);
  }

  void choose(const Product<T>& product, int state) {
    const size_t at = (product.first + (size_t)state * product.step) * proposal.num;
    top_of(logits_of(product, state), product.outputs, proposal.num, product.ids,
           proposal.tokens + at, proposal.logprobs + at);
  }

  float* logits_of(const Product<T>& product, int state) {
    return plan.logits.get() + product.logits + (size_t)state * product.outputs;
  }

  void run() {
    begin_tiles<Isa>();
    for (const Products<T>& block : plan.blocks)
      run_phase(block, [&](const Product<T>& product, int row, int, int index,
                           float (*sums)[LANES]) { finish_block(product, row, index, sums); });
    run_phase(plan.outputs, [&](const Product<T>& product, int row, int rows, int index,
                                float (*sums)[LANES]) { keep(product, row, rows, index, sums); });
    end_tiles<Isa>();
    member.phase(plan.outputs.states, [&](int state) {
      const Product<T>& product =
          plan.outputs.find(state, [](auto& each) { return each.count; });
      choose(product, state);
    });
  }
};

template <class Isa>
void propose_with(const lorastack_proposal& proposal) {
  HeadsPlan<typename Isa::E::T> plan(proposal);
  const int64_t phases = 2 * (int64_t)plan.blocks.size() + 3;
  std::vector<Counter> counters(num_counters(phases, proposal.num_threads));
  Team team{counters.data(), proposal.num_threads};
#pragma omp parallel num_threads(proposal.num_threads)
  {
    const int thread = omp_get_thread_num();
    ProposalWorker<Isa>{proposal, plan, thread, Member(team, thread)}.run();
  }
}

}  // namespace lorastack::LORASTACK_ISA

// The entry point of one instruction set, for dispatch.cpp.
#define LORASTACK_EXPORT_HEADS(name, Isa)                                               \
  namespace lorastack::name {                                                           \
  void run_propose(const lorastack_proposal& proposal) { propose_with<Isa>(proposal); } \
  }
