"""Triton kernels of the loop: functions only, nothing that needs a device."""
