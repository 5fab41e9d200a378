// A decoder step as one parallel region: phases whose chunks the team's threads share.
#pragma once

#include <math.h>
#include <omp.h>
#include <string.h>

#include "attention.h"
#include "attention_tiles.h"
#include "best.h"
#include "lm_head.h"
#include "plan.h"

namespace lorastack::LORASTACK_ISA {

struct Group {
  int first, count;
};
constexpr Group QKV = {0, 3}, O = {3, 1}, GATE_UP = {4, 2}, DOWN = {6, 1};

// Queries that attention takes at once.
template <class Isa>
constexpr int max_queries = Isa::tiles ? 16 : MAX_QUERIES;

template <class Isa>
struct StepWorker {
  using E = typename Isa::E;
  using T = typename E::T;
  const lorastack_model& model;
  const lorastack_step& step;
  const Buffers<T>& b;
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
        const __mmask16 mask = first(size - i);
        _mm512_mask_storeu_ps(h + i, mask, E::load(row + i, mask));
      }
    });
  }

  // RMSNorm of `count` tokens' hidden states into `out`. tokens: which ones, null for all.
  void normalise(const void* weight_, T* out, int ld, const int32_t* tokens, int count) {
    const T* weight = (const T*)weight_;
    const int size = model.hidden;
    member.phase(count, [&](int t) {
      const float* h = b.hidden + (size_t)(tokens ? tokens[t] : t) * size;
      __m512 squares = _mm512_setzero_ps();
      for (int i = 0; i < size; i += LANES) {
        __m512 v = _mm512_maskz_loadu_ps(first(size - i), h + i);
        squares = _mm512_fmadd_ps(v, v, squares);
      }
      float scale = 1.0f / sqrtf(_mm512_reduce_add_ps(squares) / size + model.eps);
      T* y = out + (size_t)t * ld;
      for (int i = 0; i < size; i += LANES) {
        __mmask16 m = first(size - i);
        __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(m, h + i), _mm512_set1_ps(scale));
        E::store(y + i, _mm512_mul_ps(v, E::load(weight + i, m)), m);
      }
      for (int i = size; i < ld; i++) y[i] = 0;
    });
  }

  // Lists the group's LoRA parts of a layer and runs their shrinks.
  void shrink_group(int layer, Group group, const T* x, int ldx, int k) {
    const int first_target = layer * TARGETS + group.first;
    const PartCounts counts =
        list_parts(step.segments, step.num_segments, first_target, group.count, parts);
    num_parts = counts.parts;
    if (num_parts)
      member.phase(counts.chunks,
                   [&](int chunk) { shrink_chunk<E>(parts, chunk, x, ldx, k, b.shrunk); });
  }

  // Adds bias and LoRA to a block. first: its first panel's number; panels: their outputs.
  void finish(const lorastack_matrix& matrix, int first, int row, int rows,
              const Panel (&panels)[2]) {
    for (int half = 0; matrix.bias && half < 2; half++) {
      const __m512 bias = _mm512_loadu_ps(matrix.bias + (first + half) * LANES);
      for (int m = 0; m < rows; m++) {
        float* sums = panels[half].sums + m * BLOCK_COLS;
        _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_loadu_ps(sums), bias));
      }
    }
    if (num_parts) expand_panels<E>(parts, num_parts, b.shrunk, panels, row, rows);
  }

  T* unpacked() { return b.unpacked + thread * b.unpacked_elements; }

  // A projection of all tokens, pair by pair of panels.
  template <class Epilogue>
  void project(const lorastack_matrix& matrix, const T* x, int ldx, Epilogue&& epilogue) {
    member.phase(matrix.panels / 2, [&](int pair) {
      matmul<Isa>(x, ldx, step.num_tokens, matrix, pair, unpacked(), epilogue);
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
          E::store(b.qkv + (size_t)(row + m) * b.ld_qkv + column,
                   _mm512_load_ps(&block.sums[m][half * LANES]));
      }
    });
  }

  // Adds a projection back into the hidden states.
  void project_back(const lorastack_matrix& matrix, const T* x, int ldx) {
    const int size = model.hidden;
    project(matrix, x, ldx, [&](Block& block, int row, int rows, int panel) {
      finish(matrix, panel, row, rows,
             {{0, panel * LANES, size, block.sums[0]},
              {0, (panel + 1) * LANES, size, block.sums[0] + LANES}});
      for (int half = 0; half < 2; half++) {
        const int column = (panel + half) * LANES;
        if (column >= size) continue;
        const __mmask16 mask = first(size - column);
        for (int m = 0; m < rows; m++) {
          float* h = b.hidden + (size_t)(row + m) * size + column;
          _mm512_mask_storeu_ps(h, mask,
                                _mm512_add_ps(_mm512_maskz_loadu_ps(mask, h),
                                              _mm512_load_ps(&block.sums[m][half * LANES])));
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
        __m512 gate = _mm512_load_ps(&block.sums[m][0]), up = _mm512_load_ps(&block.sums[m][LANES]);
        E::store(b.inner + (size_t)(row + m) * b.ld_inner + column,
                 _mm512_mul_ps(silu_512(gate), up));
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
      T* qkv = b.qkv + (size_t)t * b.ld_qkv;
      T* slot = (T*)layer.kv + b.slots[b.row_slots[token.row] + row.committed + t - row.start];
      for (int head = 0; head < model.heads + model.kv_heads; head++) {
        T* in = qkv + head * dim;
        T* out = head < model.heads ? in : slot + (head - model.heads) * head_stride;
        for (int i = 0; i < half; i += LANES) {
          __m512 c = _mm512_loadu_ps(cosine + i), s = _mm512_loadu_ps(sine + i);
          __m512 a = E::load(in + i), z = E::load(in + half + i);
          E::store(out + i, _mm512_fnmadd_ps(z, s, _mm512_mul_ps(a, c)));
          E::store(out + half + i, _mm512_fmadd_ps(a, s, _mm512_mul_ps(z, c)));
        }
      }
      for (int head = 0; head < model.kv_heads; head++)
        memcpy(slot + (model.kv_heads + head) * head_stride, qkv + query + key + head * dim,
               sizeof(T) * dim);
    });
  }

  // Takes up to max_queries queries of one row and kv head at a time.
  void attention(const lorastack_layer& layer) {
    const int share = model.heads / model.kv_heads, dim = model.head_dim;
    const int64_t head_stride = (int64_t)model.page_size * dim;
    const int passes = b.passes[step.num_rows];
    constexpr int QUERIES = max_queries<Isa>;
    float* scores = b.scores + (size_t)thread * QUERIES * b.capacity;
    member.phase(passes * model.kv_heads, [&](int chunk) {
      const int head = chunk % model.kv_heads, pass = chunk / model.kv_heads;
      int r = 0;
      while (b.passes[r + 1] <= pass) r++;
      const lorastack_row& row = step.rows[r];
      const int begin = (pass - b.passes[r]) * QUERIES, queries = (row.end - row.start) * share;
      const int count = queries - begin < QUERIES ? queries - begin : QUERIES;
      Query<T> query_pass[QUERIES];
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
      const float scale = 1.0f / sqrtf((float)dim);
#ifdef __AMX_BF16__
      const bool together = model.page_size % 16 == 0;
      attend_tiles(query_pass, count, cache, dim, scale, together, scores, b.capacity);
#else
      attend<E>(query_pass, count, cache, dim, scale, scores, b.capacity);
#endif
    });
  }

  void run() {
    begin_tiles<Isa>();
    embed();
    for (int i = 0; i < model.num_layers; i++) {
      const lorastack_layer& layer = model.layers[i];
      normalise(layer.attention_norm, b.x, b.ld_hidden, nullptr, step.num_tokens);
      shrink_group(i, QKV, b.x, b.ld_hidden, model.hidden);
      project_qkv(layer);
      rotate(layer);
      attention(layer);
      shrink_group(i, O, b.context, b.ld_context, model.heads * model.head_dim);
      project_back(layer.o, b.context, b.ld_context);
      normalise(layer.mlp_norm, b.x, b.ld_hidden, nullptr, step.num_tokens);
      shrink_group(i, GATE_UP, b.x, b.ld_hidden, model.hidden);
      project_inner(layer);
      shrink_group(i, DOWN, b.inner, b.ld_inner, model.inner);
      project_back(layer.down, b.inner, b.ld_inner);
    }
    normalise(model.norm, (T*)step.out, model.hidden, step.outputs, step.num_outputs);
    const lorastack_lm_head lm_head = {
        model.lm_head,     b.lm_head_segments, step.out,         step.logits,  b.shrunk,
        step.num_segments, step.num_outputs,   model.vocabulary, model.hidden, step.num_threads, 0};
    multiply_lm_head<Isa>(lm_head, member, parts, unpacked());
    member.phase(step.num_outputs, [&](int i) {
      best_of(step.logits + (size_t)i * model.vocabulary, model.vocabulary, step.peaks + i,
              step.best + i);
    });
    end_tiles<Isa>();
  }
};

template <class Isa>
void forward(const lorastack_model& model, const lorastack_step& step) {
  using T = typename Isa::E::T;
  Arena arena{(char*)step.scratch};
  Buffers<T> buffers = lay_out<T>(model, step, max_queries<Isa>, arena);
  plan(model, step, max_queries<Isa>, buffers);
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

// The entry points of one instruction set, for dispatch.cpp.
#define LORASTACK_EXPORT(name, Isa)                                                     \
  namespace lorastack::name {                                                           \
  int64_t scratch_bytes(const lorastack_model& model, const lorastack_step& step) {     \
    Arena arena{nullptr};                                                               \
    lay_out<Isa::E::T>(model, step, max_queries<Isa>, arena);                           \
    return arena.used;                                                                  \
  }                                                                                     \
  void run_step(const lorastack_model& model, const lorastack_step& step) {             \
    forward<Isa>(model, step);                                                          \
  }                                                                                     \
  void run_logits(const lorastack_lm_head& lm_head) { logits<Isa>(lm_head); }           \
  }
