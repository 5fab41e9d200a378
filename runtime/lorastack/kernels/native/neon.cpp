#define LORASTACK_ISA neon
#define LORASTACK_VECTOR "vector_neon.h"
#include "row_kernels.h"
#include "step_kernels.h"
#include "wide.h"

namespace lorastack {

// 32 registers, four a vector: 5 sums, of rows or of queries.
template <class Element>
using Isa = neon::Wide<Element, 5, 1, 5, 5>;

extern const StepKernels neon_float32 = neon::step_kernels<Isa<neon::F32>>;
extern const StepKernels neon_bfloat16 = neon::step_kernels<Isa<neon::BF16>>;
extern const RowKernels neon_rows = neon::row_kernels;

}  // namespace lorastack
