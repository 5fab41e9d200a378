#define LORASTACK_ISA amx
#define LORASTACK_VECTOR "vector_avx512.h"
#include "amx.h"
#include "step_kernels.h"

namespace lorastack {

extern const StepKernels amx_bfloat16 = amx::step_kernels<amx::Amx>;

}  // namespace lorastack
