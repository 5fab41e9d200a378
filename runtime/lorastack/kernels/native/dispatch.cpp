// The library's functions, which choose the instruction set at run time. Compiled for any CPU.
#include <stddef.h>

#include "abi.h"
#include "kernels.h"

#if defined __x86_64__
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined __aarch64__ && defined __linux__
#include <sys/auxv.h>
#elif defined __aarch64__ && defined __APPLE__
#include <sys/sysctl.h>
#endif

#ifdef LORASTACK_PROFILE
extern "C" {
LORASTACK_API double lorastack_phase_seconds[4096];
LORASTACK_API int32_t lorastack_num_phases;
}
#endif

const char lorastack_sources[] = LORASTACK_SOURCES;
const int32_t lorastack_sizes[] = {
    sizeof(lorastack_matrix),   sizeof(lorastack_layer),   sizeof(lorastack_target),
    sizeof(lorastack_segment),  sizeof(lorastack_row),     sizeof(lorastack_model),
    sizeof(lorastack_step),     sizeof(lorastack_lm_head), sizeof(lorastack_heads),
    sizeof(lorastack_proposal), sizeof(lorastack_sample),
};

namespace lorastack {

extern const StepKernels amx_bfloat16, avx512_bf16_bfloat16, avx512_bfloat16, avx512_float32,
    avx2_bfloat16, avx2_float32, neon_bf16_bfloat16, neon_bfloat16, neon_float32, plain_bfloat16,
    plain_float32;
extern const RowKernels avx512_rows, avx2_rows, neon_rows, plain_rows;

namespace {

bool always() { return true; }
[[maybe_unused]] bool never() { return false; }

#if defined __x86_64__
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
// The system grants a process the tiles' state on request.
bool has_amx() {
  constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  constexpr unsigned AMX = 1u << 22 | 1u << 24;  // bfloat16, tiles; clang 14 has no names for them
  unsigned eax, ebx, ecx, edx;
  return has_avx512_bf16() && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) &&
         (edx & AMX) == AMX &&
         syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
#elif defined __aarch64__
bool has_neon_bf16() {
#ifdef __linux__
  constexpr unsigned long BF16 = 1ul << 14;
  return getauxval(AT_HWCAP2) & BF16;
#elif defined __APPLE__
  int has = 0;
  size_t size = sizeof has;
  return !sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) && has;
#else
  return false;
#endif
}
#endif

struct Isa {
  bool (*supported)();
  const StepKernels *bfloat16, *float32;  // null: there are none
  const RowKernels* rows;
};

#if defined __x86_64__
#define LORASTACK_X86(...) {__VA_ARGS__}
#else
#define LORASTACK_X86(...) {never, nullptr, nullptr, nullptr}
#endif
#if defined __aarch64__
#define LORASTACK_ARM(...) {__VA_ARGS__}
#else
#define LORASTACK_ARM(...) {never, nullptr, nullptr, nullptr}
#endif

// In the order of abi.h.
const Isa ISAS[LORASTACK_NUM_ISAS] = {
    LORASTACK_X86(has_amx, &amx_bfloat16, nullptr, &avx512_rows),
    LORASTACK_X86(has_avx512_bf16, &avx512_bf16_bfloat16, nullptr, &avx512_rows),
    LORASTACK_X86(has_avx512, &avx512_bfloat16, &avx512_float32, &avx512_rows),
    LORASTACK_X86(has_avx2, &avx2_bfloat16, &avx2_float32, &avx2_rows),
    LORASTACK_ARM(has_neon_bf16, &neon_bf16_bfloat16, nullptr, &neon_rows),
    LORASTACK_ARM(always, &neon_bfloat16, &neon_float32, &neon_rows),
    {always, &plain_bfloat16, &plain_float32, &plain_rows},
};

const StepKernels& kernels(int32_t isa, int32_t half) {
  return half ? *ISAS[isa].bfloat16 : *ISAS[isa].float32;
}

// Calls work(i) for i in 0..count on up to num_threads threads.
template <class Work>
void each(int count, int num_threads, Work&& work) {
  [[maybe_unused]] const int size = num_threads < count ? num_threads : count;
#pragma omp parallel for schedule(guided) num_threads(size > 0 ? size : 1)
  for (int i = 0; i < count; i++) work(i);
}

}  // namespace
}  // namespace lorastack

using namespace lorastack;

int64_t lorastack_scratch_bytes(const lorastack_model* model, const lorastack_step* step) {
  return kernels(model->isa, model->half).scratch_bytes(*model, *step);
}

void lorastack_forward(const lorastack_model* model, const lorastack_step* step) {
  kernels(model->isa, model->half).forward(*model, *step);
}

void lorastack_logits(const lorastack_lm_head* lm_head) {
  kernels(lm_head->isa, lm_head->half).logits(*lm_head);
}

void lorastack_propose(const lorastack_proposal* proposal) {
  kernels(proposal->isa, proposal->half).propose(*proposal);
}

void lorastack_best(int32_t isa, const float* logits, int32_t rows, int32_t columns, float* values,
                    int64_t* places, int32_t num_threads) {
  const auto best = ISAS[isa].rows->best;
  each(rows, num_threads, [=](int row) {
    best(logits + (size_t)row * columns, columns, values + row, places + row);
  });
}

void lorastack_top(int32_t isa, const float* logits, int32_t rows, int32_t columns, int32_t num,
                   int64_t* places, float* logprobs, int32_t num_threads) {
  const auto top = ISAS[isa].rows->top;
  each(rows, num_threads, [=](int row) {
    top(logits + (size_t)row * columns, columns, num, nullptr, places + (size_t)row * num,
        logprobs + (size_t)row * num);
  });
}

void lorastack_sample_rows(int32_t isa, const float* logits, int64_t stride, int32_t columns,
                           const lorastack_sample* samples, int32_t num_samples, int64_t* tokens,
                           int32_t num_threads) {
  const auto sample = ISAS[isa].rows->sample;
  each(num_samples, num_threads, [=](int i) {
    tokens[i] = sample(logits + samples[i].row * stride, columns, samples[i]);
  });
}

void lorastack_quantise(int32_t isa, const uint16_t* weights, int32_t rows, int32_t inputs,
                        int32_t kind, int8_t* codes, uint16_t* scales, int32_t num_threads) {
  const size_t groups = (inputs + 31) / 32;
  const size_t num_scales = kind == LORASTACK_INT8 ? 1 : groups;
  const auto quantise = ISAS[isa].rows->quantise;
  each(rows, num_threads, [=](int row) {
    quantise(weights + (size_t)row * inputs, inputs, kind, codes + row * groups * 32,
             scales + row * num_scales);
  });
}

int32_t lorastack_supports(int32_t isa) {
#if defined __x86_64__
  __builtin_cpu_init();
#endif
  return ISAS[isa].supported();
}
