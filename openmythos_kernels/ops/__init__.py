"""Custom operators by family. Each has the ops, kernels/ (Triton), launch/ (outputs and grids) and configs.py."""
