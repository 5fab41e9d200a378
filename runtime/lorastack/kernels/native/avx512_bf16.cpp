#define LORASTACK_ISA avx512_bf16
#include "heads.h"
#include "worker.h"

LORASTACK_EXPORT(avx512_bf16, Avx512Bf16)
LORASTACK_EXPORT_HEADS(avx512_bf16, Avx512Bf16)
