"""Every Triton kernel in every shipped configuration, compiled for GPUs that this machine need not have."""
