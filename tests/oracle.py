"""The one place with a tolerance, but for the budget of a kernel: that is the package's own, gim_kernels/budget.py.

The truth is an independent formula or the reference in float64; the yardstick is eager PyTorch in the dtype under
test. What is tested may err twice as much as the yardstick, plus rounding of its own result.

One run of the yardstick says little where a result hangs on the last bits of what it is made of: its errors may happen
to cancel. There the rounding is not that of the result but of its terms (:func:`assert_within_terms`), which whoever
asks derives from the formula: to first order, every number on the way rounded once.
"""

from __future__ import annotations

import torch

from gim_kernels.budget import FACTOR, ROUNDING_ULPS, excess, largest_error, relative_error

#: Relative difference allowed between two float64 computations that sum in different orders.
FLOAT64_RELATIVE = 1e-12
#: The same where only a few sums have another order.
FLOAT64_SAME_RELATIVE = 1e-14
#: The same for whole models whose norms run in float32.
FLOAT32_NORMS_RELATIVE = 9e-8
#: The same as the first for whole models, whose depth multiplies it.
FLOAT64_MODEL_RELATIVE = 1e-9
#: The same for one model under two memory plans, which run the same products on other tiles.
FLOAT64_PLAN_RELATIVE = 1e-10
#: The same for scores of a circuit's edges, of models whose norms compute in float32 whatever their dtype is.
CIRCUIT_RELATIVE = 5e-6
#: By how much a model in float32 with all of its edges kept may miss its own logits, or with none the corrupted ones.
CIRCUIT_LOGITS = 1e-5
#: What a pair of 1k tokens may cost on a model of 135M: in times of two forwards and a backward, in peaks of memory of
#: one attribution, and in bytes with the weights.
CIRCUIT_TIMES, CIRCUIT_PEAKS, CIRCUIT_BYTES = 1.5, 2.0, 3 * 10**9
#: Peaks of one attribution where both keep each layer's input alone: 3.03 was measured.
CIRCUIT_LAYER_PEAKS = 3.25
#: What scores by layer or head may cost, in times of an attribution without them.
INSIDE_TIMES = 1.25
#: What one more layer may cost an explanation whose forward is known: calls of functions of Python and C, of which
#: 3,027 were counted under CPython 3.11 (the model's own passes take 173), and nodes of the graph that are described.
CALLS_A_LAYER, NODES_A_LAYER = 3100, 12
#: By how much a predicted peak of memory may miss the measured one.
MEMORY_RELATIVE = 0.10
#: By how much comprehensiveness or sufficiency of a float32 model may miss those of float64, in their own units.
EVALUATION_ABSOLUTE = 1e-4

#: Relative difference allowed between one model in two libraries, each with float32 steps of its own.
LIBRARIES_RELATIVE = 1e-5


def assert_close64(actual: torch.Tensor, truth: torch.Tensor, what: str, relative: float = FLOAT64_RELATIVE) -> None:
    """Two float64 results of the same mathematics agree, as far as float64 has normal numbers for them.

    Args:
        actual: what is tested.
        truth: the independent result.
        what: named in the failure.
        relative: one of this module's float64 constants.
    """
    assert actual.shape == truth.shape, f"{what}: shape {tuple(actual.shape)}, want {tuple(truth.shape)}"
    # Below the smallest normal number a float64 has no relative precision.
    if actual.numel() and largest_difference(actual, truth) <= torch.finfo(torch.float64).tiny:
        return
    for measure in (relative_error, largest_error):
        error = measure(actual, truth)
        assert error <= relative, f"{what}: {measure.__name__} {error:.3g} > {relative:.3g}"


def largest_difference(actual: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest difference of two tensors that are not empty, in their own units."""
    return (actual.detach().double() - truth.detach().double()).abs().max().item()


def assert_within_budget(actual: torch.Tensor, truth: torch.Tensor, yardstick: torch.Tensor, what: str) -> None:
    """A result errs at most :data:`FACTOR` times as much as the yardstick, plus its own rounding.

    Args:
        actual: what is tested, in the dtype under test.
        truth: float64.
        yardstick: eager PyTorch in the dtype under test.
        what: named in the failure.
    """
    assert actual.shape == truth.shape, f"{what}: shape {tuple(actual.shape)}, want {tuple(truth.shape)}"
    assert actual.dtype == yardstick.dtype, f"{what}: dtype {actual.dtype}, want {yardstick.dtype}"
    found = excess(actual, truth, yardstick)
    assert found is None, f"{what}: {found}"


def assert_agree(actual: torch.Tensor, other: torch.Tensor, what: str) -> None:
    """Two libraries that run the same model agree to :data:`LIBRARIES_RELATIVE`; infinities (masks) stand alike.

    Args:
        actual: what is tested.
        other: the other library's result.
        what: named in the failure.
    """
    assert actual.shape == other.shape, f"{what}: shape {tuple(actual.shape)}, want {tuple(other.shape)}"
    finite = torch.isfinite(other)
    assert torch.equal(torch.isfinite(actual), finite), f"{what}: infinities or NaN in other places"
    for measure in (relative_error, largest_error):
        error = measure(actual[finite], other[finite])
        assert error <= LIBRARIES_RELATIVE, f"{what}: {measure.__name__} {error:.3g} > {LIBRARIES_RELATIVE:.3g}"


def assert_memory_close(predicted: int, measured: int, what: str) -> None:
    """A predicted number of bytes is the measured one, within :data:`MEMORY_RELATIVE`."""
    error = abs(predicted - measured) / measured
    assert error <= MEMORY_RELATIVE, f"{what}: predicted {predicted:,} bytes, measured {measured:,} ({error:.1%} off)"


def assert_within_terms(
    actual: torch.Tensor, truth: torch.Tensor, yardstick: torch.Tensor, terms: torch.Tensor, what: str
) -> None:
    """:func:`assert_within_budget` for a result that may cancel: its rounding is that of what was added up.

    Args:
        actual: what is tested, in the dtype under test.
        truth: float64.
        yardstick: eager PyTorch in the dtype under test.
        terms: sum of the absolute values of what the result adds up, each as many times as it is rounded, float64.
        what: named in the failure.
    """
    assert actual.shape == truth.shape == terms.shape, f"{what}: {actual.shape}, {truth.shape}, {terms.shape}"
    assert actual.dtype == yardstick.dtype, f"{what}: dtype {actual.dtype}, want {yardstick.dtype}"
    limits = torch.finfo(actual.dtype)
    # A truth in the dtype under test is rounded itself. Below the smallest normal number no relative precision is left.
    ulps = ROUNDING_ULPS * (2 if actual.dtype == truth.dtype else 1)
    rounding = ulps * limits.eps * torch.maximum(truth.abs(), terms) + limits.smallest_normal
    for measure in (torch.linalg.vector_norm, _largest):
        error, eager = (measure(x.detach().double() - truth).item() for x in (actual, yardstick))
        allowed = FACTOR * eager + measure(rounding).item()
        assert error <= allowed, f"{what}: {measure.__name__} of the error {error:.3g} > {allowed:.3g}"


def _largest(x: torch.Tensor) -> torch.Tensor:
    return x.abs().max() if x.numel() else x.new_zeros(())


def assert_evaluation_close(actual: float, truth: float, what: str) -> None:
    """A value of an evaluation in float32 is that of float64, within :data:`EVALUATION_ABSOLUTE`."""
    assert abs(actual - truth) <= EVALUATION_ABSOLUTE, f"{what}: {actual!r}, want {truth!r}"
