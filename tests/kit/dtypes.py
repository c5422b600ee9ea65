"""Floating-point types that tests run in."""

import torch

LOW = (torch.float32, torch.bfloat16, torch.float16)  # what the kernels are measured in
ALL = (torch.float64, *LOW)
