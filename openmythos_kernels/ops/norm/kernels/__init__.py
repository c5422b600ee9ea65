"""Triton kernels of RMSNorm: functions only, nothing that needs a device."""
