// Medusa heads, from the states of a step's rows to the best tokens of each head.
//
// The matrices are read as they lie in the adapter, row by row: 16 rows times 16 states at a time, each
// sum over the inputs in order. The states are packed before each phase, 16 to a tile, as the trait's
// `multiply_16` reads them. A low-rank correction multiplies the same tiles by its A, and by its B what
// comes out. The logits are kept by state, to be looked through.
#pragma once

#include "heads_plan.h"
#include "team.h"
#include "top.h"

namespace lorastack::LORASTACK_ISA {

template <class Isa>
struct ProposalWorker {
  using E = typename Isa::E;
  using T = typename E::T;
  using Packed = typename Isa::Packed;
  using Phase = typename HeadsPlan<Isa>::Phase;
  const lorastack_proposal& proposal;
  HeadsPlan<Isa>& plan;
  const int thread;
  Member member;

  Packed* packed(int tile) { return (Packed*)(plan.packed.data() + tile * plan.tile_lines); }

  // A r of the states in the correction's tile `index`.
  Packed* shrunk(const Correction<T>& correction, int index) {
    const size_t tile = (size_t)Phase::inputs(correction) * LANES;
    return (Packed*)plan.shrunk.data() + correction.shrunk + index * tile;
  }

  // This thread's room for 16 rows of a matrix.
  T* spare() { return (T*)(plan.spare.data() + thread * plan.spare_lines); }

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

  // `rows` rows of `size` inputs where 16 may be read.
  const T* readable(const T* matrix, int rows, int size) {
    if (rows >= LANES) return matrix;
    memcpy(spare(), matrix, (size_t)rows * size * sizeof(T));
    return spare();
  }

  // 16 rows of a matrix, or what is left of it, times all its states.
  template <class Epilogue>
  void multiply(const Product<T>& product, int row, Epilogue&& epilogue) {
    const int size = proposal.hidden, rows = std::min(product.outputs - row, LANES);
    const T* matrix = readable(product.matrix + (size_t)row * size, rows, size);
    for (int index = 0; index * LANES < product.count; index++) {
      alignas(64) float sums[LANES][LANES];
      Isa::multiply_16(matrix, packed(product.tile + index), size, sums);
      epilogue(product, row, rows, index, sums);
    }
  }

  // 16 rows of an A from `row` on, or what is left of it, times all its states. The last ones also
  // clear the inputs behind the rank.
  void shrink(const Correction<T>& correction, int row) {
    const int size = proposal.hidden, rank = correction.rank, rows = std::min(rank - row, LANES);
    const int end = row + LANES < rank ? row + LANES : Phase::inputs(correction);
    const T* a = readable(correction.a + (size_t)row * size, rows, size);
    for (int index = 0; index < correction.tiles(); index++) {
      alignas(64) float sums[LANES][LANES];
      Isa::multiply_16(a, packed(correction.tile + index), size, sums);
      Packed* const tile = shrunk(correction, index);
      for (int r = row; r < end; r += 2)
        Isa::store_pair(tile + (size_t)r * LANES, r < rank ? load(sums[r - row]) : zero(),
                        r + 1 < rank ? load(sums[r + 1 - row]) : zero());
    }
  }

  // Adds B (A r) to 16 values, from `column` on, of a tile's states, as far as they are the correction's.
  void expand(const Correction<T>& correction, int column, int tile, Floats values[LANES]) {
    const int begin = std::max(correction.begin - tile * LANES, 0);
    const int end = std::min(correction.end - tile * LANES, LANES);
    if (begin >= end) return;
    const int rank = correction.rank, inputs = Phase::inputs(correction);
    const T* b = correction.b + (size_t)column * rank;
    if (rank < inputs) {  // the spare rows are free: those of a block are whole
      memset(spare(), 0, sizeof(T) * LANES * inputs);
      for (int o = 0; o < LANES; o++)
        memcpy(spare() + o * inputs, b + o * rank, sizeof(T) * rank);
      b = spare();
    }
    alignas(64) float sums[LANES][LANES];
    Isa::multiply_16(b, shrunk(correction, tile - correction.first_tile()), inputs, sums);
    Floats updates[LANES];
    for (int o = 0; o < LANES; o++) updates[o] = load(sums[o]);
    transpose_16(updates);
    for (int t = begin; t < end; t++) values[t] = add(values[t], updates[t]);
  }

  template <class Epilogue>
  void run_phase(const Phase& products, Epilogue&& epilogue) {
    member.phase(products.tiles, [&](int tile) {
      const Product<T>& product = find(products.all, tile, [](auto& each) { return each.tiles(); });
      pack(product, tile);
    });
    member.phase(products.correction_strips, [&](int strip) {
      const Correction<T>& correction =
          find(products.corrections, strip, [](auto& each) { return each.strips(); });
      shrink(correction, strip * LANES);
    });
    member.phase(products.strips, [&](int strip) {
      const Product<T>& product =
          find(products.all, strip, [](auto& each) { return each.strips(); });
      multiply(product, strip * LANES, epilogue);
    });
  }

  // Stores r + SiLU(W r + b + B (A r)): 16 values of 16 states, of one head since hidden is a multiple
  // of 16.
  void finish_block(const Phase& products, const Product<T>& product, int row, int index,
                    float (*sums)[LANES]) {
    const int begin = index * LANES, count = std::min(product.count - begin, LANES);
    const int head = row / proposal.hidden, column = row % proposal.hidden;
    const Floats bias = E::load(product.bias + row);
    Floats values[LANES];
    for (int o = 0; o < LANES; o++) values[o] = load(sums[o]);
    transpose_16(values);
    for (int t = 0; t < count; t++) values[t] = add(values[t], bias);
    const Correction<T>* corrections =
        products.corrections.data() + product.correction + head * product.corrections;
    for (int i = 0; i < product.corrections; i++) expand(corrections[i], column, index, values);
    for (int t = 0; t < count; t++) {
      const int token = product.first + (begin + t) * product.step + head;
      const Floats old = E::load(product.states + (begin + t) * product.stride + column);
      E::store((T*)proposal.states + (size_t)token * proposal.hidden + column,
               add(old, silu(values[t])));
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
    for (const Phase& block : plan.blocks)
      run_phase(block, [&](const Product<T>& product, int row, int, int index,
                           float (*sums)[LANES]) { finish_block(block, product, row, index, sums); });
    run_phase(plan.outputs, [&](const Product<T>& product, int row, int rows, int index,
                                float (*sums)[LANES]) { keep(product, row, rows, index, sums); });
  }

  void run() {
    multiply_all();
    member.phase(plan.outputs.states, [&](int state) {
      const Product<T>& product =
          find(plan.outputs.all, state, [](auto& each) { return each.count; });
      choose(product, state);
    });
  }
};

template <class Isa>
void propose(const lorastack_proposal& proposal) {
  HeadsPlan<Isa> plan(proposal);
  const int64_t phases = 3 * (int64_t)plan.blocks.size() + 4;
  std::vector<Counter> counters(num_counters(phases, proposal.num_threads));
  Team team{counters.data(), proposal.num_threads};
#pragma omp parallel num_threads(proposal.num_threads)
  {
    const int thread = omp_get_thread_num();
    ProposalWorker<Isa>{proposal, plan, thread, Member(team, thread)}.run();
  }
}

}  // namespace lorastack::LORASTACK_ISA
