#define LORASTACK_ISA plain
#define LORASTACK_VECTOR "vector_plain.h"
#include "row_kernels.h"
#include "step_kernels.h"
#include "wide.h"

namespace lorastack {

// 16 registers of 4 lanes at least: sums of 2 rows, or of 2 queries.
template <class Element>
using Isa = plain::Wide<Element, 2, 1, 2, 2>;

extern const StepKernels plain_float32 = plain::step_kernels<Isa<plain::F32>>;
extern const StepKernels plain_bfloat16 = plain::step_kernels<Isa<plain::BF16>>;
extern const RowKernels plain_rows = plain::row_kernels;

}  // namespace lorastack
