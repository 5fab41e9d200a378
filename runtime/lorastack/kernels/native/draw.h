// What a draw is made of, shared with the caller (ctypes mirrors this).
#pragma once

#include "step.h"

extern "C" {

// One token from row `row` of the logits. start: of its stream of noise, see gumbel.py; top_k: 0 for no
// limit. Temperature 0 takes the best.
struct lorastack_draw {
  uint64_t start;
  double temperature, top_p, min_p;
  int32_t row, top_k;
};

// tokens: one a draw. stride: floats from one row of logits to the next.
LORASTACK_API void lorastack_run_draws(const float* logits, int64_t stride, int32_t columns,
                                       const lorastack_draw* draws, int32_t num_draws,
                                       int64_t* tokens, int32_t num_threads);
}
