"""Fast drop-in modules and kernels for Recurrent-Depth Transformers."""
