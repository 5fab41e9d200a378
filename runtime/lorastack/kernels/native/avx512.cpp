#define LORASTACK_ISA avx512
#define LORASTACK_VECTOR "vector_avx512.h"
#include "row_kernels.h"
#include "step_kernels.h"
#include "wide.h"

namespace lorastack {

// 32 registers: 24 sums, and in attention 16.
template <class Element>
using Isa = avx512::Wide<Element, 12, 2, 4, 16>;

extern const StepKernels avx512_float32 = avx512::step_kernels<Isa<avx512::F32>>;
extern const StepKernels avx512_bfloat16 = avx512::step_kernels<Isa<avx512::BF16>>;
extern const RowKernels avx512_rows = avx512::row_kernels;

}  // namespace lorastack
