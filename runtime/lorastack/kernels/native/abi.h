// The library's structs and functions; library.py mirrors all of them with ctypes.
#pragma once

#include <stdint.h>

#define LORASTACK_API __attribute__((visibility("default")))

extern "C" {

// Instruction sets, best first; isa.py says what each can do.
enum {
  LORASTACK_AMX,
  LORASTACK_AVX512_BF16,
  LORASTACK_AVX512,
  LORASTACK_AVX2,
  LORASTACK_NEON_BF16,
  LORASTACK_NEON,
  LORASTACK_PLAIN_CPP,
  LORASTACK_NUM_ISAS
};
enum { LORASTACK_PLAIN, LORASTACK_INT8, LORASTACK_INT4 };  // how weights are stored

// A step.

// A packed weight. k: padded inputs; panels: even; bias: packed like the outputs, or null; scales: of
// quantised weights, see quantised.h.
struct lorastack_matrix {
  const void* weight;
  const float* bias;
  const void* scales;
  int32_t panels, k, kind, unused;
};

struct lorastack_layer {
  const void *attention_norm, *mlp_norm;
  lorastack_matrix qkv, o, gate_up, down;  // gate_up: panels of gate and up in turn
  void* kv;                                // [pages][2][kv_heads][page_size][head_dim]
};

// A LoRA's target; rank 0: none. Order in a layer: q, k, v, o, gate, up, down.
struct lorastack_target {
  const void *a, *b;
  float scale;
  int32_t rank;
};

// Tokens start..end use an adapter's targets: in a step [num_layers][7], then lm_head's. max_rank: the
// largest of them.
struct lorastack_segment {
  const lorastack_target* targets;
  int32_t start, end;
  float scale;
  int32_t max_rank;
};

// Tokens start..end of the step; parents: null for a chain.
struct lorastack_row {
  const int32_t *pages, *parents;
  int32_t start, end, committed, unused;
};

// embed: [vocabulary][hidden].
struct lorastack_model {
  const lorastack_layer* layers;
  lorastack_matrix lm_head;
  const void *embed, *norm;
  const float *cosine, *sine;  // [positions][head_dim / 2]
  int32_t num_layers, hidden, inner, heads, kv_heads, head_dim, page_size, vocabulary;
  int32_t window;  // 0: none
  float eps;
  int32_t isa, half;  // half: weights and KV are bfloat16, else float32
};

// tokens: [T] ids; embedded: [T][hidden] instead of the embedding's rows, or null. outputs: the X tokens
// whose results are wanted, rising. out: their states after the final norm, [X up to a multiple of 32]
// [hidden]; logits: [X][vocabulary]; peaks and best: the best logit and its id, as lorastack_best gives
// them.
struct lorastack_step {
  const lorastack_row* rows;
  const lorastack_segment* segments;
  const int64_t* tokens;
  const float* embedded;
  const int32_t* outputs;
  void* out;
  float *logits, *peaks;
  int64_t* best;
  void* scratch;  // lorastack_scratch_bytes of it, on a cache line
  int32_t num_rows, num_tokens, num_segments, num_outputs, num_threads, unused;
};

// lm_head alone.

// Rows of states after the final norm into logits. x: [rows][inputs], readable up to a multiple of 32
// rows; out: [rows][outputs]; segments index the rows, their targets are lm_head's, one each.
struct lorastack_lm_head {
  lorastack_matrix matrix;
  const lorastack_segment* segments;
  const void* x;
  float *out, *scratch;  // scratch: the step's; null in lorastack_logits
  int32_t num_segments, rows, outputs, inputs, num_threads, isa, half;
};

// Medusa heads.

// The heads of rows start..end. weight: [blocks][heads][hidden][hidden], bias: [blocks][heads][hidden],
// output: [outputs][hidden] for all heads or, if `own`, one a head; ids: of output's rows, or null where
// they are the places. a: [blocks][heads][rank][hidden] and b: [blocks][heads][hidden][rank], which
// correct the weights; rank 0: none do. Everything lies where the adapters have it.
struct lorastack_heads {
  const void *weight, *bias, *output;
  const int64_t* ids;
  const void *a, *b;
  int32_t start, end, heads, blocks, outputs, own, rank, unused;
};

// x: [rows][hidden], of the heads' type; states: [X][hidden], what the heads make of it, by (row, head),
// group after group; tokens: [X][num] ids, best first, and logprobs: theirs over all outputs of the head,
// or both null if only states are wanted. hidden: a multiple of 32.
struct lorastack_proposal {
  const lorastack_heads* groups;
  const void* x;
  void* states;
  int64_t* tokens;
  float* logprobs;
  int32_t num_groups, hidden, num, num_threads, isa, half;
};

// Samples.

// One token from row `row` of the logits. start: of its stream of noise, see gumbel.py; top_k: 0 for no
// limit. Temperature 0 takes the best.
struct lorastack_sample {
  uint64_t start;
  double temperature, top_p, min_p;
  int32_t row, top_k;
};

// Functions.

LORASTACK_API int32_t lorastack_supports(int32_t isa);  // 1: this machine runs it
LORASTACK_API int64_t lorastack_scratch_bytes(const lorastack_model* model,
                                              const lorastack_step* step);
LORASTACK_API void lorastack_forward(const lorastack_model* model, const lorastack_step* step);
LORASTACK_API void lorastack_logits(const lorastack_lm_head* lm_head);
LORASTACK_API void lorastack_propose(const lorastack_proposal* proposal);
// The best of each row of logits [rows][columns]: its value and its place, the first among equals; a
// row that holds NaN gives NaN.
LORASTACK_API void lorastack_best(int32_t isa, const float* logits, int32_t rows, int32_t columns, float* values,
                                  int64_t* places, int32_t num_threads);
// The `num` best of each row of logits [rows][columns], best first, the first among equals; NaN counts
// as minus infinity, and where there are fewer columns the best stands for what is missing. logprobs:
// theirs over the whole row, NaN if any of its logits is not finite, as in a proposal.
LORASTACK_API void lorastack_top(int32_t isa, const float* logits, int32_t rows, int32_t columns, int32_t num,
                                 int64_t* places, float* logprobs, int32_t num_threads);
// tokens: one a sample. stride: floats from one row of logits to the next.
LORASTACK_API void lorastack_sample_rows(int32_t isa, const float* logits, int64_t stride, int32_t columns,
                                         const lorastack_sample* samples, int32_t num_samples,
                                         int64_t* tokens, int32_t num_threads);
// Weights [rows][inputs] in bfloat16, quantised to a kind: codes [rows][inputs rounded up to 32] and
// bfloat16 scales [rows][1, or in int4 one for each 32 codes]. A scale is not finite where a weight is not.
LORASTACK_API void lorastack_quantise(int32_t isa, const uint16_t* weights, int32_t rows, int32_t inputs,
                                      int32_t kind, int8_t* codes, uint16_t* scales,
                                      int32_t num_threads);

// What library.py compares before it calls anything: the hash of the sources that build.py gives, and
// the sizes of the structs in this order.
LORASTACK_API extern const char lorastack_sources[65];
LORASTACK_API extern const int32_t lorastack_sizes[11];
}
