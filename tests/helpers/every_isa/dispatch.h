// For dispatch.cpp: this CPU has everything.
#include <cpuid.h>
#include <sys/syscall.h>

#define __builtin_cpu_supports(name) 1
#define __get_cpuid_count(leaf, part, a, b, c, d) (*(d) = ~0u)
#undef SYS_arch_prctl
#define SYS_arch_prctl SYS_sched_yield  // which succeeds
