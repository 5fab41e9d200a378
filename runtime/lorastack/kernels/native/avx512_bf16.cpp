#define LORASTACK_ISA avx512_bf16
#define LORASTACK_VECTOR "vector_avx512.h"
#include "dot.h"
#include "step_kernels.h"

namespace lorastack {

// 32 registers, one a vector.
extern const StepKernels avx512_bf16_bfloat16 =
    avx512_bf16::step_kernels<avx512_bf16::Dot<12, 2, 4, 16>>;

}  // namespace lorastack
