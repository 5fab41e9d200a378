"""torch's own settings for sums that are as exact on CUDA as on a CPU."""

from __future__ import annotations

import torch


def ask_for_exact_sums() -> None:
    """Float32 products in float32, sums of 16-bit products in float32, attention without cuDNN.

    For the whole process, before a model is made on a CUDA device. torch would add the parts of a
    product that it splits in 16 bits. cuDNN's attention, the first choice on some devices, makes a
    plan for every new length of a row, which takes many times as long as a step.
    """
    matmul = torch.backends.cuda.matmul
    matmul.allow_tf32 = False
    matmul.allow_bf16_reduced_precision_reduction = False
    matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.enable_cudnn_sdp(False)
