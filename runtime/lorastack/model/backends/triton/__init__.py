"""A step as Triton kernels: on a CUDA device, or on a CPU in Triton's interpreter."""
