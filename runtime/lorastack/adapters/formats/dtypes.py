"""Dtypes of an adapter's tensors as torch has them: apart, as folders are parsed without torch."""

from __future__ import annotations

import torch

DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
