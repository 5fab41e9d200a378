// What every kernel uses: sizes, small helpers.
//
// Everything is compiled once an instruction set, in a namespace of its own (LORASTACK_ISA).
// Every sum is taken in an order that depends on its row alone, never on how many rows run beside
// it, so a row's bits are the same in any batch. Products are fused with sums only where `fma` says so
// (build.py forbids compilers to do it): the same operations give the same bits on every instruction set.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>
#include <utility>

#define INLINE static inline __attribute__((always_inline))
#define INLINE_METHOD inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace lorastack::LORASTACK_ISA {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "pairs of bfloat16 are read as words");

constexpr int LANES = 16;   // float32 lanes, and outputs of a panel
constexpr int K_STEP = 32;  // inputs are padded to it: one AMX tile, one vector of bfloat16

INLINE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Calls work(i) for i in 0..COUNT, as constants: compilers keep an array in registers only where no
// loop indexes it, and one of many sums in memory halves the speed of a product.
template <class Work, int... I>
INLINE void unroll(Work&& work, std::integer_sequence<int, I...>) {
  (work(std::integral_constant<int, I>{}), ...);
}
template <int COUNT, class Work>
INLINE void unroll(Work&& work) {
  unroll(work, std::make_integer_sequence<int, COUNT>{});
}

// Calls work(count) with a count of 1 to MAX as a constant.
template <int MAX, class Work>
INLINE void with_count(int count, Work&& work) {
  if constexpr (MAX > 1)
    if (count < MAX) return with_count<MAX - 1>(count, work);
  work(std::integral_constant<int, MAX>{});
}

// The compiler keeps nothing that it read before, and reads nothing ahead: registers are full of sums.
INLINE void read_nothing_ahead() { __asm__ volatile("" ::: "memory"); }

// Reads the line of `p` into the first cache.
INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// Reads it into the second cache.
INLINE void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace lorastack::LORASTACK_ISA
