#define LORASTACK_ISA avx512
#include "worker.h"

LORASTACK_EXPORT(avx512, Avx512F32)
