// What a draft is made of, shared with the caller (ctypes mirrors these).
#pragma once

#include "step.h"

extern "C" {

// Heads that the rows begin..end share. weight: [blocks][heads][hidden][hidden], bias: [blocks][heads]
// [hidden], output: [outputs][hidden] for all heads or, if `own`, one a head; ids: of output's rows, or
// null for their places. Everything lies where the adapter has it.
struct lorastack_heads {
  const void *weight, *bias, *output;
  const int64_t* ids;
  int32_t begin, end, heads, blocks, outputs, own;
};

// states: [X][hidden], what the heads make of x, by (row, head), group after group; candidates:
// [X][num] ids, best first, and logprobs: theirs over all outputs of the head, or both null if only
// states are wanted. hidden: a multiple of 32.
struct lorastack_draft {
  const lorastack_heads* groups;
  const void* x;  // [rows][hidden], of the heads' type
  void* states;
  int64_t* candidates;
  float* logprobs;
  int32_t num_groups, hidden, num, num_threads, isa, unused;
};

LORASTACK_API void lorastack_run_draft(const lorastack_draft* draft);
// The `num` best of each row of logits [rows][columns], best first, the first among equals; NaN counts
// as minus infinity, and where there are fewer columns the best stands for what is missing. logprobs:
// theirs over the whole row, NaN if any of its logits is not finite, as a head's above.
LORASTACK_API void lorastack_top(const float* logits, int32_t rows, int32_t columns, int32_t num,
                                 int64_t* places, float* logprobs, int32_t num_threads);
}
