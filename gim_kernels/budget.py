"""How far a result may be off: the one rule by which kernels are judged, where they run and in the tests.

The yardstick is eager PyTorch in the dtype under test, the truth the same in float64. A result may err twice as much as
the yardstick, plus rounding of its own.
"""

from __future__ import annotations

import torch

#: Units in the last place granted to the rounding of a result, in each measure.
ROUNDING_ULPS = 4
#: How much worse than eager PyTorch in the same dtype a result may be.
FACTOR = 2.0


def relative_error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    """Norm of the difference over the norm of the truth; the norm of the difference where the truth is 0."""
    actual, truth = actual.detach().double(), truth.detach().double()
    difference, size = (actual - truth).norm().item(), truth.norm().item()
    return difference / size if size else difference


def largest_error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest difference over the largest entry of the truth; the largest difference where the truth is 0."""
    if truth.numel() == 0:
        return 0.0
    actual, truth = actual.detach().double(), truth.detach().double()
    difference, size = (actual - truth).abs().max().item(), truth.abs().max().item()
    return difference / size if size else difference


def excess(actual: torch.Tensor, truth: torch.Tensor, yardstick: torch.Tensor) -> str | None:
    """What is too much about a result, in words; None where it is within its budget.

    The error is measured as a norm over the whole tensor and as the largest entry, so that neither a broad bias nor one
    wrong entry can hide. A NaN is too much.

    Args:
        actual: what is judged, in the dtype under test.
        truth: float64.
        yardstick: eager PyTorch in the dtype under test.
    """
    rounding = ROUNDING_ULPS * torch.finfo(actual.dtype).eps
    # Results below the smallest normal number are rounded to multiples of the smallest number of all.
    multiple = torch.full_like(truth, torch.finfo(actual.dtype).smallest_normal * torch.finfo(actual.dtype).eps)
    for measure in (relative_error, largest_error):
        error = measure(actual, truth)
        coarse = measure(truth.detach().double() + multiple.double(), truth)
        allowed = FACTOR * measure(yardstick, truth) + rounding + coarse
        if not error <= allowed:
            return f"{measure.__name__} {error:.3g} > {allowed:.3g}"
    return None
