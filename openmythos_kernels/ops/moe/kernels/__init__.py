"""The Triton kernels of the moe ops."""
