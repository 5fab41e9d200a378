// The kernels of a step and of heads, for one type of weights.
#pragma once

#include "heads.h"
#include "kernels.h"
#include "worker.h"

namespace lorastack::LORASTACK_ISA {

template <class Isa>
constexpr StepKernels step_kernels = {scratch_bytes<Isa>, forward<Isa>, logits<Isa>, propose<Isa>};

}  // namespace lorastack::LORASTACK_ISA
