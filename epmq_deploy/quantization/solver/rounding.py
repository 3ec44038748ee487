"""Rounding to the nearest integer by adding a constant.

Adding and subtracting ``ROUND[dtype]`` rounds to the nearest integer, ties to even, as
``torch.round`` does: at that size a floating-point number has no digits left behind the point.
``torch.round`` would start threads for only 2,048 values, which costs more than the rounding.
"""

import torch

# Holds for numbers below 2**51 and 2**22.
ROUND = {torch.float64: 1.5 * 2**52, torch.float32: 1.5 * 2**23}
