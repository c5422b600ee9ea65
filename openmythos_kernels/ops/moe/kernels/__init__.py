"""Triton kernels of the experts: functions only, nothing that needs a device."""
