"""The `@triton.jit` kernels, which `backends/triton.py` launches."""
