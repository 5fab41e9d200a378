// What the heads of a call multiply, phase by phase, and the memory that its threads share.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "abi.h"
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
  int tile = 0;         // its first tile of 16 packed states
  size_t logits = 0;    // where its own begin among all logits: [count][outputs]
  int correction = 0;   // its first one, those of its first head before the next one's
  int corrections = 0;  // of each head

  int tiles() const { return ceil_div(count, LANES); }
  int strips() const { return ceil_div(outputs, LANES); }  // of 16 rows of the matrix
};

// B (A r), added to a head's block for the states begin..end of a product. a: [rank][hidden], b:
// [hidden][rank].
template <class T>
struct Correction {
  const T *a, *b;
  int rank, begin, end;
  int tile = 0;       // the first packed tile with its states
  size_t shrunk = 0;  // where its A r begin, see `Products`

  int first_tile() const { return begin / LANES; }  // of the product's
  int tiles() const { return ceil_div(end, LANES) - first_tile(); }
  int strips() const { return ceil_div(rank, LANES); }  // of 16 rows of A
};

// The products of one phase. Corrections have a tile of A r for each tile that holds their states,
// packed as inputs of B: `inputs` of them, of which those behind the rank are zeros.
template <class T, int PACK_INPUTS>
struct Products {
  std::vector<Product<T>> all;
  std::vector<Correction<T>> corrections;
  int tiles = 0, strips = 0, states = 0, correction_strips = 0;
  size_t logits = 0, shrunk = 0;

  static int inputs(const Correction<T>& each) {
    return ceil_div(each.rank, PACK_INPUTS) * PACK_INPUTS;
  }

  void add(Product<T> product) {
    if (!product.count) return;
    product.tile = tiles;
    product.logits = logits;
    product.correction = (int)corrections.size();
    tiles += product.tiles();
    strips += product.strips();
    states += product.count;
    logits += (size_t)product.count * product.outputs;
    all.push_back(product);
  }

  // Corrects the product that was added last.
  void correct(Correction<T> correction) {
    correction.tile = all.back().tile + correction.first_tile();
    correction.shrunk = shrunk;
    correction_strips += correction.strips();
    shrunk += (size_t)correction.tiles() * inputs(correction) * LANES;
    corrections.push_back(correction);
  }
};

// The one of `all` that holds item `index`, where `count` gives how many each has. `index` becomes
// the item's number there.
template <class Each, class Count>
INLINE const Each& find(const std::vector<Each>& all, int& index, Count&& count) {
  const Each* each = all.data();
  for (; index >= count(*each); each++) index -= count(*each);
  return *each;
}

struct alignas(64) Line {
  char bytes[64];
};

INLINE size_t lines_of(size_t bytes) { return (bytes + sizeof(Line) - 1) / sizeof(Line); }

// Whether neighbouring groups have the same blocks, but for their corrections.
INLINE bool share_blocks(const lorastack_heads& a, const lorastack_heads& b) {
  return a.end == b.start && a.weight == b.weight && a.bias == b.bias && a.heads == b.heads &&
         a.blocks == b.blocks;
}

// Whether groups with the same blocks have the same outputs.
INLINE bool share_outputs(const lorastack_heads& a, const lorastack_heads& b) {
  return a.output == b.output && a.ids == b.ids && a.outputs == b.outputs && a.own == b.own;
}

// What the threads share.
template <class Isa>
struct HeadsPlan {
  using T = typename Isa::E::T;
  using Packed = typename Isa::Packed;
  using Phase = Products<T, Isa::PACK_INPUTS>;
  std::vector<Phase> blocks;
  Phase outputs;
  std::vector<Line> packed;         // tiles of the current phase
  std::vector<Line> shrunk;         // of its corrections
  std::vector<Line> spare;          // for each thread: 16 rows of a matrix that does not have them
  std::unique_ptr<float[]> logits;  // of each output and state
  size_t tile_lines, spare_lines;

  HeadsPlan(const lorastack_proposal& proposal) {
    const int size = proposal.hidden;
    const lorastack_heads *groups = proposal.groups, *const end = groups + proposal.num_groups;
    for (int first = 0; groups < end;) {
      int count = 1;
      while (groups + count < end && share_blocks(groups[count - 1], groups[count])) count++;
      add(proposal, groups, count, first);
      first += (groups[count - 1].end - groups->start) * groups->heads;
      groups += count;
    }
    int tiles = outputs.tiles, widest = size;
    size_t most_shrunk = 0;
    for (const Phase& each : blocks) {
      tiles = std::max(tiles, each.tiles);
      most_shrunk = std::max(most_shrunk, each.shrunk);
      for (const auto& correction : each.corrections)
        widest = std::max(widest, Phase::inputs(correction));
    }
    tile_lines = lines_of((size_t)size * LANES * sizeof(Packed));
    packed.resize(tiles * tile_lines);
    shrunk.resize(lines_of(most_shrunk * sizeof(Packed)));
    spare_lines = lines_of((size_t)widest * LANES * sizeof(T));
    spare.resize(proposal.num_threads * spare_lines);
    logits.reset(new float[outputs.logits]);
  }

 private:
  // Groups that share their blocks, and the first of their tokens.
  void add(const lorastack_proposal& proposal, const lorastack_heads* groups, int count, int first) {
    const lorastack_heads& heads = *groups;
    const int size = proposal.hidden, num = heads.heads;
    const int rows = groups[count - 1].end - heads.start;
    const size_t square = (size_t)size * size;
    const T *weight = (const T*)heads.weight, *bias = (const T*)heads.bias;
    T* const states = (T*)proposal.states;
    if ((int)blocks.size() < heads.blocks) blocks.resize(heads.blocks);
    // All heads' first blocks read the same states.
    blocks[0].add({weight, bias, nullptr, (const T*)proposal.x + (size_t)heads.start * size,
                   (size_t)size, num * size, rows, first, num});
    for (int at = 0; at < heads.blocks * num; at++) {
      const int token = first + at % num;
      if (at >= num)
        blocks[at / num].add({weight + at * square, bias + (size_t)at * size, nullptr,
                              states + (size_t)token * size, (size_t)num * size, size, rows, token,
                              num});
      correct(blocks[at / num], groups, count, at, size);
    }
    if (!proposal.tokens) return;
    for (int from = 0, to = 1; from < count; from = to++) {
      while (to < count && share_outputs(groups[from], groups[to])) to++;
      choose(proposal, groups[from], groups[to - 1].end - groups[from].start,
             first + (groups[from].start - heads.start) * num);
    }
  }

  // The outputs of `rows` rows, and the first of their tokens.
  void choose(const lorastack_proposal& proposal, const lorastack_heads& heads, int rows, int first) {
    const int size = proposal.hidden, matrices = heads.own ? heads.heads : 1;
    const size_t matrix = (size_t)heads.outputs * size;
    for (int head = 0; head < matrices; head++)
      outputs.add({(const T*)heads.output + head * matrix, nullptr, heads.ids,
                   (const T*)proposal.states + (size_t)(first + head) * size,
                   (size_t)matrices * size, heads.outputs, rows * heads.heads / matrices,
                   first + head, matrices});
  }

  // The groups' corrections of block `at`, counted over all heads, whose product is the last one.
  void correct(Phase& block, const lorastack_heads* groups, int count, int at, int size) {
    int corrections = 0;
    for (const lorastack_heads* group = groups; group < groups + count; group++) {
      if (!group->rank || group->start == group->end) continue;
      const size_t offset = (size_t)at * group->rank * size;
      block.correct({(const T*)group->a + offset, (const T*)group->b + offset, group->rank,
                     group->start - groups->start, group->end - groups->start});
      corrections++;
    }
    if (corrections) block.all.back().corrections = corrections;
  }
};

}  // namespace lorastack::LORASTACK_ISA
