// Shared by the native kernels: element types, conversions, the team of threads.
//
// Everything is compiled once an instruction set, in a namespace of its own (LORASTACK_ISA).
// Every sum is taken in an order that depends on its row alone, never on how many rows run beside
// it, so a row's bits are the same in any batch.
#pragma once

#include <immintrin.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

namespace lorastack::LORASTACK_ISA {

constexpr int LANES = 16;   // float32 lanes, and outputs of a panel
constexpr int K_STEP = 32;  // inputs are padded to it: one AMX tile, one bfloat16 vector

INLINE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// bfloat16 and float32 elements behind one interface. Vectors hold 16 floats.
#ifdef __AVX512BF16__
struct BF16 {
  using T = uint16_t;
  static constexpr bool half = true;
  INLINE __m512 load(const T* p) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
  }
  INLINE __m512 load(const T* p, __mmask16 m) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p)), 16));
  }
  INLINE void store(T* p, __m512 v) {
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v));
  }
  INLINE void store(T* p, __m512 v, __mmask16 m) {
    _mm256_mask_storeu_epi16(p, m, (__m256i)_mm512_cvtneps_pbh(v));
  }
};
#endif

struct F32 {
  using T = float;
  static constexpr bool half = false;
  INLINE __m512 load(const T* p) { return _mm512_loadu_ps(p); }
  INLINE __m512 load(const T* p, __mmask16 m) { return _mm512_maskz_loadu_ps(m, p); }
  INLINE void store(T* p, __m512 v) { _mm512_storeu_ps(p, v); }
  INLINE void store(T* p, __m512 v, __mmask16 m) { _mm512_mask_storeu_ps(p, m, v); }
};

INLINE __mmask16 first(int n) { return (__mmask16)(n >= 16 ? 0xffff : (1u << n) - 1); }

// e^x for x <= 0 to about 2 ulp; 0 below -87.
INLINE __m512 exp_512(__m512 x) {
  const __m512 live = _mm512_set1_ps(-87.0f);
  __mmask16 alive = _mm512_cmp_ps_mask(x, live, _CMP_GE_OQ);
  x = _mm512_max_ps(x, live);
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_maskz_scalef_ps(alive, p, n);
}

// The threads of one parallel region. A barrier spins briefly and then gives way, so that a
// neighbour on a shared core costs a time slice, not a stall.
struct Team {
  int size;
  volatile int arrived;
  volatile int round;
};

INLINE void wait(Team* team) {
  if (team->size == 1) return;
  int round = __atomic_load_n(&team->round, __ATOMIC_ACQUIRE);
  if (__atomic_add_fetch(&team->arrived, 1, __ATOMIC_ACQ_REL) == team->size) {
    __atomic_store_n(&team->arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&team->round, round + 1, __ATOMIC_RELEASE);
    return;
  }
  for (int spins = 0; __atomic_load_n(&team->round, __ATOMIC_ACQUIRE) == round; spins++) {
    _mm_pause();
    if (spins > 4000) sched_yield();
  }
}

struct Range {
  int begin, end;
};

// The part of `count` things that belongs to a thread.
INLINE Range part(int count, int thread, int size) {
  return {(int)((int64_t)count * thread / size), (int)((int64_t)count * (thread + 1) / size)};
}

}  // namespace lorastack::LORASTACK_ISA
