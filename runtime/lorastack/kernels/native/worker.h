// A decoder step as one parallel region: phases whose chunks the team's threads share.
#pragma once

#include <cmath>

#include "attention.h"
#include "best.h"
#include "lm_head.h"
#include "plan.h"

namespace lorastack::LORASTACK_ISA {

struct Group {
  int first, count;
};
constexpr Group QKV = {0, 3}, O = {3, 1}, GATE_UP = {4, 2}, DOWN = {6, 1};

template <class Isa>
struct StepWorker {
  using E = typename Isa::E;
  using A = typename Isa::A;
  using T = typename E::T;
  using X = typename A::T;
  const lorastack_model& model;
  const lorastack_step& step;
  const Buffers<Isa>& b;
  int thread;
  LoraPart<T>* parts;
  Member member;
  int num_parts = 0;

  void embed() {
    const int size = model.hidden;
    member.phase(step.num_tokens, [&](int t) {
      float* h = b.hidden + (size_t)t * size;
      if (step.embedded) {
        memcpy(h, step.embedded + (size_t)t * size, sizeof(float) * size);
        return;
      }
      const T* row = (const T*)model.embed + (size_t)step.tokens[t] * size;
      for (int i = 0; i < size; i += LANES) {
        const Mask mask = first(size - i);
        store(h + i, E::load(row + i, mask), mask);
      }
    });
  }

  // RMSNorm of `count` tokens' hidden states into `out`, elements of Out. tokens: which ones, null for
  // all.
  template <class Out>
  void normalise(const void* weight_, typename Out::T* out, int ld, const int32_t* tokens,
                 int count) {
    const T* weight = (const T*)weight_;
    const int size = model.hidden;
    member.phase(count, [&](int t) {
      const float* h = b.hidden + (size_t)(tokens ? tokens[t] : t) * size;
      Floats squares = zero();
      for (int i = 0; i < size; i += LANES) {
        const Floats v = load(h + i, first(size - i));
        squares = fma(v, v, squares);
      }
      const Floats scale = set(1.0f / std::sqrt(sum(squares) / size + model.eps));
      auto* y = out + (size_t)t * ld;
      for (int i = 0; i < size; i += LANES) {
        const Mask m = first(size - i);
        Out::store(y + i, mul(mul(load(h + i, m), scale), E::load(weight + i, m)), m);
      }
      for (int i = size; i < ld; i++) y[i] = 0;
    });
  }

  // Lists the group's LoRA parts of a layer and runs their shrinks.
  void shrink_group(int layer, Group group, const X* x, int ldx, int k) {
    const int first_target = layer * TARGETS + group.first;
    const PartCounts counts =
        list_parts<Isa>(step.segments, step.num_segments, first_target, group.count, parts);
    num_parts = counts.parts;
    if (num_parts)
      member.phase(counts.chunks,
                   [&](int chunk) { shrink_chunk<Isa>(parts, chunk, x, ldx, k, b.shrunk); });
  }

  // Adds bias and LoRA to a block. first: its first panel's number; panels: their outputs.
  void finish(const lorastack_matrix& matrix, int first, int row, int rows,
              const Panel (&panels)[2]) {
    for (int half = 0; matrix.bias && half < 2; half++) {
      const Floats bias = load(matrix.bias + (first + half) * LANES);
      for (int m = 0; m < rows; m++) {
        float* sums = panels[half].sums + m * BLOCK_COLS;
        store(sums, add(load(sums), bias));
      }
    }
    if (num_parts) Isa::expand(parts, num_parts, b.shrunk, panels, row, rows);
  }

  T* unpacked() { return b.unpacked + thread * b.unpacked_elements; }

  // A projection of all tokens, pair by pair of panels, for so many tokens at a time that their inputs
  // stay in a thread's cache.
  template <class Epilogue>
  void project(const lorastack_matrix& matrix, const X* x, int ldx, Epilogue&& epilogue) {
    const int tokens = step.num_tokens, pairs = matrix.panels / 2;
    const int parts = std::max(1, tokens / Isa::rows_in_cache(matrix.k));  // none is a small rest
    const int size = ceil_div(ceil_div(tokens, parts), BLOCK_ROWS) * BLOCK_ROWS;
    member.phase(ceil_div(tokens, size) * pairs, [&](int chunk) {
      const int first = chunk / pairs * size, count = std::min(size, tokens - first);
      matmul<Isa>(x + (size_t)first * ldx, ldx, count, matrix, chunk % pairs, unpacked(),
                  [&](Block& block, int row, int rows, int panel)
                      INLINE_LAMBDA { epilogue(block, first + row, rows, panel); });
    });
  }

  void project_qkv(const lorastack_layer& layer) {
    const int query = model.heads * model.head_dim, key = model.kv_heads * model.head_dim;
    auto outputs = [&](Block& block, int panel, int half) -> Panel {
      const int column = (panel + half) * LANES;
      const int index = column < query ? 0 : column < query + key ? 1 : 2;
      const int start = index == 0 ? 0 : index == 1 ? query : query + key;
      return {index, column - start, index == 0 ? query : key, block.sums[0] + half * LANES};
    };
    project(layer.qkv, b.x, b.ld_hidden, [&](Block& block, int row, int rows, int panel) {
      finish(layer.qkv, panel, row, rows, {outputs(block, panel, 0), outputs(block, panel, 1)});
      for (int half = 0; half < 2; half++) {
        const int column = (panel + half) * LANES;
        if (column >= query + 2 * key) continue;
        for (int m = 0; m < rows; m++)
          A::store(b.qkv + (size_t)(row + m) * b.ld_qkv + column,
                   load(&block.sums[m][half * LANES]));
      }
    });
  }

  // Adds a projection back into the hidden states.
  void project_back(const lorastack_matrix& matrix, const X* x, int ldx) {
    const int size = model.hidden;
    project(matrix, x, ldx, [&](Block& block, int row, int rows, int panel) {
      finish(matrix, panel, row, rows,
             {{0, panel * LANES, size, block.sums[0]},
              {0, (panel + 1) * LANES, size, block.sums[0] + LANES}});
      for (int half = 0; half < 2; half++) {
        const int column = (panel + half) * LANES;
        if (column >= size) continue;
        const Mask mask = first(size - column);
        for (int m = 0; m < rows; m++) {
          float* h = b.hidden + (size_t)(row + m) * size + column;
          store(h, add(load(h, mask), load(&block.sums[m][half * LANES])), mask);
        }
      }
    });
  }

  // silu(gate) * up, a panel of each at a time.
  void project_inner(const lorastack_layer& layer) {
    const int size = model.inner;
    project(layer.gate_up, b.x, b.ld_hidden, [&](Block& block, int row, int rows, int panel) {
      const int column = panel / 2 * LANES;
      finish(layer.gate_up, panel, row, rows,
             {{0, column, size, block.sums[0]}, {1, column, size, block.sums[0] + LANES}});
      for (int m = 0; m < rows; m++) {
        const Floats gate = load(&block.sums[m][0]), up = load(&block.sums[m][LANES]);
        A::store(b.inner + (size_t)(row + m) * b.ld_inner + column, mul(silu(gate), up));
      }
    });
  }

  // Rotates queries in place, keys on their way into the cache.
  void rotate(const lorastack_layer& layer) {
    const int half = model.head_dim / 2, dim = model.head_dim;
    const int query = model.heads * dim, key = model.kv_heads * dim;
    const int64_t head_stride = (int64_t)model.page_size * dim;
    member.phase(step.num_tokens, [&](int t) {
      const Token& token = b.tokens[t];
      const float* cosine = model.cosine + (size_t)token.position * half;
      const float* sine = model.sine + (size_t)token.position * half;
      const lorastack_row& row = step.rows[token.row];
      X* qkv = b.qkv + (size_t)t * b.ld_qkv;
      T* slot = (T*)layer.kv + b.slots[b.row_slots[token.row] + row.committed + t - row.start];
      for (int head = 0; head < model.heads + model.kv_heads; head++) {
        X* in = qkv + head * dim;
        if (head < model.heads)
          rotate_head<A>(in, cosine, sine, in);
        else
          rotate_head<E>(in, cosine, sine, slot + (head - model.heads) * head_stride);
      }
      for (int head = 0; head < model.kv_heads; head++) {
        const X* in = qkv + query + key + head * dim;
        T* out = slot + (model.kv_heads + head) * head_stride;
        for (int i = 0; i < dim; i += LANES) {
          const Mask mask = first(dim - i);
          E::store(out + i, A::load(in + i, mask), mask);
        }
      }
    });
  }

  // Rotates a head's vector into elements of Out.
  template <class Out>
  INLINE_METHOD void rotate_head(const X* in, const float* cosine, const float* sine,
                                 typename Out::T* out) {
    const int half = model.head_dim / 2;
    for (int i = 0; i < half; i += LANES) {
      const Mask mask = first(half - i);
      const Floats c = load(cosine + i, mask), s = load(sine + i, mask);
      const Floats a = A::load(in + i, mask), z = A::load(in + half + i, mask);
      Out::store(out + i, fnma(z, s, mul(a, c)), mask);
      Out::store(out + half + i, fma(a, s, mul(z, c)), mask);
    }
  }

  // Takes up to MAX_QUERIES queries of one row and kv head at a time.
  void attention(const lorastack_layer& layer) {
    const int share = model.heads / model.kv_heads, dim = model.head_dim;
    const int64_t head_stride = (int64_t)model.page_size * dim;
    const int passes = b.passes[step.num_rows];
    constexpr int QUERIES = Isa::MAX_QUERIES;
    float* scores = b.scores + (size_t)thread * QUERIES * b.capacity;
    member.phase(passes * model.kv_heads, [&](int chunk) {
      const int head = chunk % model.kv_heads, pass = chunk / model.kv_heads;
      int r = 0;
      while (b.passes[r + 1] <= pass) r++;
      const lorastack_row& row = step.rows[r];
      const int begin = (pass - b.passes[r]) * QUERIES, queries = (row.end - row.start) * share;
      const int count = queries - begin < QUERIES ? queries - begin : QUERIES;
      Query<X> query_pass[QUERIES];
      for (int g = 0; g < count; g++) {
        const int t = row.start + (begin + g) / share, h = head * share + (begin + g) % share;
        const Token& token = b.tokens[t];
        const int oldest = model.window ? token.position + 1 - model.window : 0;
        query_pass[g] = {b.qkv + (size_t)t * b.ld_qkv + h * dim,
                         b.context + (size_t)t * b.ld_context + h * dim,
                         token.linear,
                         oldest > 0 ? oldest : 0,
                         token.num_tail,
                         b.tails + token.tail};
      }
      const RowCache<T> cache = {(const T*)layer.kv + head * head_stride, b.slots + b.row_slots[r],
                                 model.kv_heads * head_stride};
      const float scale = 1.0f / std::sqrt((float)dim);
      Isa::attend(query_pass, count, cache, dim, scale, begin == 0, model.page_size, scores,
                  b.capacity);
    });
  }

  void run() {
    [[maybe_unused]] const typename Isa::State state;
    embed();
    for (int i = 0; i < model.num_layers; i++) {
      const lorastack_layer& layer = model.layers[i];
      normalise<A>(layer.attention_norm, b.x, b.ld_hidden, nullptr, step.num_tokens);
      shrink_group(i, QKV, b.x, b.ld_hidden, model.hidden);
      project_qkv(layer);
      rotate(layer);
      attention(layer);
      shrink_group(i, O, b.context, b.ld_context, model.heads * model.head_dim);
      project_back(layer.o, b.context, b.ld_context);
      normalise<A>(layer.mlp_norm, b.x, b.ld_hidden, nullptr, step.num_tokens);
      shrink_group(i, GATE_UP, b.x, b.ld_hidden, model.hidden);
      project_inner(layer);
      shrink_group(i, DOWN, b.inner, b.ld_inner, model.inner);
      project_back(layer.down, b.inner, b.ld_inner);
    }
    normalise<E>(model.norm, (T*)step.out, model.hidden, step.outputs, step.num_outputs);
    const lorastack_lm_head lm_head = {
        model.lm_head,    b.lm_head_segments, step.out,     step.logits,      b.shrunk,  step.num_segments,
        step.num_outputs, model.vocabulary,   model.hidden, step.num_threads, model.isa, model.half};
    multiply_lm_head<Isa>(lm_head, member, {b.states, parts, unpacked()});
    member.phase(step.num_outputs, [&](int i) {
      best_of(step.logits + (size_t)i * model.vocabulary, model.vocabulary, step.peaks + i,
              step.best + i);
    });
  }
};

template <class Isa>
int64_t scratch_bytes(const lorastack_model& model, const lorastack_step& step) {
  Arena arena{nullptr};
  lay_out<Isa>(model, step, arena);
  return arena.used;
}

template <class Isa>
void forward(const lorastack_model& model, const lorastack_step& step) {
  Arena arena{(char*)step.scratch};
  Buffers<Isa> buffers = lay_out<Isa>(model, step, arena);
  plan(model, step, buffers);
  plan_lm_head(model, step, buffers);
  memset((void*)buffers.counters, 0, sizeof(Counter) * num_step_counters(model, step));
  Team team{buffers.counters, step.num_threads};
#pragma omp parallel num_threads(step.num_threads)
  {
    const int thread = omp_get_thread_num();
    StepWorker<Isa> worker{
        model, step, buffers, thread, buffers.parts + (size_t)thread * buffers.max_parts,
        Member(team, thread)};
    worker.run();
  }
}

}  // namespace lorastack::LORASTACK_ISA
