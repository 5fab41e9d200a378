// Medusa heads, from the states of a step's rows to the best tokens of each head.
//
// The matrices are read as they lie in the adapter, row by row: 16 rows times 16 states at a time, each
// sum over the inputs in order. The states are packed before each phase, 16 to a tile, as the trait's
// `multiply_16` reads them. The logits are kept by state, to be looked through.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "abi.h"
#include "team.h"
#include "vector.h"

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
INLINE Floats share_of(Floats logit, Floats peak) {
  const Floats x = mul(sub(logit, peak), set(1.44269504f));
  const Floats n = floor(x);
  const Floats f = sub(x, n);  // NaN for minus infinity
  Floats p = set(0.0135341659f);  // 2^f on [0, 1], of least relative error
  p = fma(p, f, set(0.0520114712f));
  p = fma(p, f, set(0.241442740f));
  p = fma(p, f, set(0.693003833f));
  p = fma(p, f, set(1.00000262f));
  // Minus infinity would make NaN 0, and a result below 2^-126 costs a hundred cycles.
  return scale_by_power(p, max(n, set(-126.0f)));
}

// The `num` best of a row of logits and their log-probabilities, see abi.h. ids: of the columns, or
// null.
INLINE void top_of(const float* row, int columns, int num, const int64_t* ids, int64_t* out,
                   float* logprobs) {
  std::vector<TopToken> best(num);
  for (int i = 0; i < columns; i += LANES) {
    const Mask real = first(columns - i);
    const Floats logits = max(load(row + i, real), set(-INFINITY));  // instead of NaN
    unsigned better = bits(real & at_least(logits, set(best[num - 1].value)));
    if (!better) continue;
    alignas(64) float lane_logits[LANES];
    store(lane_logits, logits);
    for (; better; better &= better - 1) {
      const int lane = __builtin_ctz(better);
      offer(best.data(), num, {lane_logits[lane], i + lane});
    }
  }
  const Floats peak = set(best[0].value);
  Floats total = zero();
  for (int i = 0; i < columns; i += LANES) {
    const Mask real = first(columns - i);
    total = select(real, add(total, share_of(load(row + i, real), peak)), total);
  }
  const float log_total = std::log(sum(total));
  for (int i = 0; i < num; i++) {
    const TopToken& token = best[i].place == INT32_MAX ? best[0] : best[i];
    out[i] = ids ? ids[token.place] : token.place;
    logprobs[i] = token.value - best[0].value - log_total;
  }
}

struct alignas(64) Line {
  char bytes[64];
};

// What the threads share.
template <class Isa>
struct HeadsPlan {
  using T = typename Isa::E::T;
  std::vector<Products<T>> blocks;
  Products<T> outputs;
  std::vector<Line> packed;         // tiles of the current phase
  std::vector<Line> spare;          // for each thread: the last rows of a matrix, if fewer than 16
  std::unique_ptr<float[]> logits;  // of each output and state
  size_t tile_lines, spare_lines;

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
    tile_lines = ceil_div(size * LANES * (int)sizeof(typename Isa::Packed), sizeof(Line));
    packed.resize(tiles * tile_lines);
    spare_lines = ceil_div(size * LANES * (int)sizeof(T), sizeof(Line));
    spare.resize(proposal.num_threads * spare_lines);
    logits.reset(new float[outputs.logits]);
  }
};

template <class Isa>
struct ProposalWorker {
  using E = typename Isa::E;
  using T = typename E::T;
  using Packed = typename Isa::Packed;
  const lorastack_proposal& proposal;
  HeadsPlan<Isa>& plan;
  const int thread;
  Member member;

  Packed* packed(int tile) { return (Packed*)(plan.packed.data() + tile * plan.tile_lines); }

  // Tile `index` of a product: the same inputs of 16 states at a time, transposed.
  void pack(const Product<T>& product, int index) {
    constexpr int STEP = Isa::PACK_INPUTS;
    const int begin = index * LANES, count = std::min(product.count - begin, LANES);
    Packed* const tile = packed(product.tile + index);
    for (int i = 0; i < proposal.hidden; i += STEP) {
      Floats inputs[LANES];
      for (int t = 0; t < LANES; t++)
        inputs[t] = t < count ? Isa::load_packed(product.states + (begin + t) * product.stride + i)
                              : zero();
      transpose_16(inputs);
      for (int w = 0; w < LANES; w++)
        store((float*)(tile + (size_t)i * LANES + w * STEP), inputs[w]);
    }
  }

  // 16 rows of a matrix, or what is left of it, times all its states.
  template <class Epilogue>
  void multiply(const Product<T>& product, int row, Epilogue&& epilogue) {
    const int size = proposal.hidden, rows = std::min(product.outputs - row, LANES);
    const T* matrix = product.matrix + (size_t)row * size;
    if (rows < LANES) {
      T* const spare = (T*)(plan.spare.data() + thread * plan.spare_lines);
      memcpy(spare, matrix, (size_t)rows * size * sizeof(T));
      matrix = spare;
    }
    for (int index = 0; index * LANES < product.count; index++) {
      alignas(64) float sums[LANES][LANES];
      Isa::multiply_16(matrix, packed(product.tile + index), size, sums);
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
    const Floats bias = E::load(product.bias + row);
    Floats values[LANES];
    for (int o = 0; o < LANES; o++) values[o] = load(sums[o]);
    transpose_16(values);
    for (int t = 0; t < count; t++) {
      const int token = product.first + (begin + t) * product.step + head;
      const Floats old = E::load(product.states + (begin + t) * product.stride + column);
      E::store((T*)proposal.states + (size_t)token * proposal.hidden + column,
               add(old, silu(add(values[t], bias))));
    }
  }

  // Stores logits row..row + rows of 16 states.
  void keep(const Product<T>& product, int row, int rows, int index, float (*sums)[LANES]) {
    const int begin = index * LANES, count = std::min(product.count - begin, LANES);
    Floats columns[LANES];
    for (int o = 0; o < LANES; o++) columns[o] = load(sums[o]);
    transpose_16(columns);
    for (int t = 0; t < count; t++)
      store(logits_of(product, begin + t) + row, columns[t], first(rows));
  }

  void choose(const Product<T>& product, int state) {
    const size_t at = (product.first + (size_t)state * product.step) * proposal.num;
    top_of(logits_of(product, state), product.outputs, proposal.num, product.ids,
           proposal.tokens + at, proposal.logprobs + at);
  }

  float* logits_of(const Product<T>& product, int state) {
    return plan.logits.get() + product.logits + (size_t)state * product.outputs;
  }

  void multiply_all() {
    [[maybe_unused]] const typename Isa::State state;
    for (const Products<T>& block : plan.blocks)
      run_phase(block, [&](const Product<T>& product, int row, int, int index,
                           float (*sums)[LANES]) { finish_block(product, row, index, sums); });
    run_phase(plan.outputs, [&](const Product<T>& product, int row, int rows, int index,
                                float (*sums)[LANES]) { keep(product, row, rows, index, sums); });
  }

  void run() {
    multiply_all();
    member.phase(plan.outputs.states, [&](int state) {
      const Product<T>& product =
          plan.outputs.find(state, [](auto& each) { return each.count; });
      choose(product, state);
    });
  }
};

template <class Isa>
void propose(const lorastack_proposal& proposal) {
  HeadsPlan<Isa> plan(proposal);
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
