"""Launches of the Triton kernels: grids, allocations, choice of configuration. They serve tensors of any device."""
