// The library's functions, which choose the instruction set at run time. Compiled for any x86-64.
#include "abi.h"

#include <sys/syscall.h>
#include <unistd.h>

#ifdef LORASTACK_PROFILE
extern "C" {
LORASTACK_API double lorastack_phase_seconds[4096];
LORASTACK_API int32_t lorastack_num_phases;
}
#endif

#define DECLARE(name)                                                   \
  namespace lorastack::name {                                           \
  int64_t scratch_bytes(const lorastack_model&, const lorastack_step&); \
  void run_step(const lorastack_model&, const lorastack_step&);         \
  void run_logits(const lorastack_lm_head&);                            \
  void run_propose(const lorastack_proposal&);                          \
  }
DECLARE(amx)
DECLARE(avx512_bf16)
DECLARE(avx512)

namespace lorastack::avx512 {
void run_best(const float*, int, int, float*, int64_t*, int);
void run_top(const float*, int, int, int, int64_t*, float*, int);
void run_samples(const float*, int64_t, int, const lorastack_sample*, int, int64_t*, int);
void run_quantise(const uint16_t*, int, int, int, int8_t*, uint16_t*, int);
}

#define DISPATCH(isa, call)                                          \
  switch (isa) {                                                     \
    case LORASTACK_AMX: return lorastack::amx::call;                 \
    case LORASTACK_AVX512_BF16: return lorastack::avx512_bf16::call; \
    default: return lorastack::avx512::call;                         \
  }

const char lorastack_sources[] = LORASTACK_SOURCES;
const int32_t lorastack_sizes[] = {
    sizeof(lorastack_matrix),   sizeof(lorastack_layer),   sizeof(lorastack_target),
    sizeof(lorastack_segment),  sizeof(lorastack_row),     sizeof(lorastack_model),
    sizeof(lorastack_step),     sizeof(lorastack_lm_head), sizeof(lorastack_heads),
    sizeof(lorastack_proposal), sizeof(lorastack_sample),
};

int64_t lorastack_scratch_bytes(const lorastack_model* model, const lorastack_step* step) {
  DISPATCH(model->isa, scratch_bytes(*model, *step))
}

void lorastack_forward(const lorastack_model* model, const lorastack_step* step) {
  DISPATCH(model->isa, run_step(*model, *step))
}

void lorastack_logits(const lorastack_lm_head* lm_head) {
  DISPATCH(lm_head->isa, run_logits(*lm_head))
}

void lorastack_best(const float* logits, int32_t rows, int32_t columns, float* values,
                    int64_t* places, int32_t num_threads) {
  lorastack::avx512::run_best(logits, rows, columns, values, places, num_threads);
}

void lorastack_propose(const lorastack_proposal* proposal) {
  DISPATCH(proposal->isa, run_propose(*proposal))
}

void lorastack_top(const float* logits, int32_t rows, int32_t columns, int32_t num, int64_t* places,
                   float* logprobs, int32_t num_threads) {
  lorastack::avx512::run_top(logits, rows, columns, num, places, logprobs, num_threads);
}

void lorastack_sample_rows(const float* logits, int64_t stride, int32_t columns,
                           const lorastack_sample* samples, int32_t num_samples, int64_t* tokens,
                           int32_t num_threads) {
  lorastack::avx512::run_samples(logits, stride, columns, samples, num_samples, tokens, num_threads);
}

void lorastack_quantise(const uint16_t* weights, int32_t rows, int32_t inputs, int32_t kind,
                        int8_t* codes, uint16_t* scales, int32_t num_threads) {
  lorastack::avx512::run_quantise(weights, rows, inputs, kind, codes, scales, num_threads);
}

int32_t lorastack_supports(int32_t isa) {
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (isa == LORASTACK_AVX512) return avx512;
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (isa == LORASTACK_AVX512_BF16) return bf16;
  // The system grants a process the tiles' state on request.
  constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return bf16 && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
