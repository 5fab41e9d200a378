#define LORASTACK_ISA amx
#include "worker.h"

LORASTACK_EXPORT(amx, AmxBf16)
