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
#define INLINE_METHOD inline __attribute__((always_inline))

#ifdef LORASTACK_PROFILE
#include <omp.h>
extern "C" double lorastack_phase_seconds[];  // of each phase of thread 0, in order
extern "C" int32_t lorastack_num_phases;
#endif

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

// e^x for x <= 0 to about 2 ulp; 0 below -87; NaN stays NaN.
INLINE __m512 exp_512(__m512 x) {
  const __m512 live = _mm512_set1_ps(-87.0f);
  __mmask16 alive = _mm512_cmp_ps_mask(x, live, _CMP_NLT_UQ);
  x = _mm512_max_ps(live, x);  // of a NaN and a number it gives the second
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

// x sigmoid(x). exp of minus the absolute value cannot overflow.
INLINE __m512 silu_512(__m512 x) {
  const __m512 e = exp_512(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(x)));
  const __m512 one = _mm512_set1_ps(1.0f);
  const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
  return _mm512_mul_ps(
      x, _mm512_div_ps(_mm512_mask_mov_ps(one, negative, e), _mm512_add_ps(one, e)));
}

// Transposes a matrix of 16 vectors.
INLINE void transpose_16(__m512 v[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    const __m512d a = _mm512_castps_pd(t[i]), b = _mm512_castps_pd(t[i + 2]);
    const __m512d c = _mm512_castps_pd(t[i + 1]), d = _mm512_castps_pd(t[i + 3]);
    v[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
    v[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    v[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(c, d));
    v[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_f32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(v[i], v[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; i++) {
    v[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
  }
}

// Columns begin..end of a 16 x 16 tile, at their places in `columns`: few by gathers, many at once.
INLINE void tile_columns(const float (*tile)[LANES], int begin, int end, __m512 columns[LANES]) {
  if (end - begin > 4) {
    for (int i = 0; i < LANES; i++) columns[i] = _mm512_load_ps(tile[i]);
    transpose_16(columns);
    return;
  }
  const __m512i lines = _mm512_mullo_epi32(
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
      _mm512_set1_epi32(LANES));
  for (int i = begin; i < end; i++)
    columns[i] = _mm512_i32gather_ps(lines, tile[0] + i, sizeof(float));
}

struct Range {
  int begin, end;
};

// The part of 0..count that belongs to a thread.
INLINE Range range_of(int count, int thread, int size) {
  return {(int)((int64_t)count * thread / size), (int)((int64_t)count * (thread + 1) / size)};
}

// A counter with a cache line of its own, as threads count at the same time.
struct alignas(64) Counter {
  volatile int value;
};

struct Team {
  Counter* counters;  // zeroed; a phase has one for chunks done, and one a thread for chunks taken
  int size;
};

INLINE int64_t num_counters(int64_t phases, int size) { return phases * (size + 1); }

// One thread of a team, in a step of phases.
//
// A phase of a step: chunks of work that do not depend on each other. A thread takes those of its
// own part, then what others have left, and goes on when all are done, whoever did them. A thread
// that the system has put aside delays the others by the chunk it holds, not by its absence.
class Member {
 public:
  Member(const Team& team, int thread) : team_(team), thread_(thread) {}

  // work(chunk) for all of 0..count, here or elsewhere. Every thread calls the same phases.
  template <class Work>
  INLINE_METHOD void phase(int count, Work&& work) {
#ifdef LORASTACK_PROFILE
    const double began = omp_get_wtime();
#endif
    Counter* const mine = team_.counters + num_counters(phase_++, team_.size);
    int finished = 0;
    for (int i = 0; i < team_.size; i++) {
      const int owner = (thread_ + i) % team_.size;
      const Range range = range_of(count, owner, team_.size);
      Counter& taken = mine[1 + owner];
      if (taken.value >= range.end - range.begin) continue;
      for (;;) {
        const int chunk = range.begin + __atomic_fetch_add(&taken.value, 1, __ATOMIC_RELAXED);
        if (chunk >= range.end) break;
        work(chunk);
        finished++;
      }
    }
    int done = __atomic_add_fetch(&mine->value, finished, __ATOMIC_ACQ_REL);
    for (int spins = 0; done < count; spins++) {
      _mm_pause();
      if (spins > SPINS) sched_yield();
      done = __atomic_load_n(&mine->value, __ATOMIC_ACQUIRE);
    }
#ifdef LORASTACK_PROFILE
    if (thread_ == 0) lorastack_phase_seconds[lorastack_num_phases++] = omp_get_wtime() - began;
#endif
  }

 private:
  static constexpr int SPINS = 4000;
  const Team& team_;
  const int thread_;
  int64_t phase_ = 0;
};

}  // namespace lorastack::LORASTACK_ISA
