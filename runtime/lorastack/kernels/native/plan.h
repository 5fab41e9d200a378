// What a step needs before it runs: its memory, where every row's slots lie, what every token sees.
#pragma once

#include <algorithm>

#include "lora.h"
#include "team.h"

namespace lorastack::LORASTACK_ISA {

constexpr int TARGETS = 7;
constexpr int LAYER_PHASES = 12, OTHER_PHASES = 6;  // at most

inline int padded(int k) { return ceil_div(k, K_STEP) * K_STEP; }

// Hands out aligned pieces of the scratch buffer; with a null base it only counts.
struct Arena {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (count * (int64_t)sizeof(T) + 63) / 64 * 64;
    return piece;
  }
};

// One query token: its row, position and ancestors behind the linear prefix.
struct Token {
  int32_t row, position, linear, tail, num_tail;
};

template <class Isa>
struct Buffers {
  using T = typename Isa::E::T;
  using X = typename Isa::A::T;
  X *x, *qkv, *context, *inner;
  X* states;    // of the outputs, see `LmHeadRoom`
  T* unpacked;  // for each thread: weights of a pair of panels
  float *hidden, *shrunk, *scores;
  Token* tokens;
  int32_t* tails;
  int64_t* slots;      // of all rows, one after the other
  int64_t* row_slots;  // where each row's begin
  int32_t* passes;     // attention passes of all rows before each row, then of all
  Counter* counters;
  LoraPart<T>* parts;  // max_parts for each thread
  lorastack_segment* lm_head_segments;  // over the outputs, with lm_head's targets
  int64_t unpacked_elements;  // of a thread
  int capacity, ld_hidden, ld_qkv, ld_context, ld_inner, max_parts;
};

inline int64_t num_step_counters(const lorastack_model& model, const lorastack_step& step) {
  return num_counters((int64_t)LAYER_PHASES * model.num_layers + OTHER_PHASES, step.num_threads);
}

inline int depth_bound(const lorastack_row& row) { return row.parents ? row.end - row.start : 0; }

// Elements that the largest matrix needs; all layers are alike.
inline size_t most_unpacked(const lorastack_model& model) {
  const lorastack_layer& layer = *model.layers;
  return std::max({unpacked_elements(layer.qkv), unpacked_elements(layer.o),
                   unpacked_elements(layer.gate_up), unpacked_elements(layer.down),
                   unpacked_elements(model.lm_head)});
}

template <class Isa>
Buffers<Isa> lay_out(const lorastack_model& model, const lorastack_step& step, Arena& arena) {
  using T = typename Isa::E::T;
  using X = typename Isa::A::T;
  const int rows = ceil_div(step.num_tokens, BLOCK_ROWS) * BLOCK_ROWS;
  const int query = model.heads * model.head_dim, key = model.kv_heads * model.head_dim;
  Buffers<Isa> b;
  int64_t slots = 0, longest = 0, tails = 0, shrunk = 0;
  for (int r = 0; r < step.num_rows; r++) {
    const lorastack_row& row = step.rows[r];
    int64_t used = row.committed + row.end - row.start;
    slots += used;
    if (used > longest) longest = used;
    tails += (int64_t)depth_bound(row) * depth_bound(row);
  }
  for (int s = 0; s < step.num_segments; s++) {
    const lorastack_segment& segment = step.segments[s];
    shrunk += 3 * Isa::shrunk_floats(segment.start, segment.end, segment.max_rank);
  }
  b.capacity = (int)((longest + 32) / 32 * 32);
  b.ld_hidden = padded(model.hidden);
  b.ld_qkv = padded(query + 2 * key);
  b.ld_context = padded(query);
  b.ld_inner = padded(model.inner);
  b.max_parts = 3 * step.num_segments;
  b.hidden = arena.take<float>((int64_t)step.num_tokens * model.hidden);
  b.x = arena.take<X>((int64_t)rows * b.ld_hidden);
  b.qkv = arena.take<X>((int64_t)rows * b.ld_qkv);
  b.context = arena.take<X>((int64_t)rows * b.ld_context);
  b.inner = arena.take<X>((int64_t)rows * b.ld_inner);
  b.states = arena.take<X>(Isa::PADS_STATES ? (int64_t)step.num_outputs * model.lm_head.k : 0);
  b.unpacked_elements = (int64_t)most_unpacked(model);
  b.unpacked = arena.take<T>(step.num_threads * b.unpacked_elements);
  b.shrunk = arena.take<float>(shrunk);
  b.scores = arena.take<float>((int64_t)step.num_threads * Isa::MAX_QUERIES * b.capacity);
  b.tokens = arena.take<Token>(step.num_tokens);
  b.tails = arena.take<int32_t>(tails);
  b.slots = arena.take<int64_t>(slots);
  b.row_slots = arena.take<int64_t>(step.num_rows);
  b.passes = arena.take<int32_t>(step.num_rows + 1);
  b.counters = arena.take<Counter>(num_step_counters(model, step));
  b.parts = arena.take<LoraPart<T>>((int64_t)step.num_threads * b.max_parts);
  b.lm_head_segments = arena.take<lorastack_segment>(step.num_segments);
  return b;
}

// The step's segments over its outputs, with lm_head's targets.
template <class Isa>
void plan_lm_head(const lorastack_model& model, const lorastack_step& step, Buffers<Isa>& b) {
  const int32_t* end = step.outputs + step.num_outputs;
  for (int s = 0; s < step.num_segments; s++) {
    const lorastack_segment& segment = step.segments[s];
    lorastack_segment& moved = b.lm_head_segments[s];
    moved = segment;
    moved.targets += (size_t)model.num_layers * TARGETS;
    moved.start = (int32_t)(std::lower_bound(step.outputs, end, segment.start) - step.outputs);
    moved.end = (int32_t)(std::lower_bound(step.outputs, end, segment.end) - step.outputs);
  }
}

// Where every row's slots lie and what every token sees.
template <class Isa>
void plan(const lorastack_model& model, const lorastack_step& step, Buffers<Isa>& b) {
  const int64_t page_elements = 2ll * model.kv_heads * model.page_size * model.head_dim;
  int64_t at = 0;
  int32_t tail = 0;
  b.passes[0] = 0;
  const int query = model.heads * model.head_dim;  // zero weights must not meet NaN behind it
  for (int t = 0; query < b.ld_context && t < step.num_tokens; t++)
    memset((void*)(b.context + (size_t)t * b.ld_context + query), 0,
           sizeof(*b.context) * (b.ld_context - query));
  for (int r = 0; r < step.num_rows; r++) {
    const lorastack_row& row = step.rows[r];
    b.row_slots[r] = at;
    const int queries = (row.end - row.start) * (model.heads / model.kv_heads);
    b.passes[r + 1] = b.passes[r] + ceil_div(queries, Isa::MAX_QUERIES);
    const int used = row.committed + row.end - row.start;
    for (int s = 0; s < used; s++) {
      const int place = s % model.page_size;
      b.slots[at] = place ? b.slots[at - 1] + model.head_dim
                          : row.pages[s / model.page_size] * page_elements;
      at++;
    }
    for (int j = 0; j < row.end - row.start; j++) {
      Token& token = b.tokens[row.start + j];
      token = {r, row.committed + j, row.committed + j + 1, tail, 0};
      if (!row.parents) continue;
      int depth = 0;
      for (int a = j; row.parents[a] >= 0; a = row.parents[a]) depth++;
      token.position = row.committed + depth;
      token.linear = row.committed + 1;
      token.num_tail = depth;
      for (int a = j, i = depth; i > 0; a = row.parents[a]) b.tails[tail + --i] = row.committed + a;
      tail += depth;
    }
  }
}

}  // namespace lorastack::LORASTACK_ISA
