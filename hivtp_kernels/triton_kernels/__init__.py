"""The `@triton.jit` kernels. `backends/triton.py` launches them and says what they are given."""
