// The kernels of rows of logits and weights.
#pragma once

#include "best.h"
#include "kernels.h"
#include "quantiser.h"
#include "sample.h"
#include "top.h"

namespace lorastack::LORASTACK_ISA {

constexpr RowKernels row_kernels = {best_of, top_of, sample_of, quantise_row};

}  // namespace lorastack::LORASTACK_ISA
