#define LORASTACK_ISA neon_bf16
#define LORASTACK_VECTOR "vector_neon.h"
#include "dot.h"
#include "step_kernels.h"

namespace lorastack {

// 32 registers, four a vector.
extern const StepKernels neon_bf16_bfloat16 =
    neon_bf16::step_kernels<neon_bf16::Dot<6, 1, 5, 5>>;

}  // namespace lorastack
