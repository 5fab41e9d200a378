#define LORASTACK_ISA avx512
#include "best.h"
#include "heads.h"
#include "sample.h"
#include "worker.h"

LORASTACK_EXPORT(avx512, Avx512F32)
LORASTACK_EXPORT_HEADS(avx512, Avx512F32)

namespace lorastack::avx512 {

void run_best(const float* logits, int rows, int columns, float* values, int64_t* places,
              int num_threads) {
#pragma omp parallel for num_threads(num_threads < rows ? num_threads : rows)
  for (int row = 0; row < rows; row++)
    best_of(logits + (size_t)row * columns, columns, values + row, places + row);
}

void run_top(const float* logits, int rows, int columns, int num, int64_t* places,
             float* logprobs, int num_threads) {
#pragma omp parallel for num_threads(num_threads < rows ? num_threads : rows)
  for (int row = 0; row < rows; row++)
    top_of(logits + (size_t)row * columns, columns, num, nullptr, places + (size_t)row * num,
           logprobs + (size_t)row * num);
}

void run_samples(const float* logits, int64_t stride, int columns, const lorastack_sample* samples,
                 int num_samples, int64_t* tokens, int num_threads) {
  const int size = std::max(1, std::min(num_threads, num_samples));
#pragma omp parallel for schedule(dynamic) num_threads(size)
  for (int i = 0; i < num_samples; i++)
    tokens[i] = sample_of(logits + samples[i].row * stride, columns, samples[i]);
}

}  // namespace lorastack::avx512
