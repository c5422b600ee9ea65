"""Launches of the Triton kernels: outputs, grids and configurations. They take tensors of any device."""
