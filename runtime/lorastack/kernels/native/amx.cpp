#define LORASTACK_ISA amx
#include "heads.h"
#include "worker.h"

LORASTACK_EXPORT(amx, AmxBf16)
LORASTACK_EXPORT_HEADS(amx, AmxBf16)
