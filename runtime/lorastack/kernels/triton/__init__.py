"""Triton kernels of a step on CUDA devices, one file a kind; their contracts stand in `kernels`.

With TRITON_INTERPRET=1 they run on CPU tensors, one program after the other: right, and slow.
"""
