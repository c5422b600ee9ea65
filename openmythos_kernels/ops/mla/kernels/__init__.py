"""Triton kernels of latent attention: functions only, nothing that needs a device."""
