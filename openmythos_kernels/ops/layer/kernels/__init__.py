"""Triton kernels of one token per row through whole layers: functions only, nothing that needs a device."""
