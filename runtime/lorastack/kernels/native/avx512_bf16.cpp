#define LORASTACK_ISA avx512_bf16
#include "worker.h"

LORASTACK_EXPORT(avx512_bf16, Avx512Bf16)
