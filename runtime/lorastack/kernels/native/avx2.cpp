#define LORASTACK_ISA avx2
#define LORASTACK_VECTOR "vector_avx2.h"
#include "row_kernels.h"
#include "step_kernels.h"
#include "wide.h"

namespace lorastack {

// 16 registers, two a vector: 6 sums, of rows or of queries.
template <class Element>
using Isa = avx2::Wide<Element, 6, 1, 6, 6>;

extern const StepKernels avx2_float32 = avx2::step_kernels<Isa<avx2::F32>>;
extern const StepKernels avx2_bfloat16 = avx2::step_kernels<Isa<avx2::BF16>>;
extern const RowKernels avx2_rows = avx2::row_kernels;

}  // namespace lorastack
