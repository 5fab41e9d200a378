// What each instruction set gives to dispatch.cpp.
#pragma once

#include "abi.h"

namespace lorastack {

// Of one type of weights.
struct StepKernels {
  int64_t (*scratch_bytes)(const lorastack_model& model, const lorastack_step& step);
  void (*forward)(const lorastack_model& model, const lorastack_step& step);
  void (*logits)(lorastack_lm_head lm_head);
  void (*propose)(const lorastack_proposal& proposal);
};

// Of one row of logits or of weights; abi.h says what they do.
struct RowKernels {
  void (*best)(const float* row, int columns, float* value, int64_t* place);
  void (*top)(const float* row, int columns, int num, const int64_t* ids, int64_t* out,
              float* logprobs);
  int64_t (*sample)(const float* row, int columns, const lorastack_sample& sample);
  void (*quantise)(const uint16_t* row, int inputs, int kind, int8_t* codes, uint16_t* scales);
};

}  // namespace lorastack
