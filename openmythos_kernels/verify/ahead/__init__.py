"""Every Triton kernel in every shipped configuration, compiled for GPUs that need not be there."""
