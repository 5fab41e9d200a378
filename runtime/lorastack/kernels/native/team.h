// The threads of a call, and the phases in which they share its work.
#pragma once

#include <sched.h>

#include "common.h"

#ifdef _OPENMP  // whose header Apple's compiler lacks
extern "C" int omp_get_thread_num();
extern "C" double omp_get_wtime();
#else  // one thread does every thread's part
INLINE int omp_get_thread_num() { return 0; }
#endif

#ifdef LORASTACK_PROFILE
extern "C" double lorastack_phase_seconds[];  // of each phase of thread 0, in order
extern "C" int32_t lorastack_num_phases;
#endif

namespace lorastack::LORASTACK_ISA {

// Tells the processor that this thread waits for another.
INLINE void pause() {
#if defined __x86_64__
  __builtin_ia32_pause();
#elif defined __aarch64__
  __asm__ volatile("yield");
#endif
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
      pause();
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
