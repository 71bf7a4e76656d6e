"""Triton kernels for CUDA, one file an operation, each tested against its torch reference in `hadal.ops`.

They hold no backward: training takes the differentiable path. With TRITON_INTERPRET=1 they run on a CPU (FP32
only: the interpreter's BF16 arithmetic is not faithful).
"""
