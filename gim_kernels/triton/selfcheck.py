"""The first use of a variant in a process is held against the reference, on a small problem that the variant solves.

A kernel that was compiled for a device nobody has tried may be wrong there, and nothing in its numbers would say so.
What is in the table of :mod:`gim_kernels.triton.verified` is taken as right; the interpreter, which is for tests, too.
During a capture nothing can be compared, and the next use outside it is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

from gim_kernels import reference
from gim_kernels.budget import excess
from gim_kernels.inner_autograd import gradients, leaf, recording
from gim_kernels.triton import verified
from gim_kernels.triton.attention_fold import fold_parts
from gim_kernels.triton.attention_grad import attention_backward
from gim_kernels.triton.attention_out import attention_forward
from gim_kernels.triton.device import interpreted
from gim_kernels.triton.dispatch import noted
from gim_kernels.triton.gated import ACTIVATIONS, gated_backward, gated_forward
from gim_kernels.triton.norm import layer_norm_forward, norm_backward, rms_norm_forward
from gim_kernels.triton.tiles import DESCRIBED, TRITON_TYPES, Variant, architecture_of
from gim_kernels.types import Options

Tensors = tuple[torch.Tensor | None, ...]
Results = dict[str, torch.Tensor | None]
_TYPES = {short: dtype for dtype, short in TRITON_TYPES.items()} | {"i32": torch.int32}
#: A rule and temperature for each of the kernels' rules.
_RULES: dict[str, tuple[str, float]] = {
    "exact": ("exact", 1.0),
    "square": ("temperature", 2.0),
    "warm": ("temperature", 3.0),
    "sharp": ("temperature", 0.5),
    "constant": ("constant", 1.0),
}
_SCALES = (0.25, 0.75, 0.5)
_EPS, _OFFSET = 1e-5, 0.5


class KernelError(RuntimeError):
    """A kernel gives other numbers on a device than the reference."""


class Problem(NamedTuple):
    """A small problem: how the kernels solve it, and how the reference does.

    Args:
        inputs: tensors on the device, in the dtypes under test.
        kernels: their results by name, None what is not asked for.
        reference: the same by the specification, for inputs in any floating-point dtype.
    """

    inputs: Tensors
    kernels: Callable[..., Results]
    reference: Callable[..., Results]


#: What has been found right in this process, by device and name.
_right: dict[int, set[str]] = {}


def found_right(index: int) -> list[str]:
    """The names of the variants that were checked on a device in this process, sorted."""
    return sorted(_right.get(index, ()))


def first_use(variant: Variant, x: torch.Tensor) -> None:
    """Check a variant that is about to run on the device of ``x``, unless it is known to be right there.

    Raises:
        KernelError: it is not.
    """
    if not interpreted() and not torch.cuda.is_current_stream_capturing():
        index = x.get_device()
        if variant.name not in _right.get(index, ()) and variant.name not in verified.on_device(index):
            check(variant, x.device)


def check(variant: Variant, device: torch.device) -> None:
    """Hold a variant against the reference.

    Raises:
        KernelError: a result of the small problem is off by more than its budget, or it did not take the variant.
    """
    index = -1 if device.index is None else device.index
    where = f"{variant.name} on {verified.device_name(index)}"
    with _undisturbed(), noted() as launched:
        problem = _PROBLEMS[variant.kernel.__name__](variant, device)
        got = problem.kernels(*problem.inputs)
        truth = problem.reference(*(_floating(x, torch.float64) for x in problem.inputs))
        yardstick = problem.reference(*problem.inputs)
        for name, result in got.items():
            if result is None:
                continue
            true, rough = truth[name], yardstick[name]
            assert true is not None and rough is not None
            if (wrong := excess(result, true, rough)) is not None:
                raise KernelError(
                    f"the kernel {where} gives a wrong {name} ({wrong}): nothing that it computes there can be "
                    'trusted. Choose engine="composed" or "blockwise", and report this'
                )
    if variant.name not in launched:
        raise KernelError(f"the kernel {where} could not be checked: its problem ran {sorted(set(launched))}")
    _right.setdefault(index, set()).add(variant.name)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Inside, nothing that the caller has switched on sees or changes what runs."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch._C.DisableTorchFunction())
        stack.enter_context(_disable_current_modes())
        for kind in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _floating(x: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return x if x is None or not x.is_floating_point() else x.to(dtype)


def _leaves(tensors: Tensors, needs: tuple[bool, ...]) -> list[Any]:
    """From which the reference's gradients go to those that are needed."""
    return [None if x is None else leaf(x, need) for x, need in zip(tensors, needs, strict=True)]


def _normal(*shape: int, seed: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu").to(dtype).to(device)


def _type(variant: Variant, pointer: str) -> torch.dtype | None:
    """The dtype behind one of a variant's pointers; None where it has none."""
    kind = variant.signature.get(pointer, "constexpr").removeprefix("*").removeprefix("tensordesc<").partition("[")[0]
    return _TYPES.get(kind)


def _has(variant: Variant, argument: str) -> bool:
    return variant.signature.get(argument, "constexpr") != "constexpr"


# ---- attention


def _attention(variant: Variant, device: torch.device) -> Problem:
    constants = variant.constants
    dtype, size = _type(variant, "key_ptr"), constants["HEAD_SIZE"]
    assert dtype is not None
    keys = 2 * max(constants["BLOCK_T"], constants["BLOCK_S"]) + 9
    described = variant.signature["key_ptr"].startswith("tensordesc")
    capped, ranged = _has(variant, "inner"), _has(variant, "key_range_ptr")
    batch, heads, key_heads, queries = 1 + ranged, 2, 1, keys - 4
    options = Options(
        1.5 / size**0.5, constants["CAUSAL"], keys // 2 if _has(variant, "window") else None, 2.0 if capped else None
    )
    # Where aligned tensors would be read through descriptors and this variant does not, an address in between.
    aligned = described or capped or ranged or architecture_of(torch.empty(0, device=device)) not in DESCRIBED

    def tensor(count: int, length: int, seed: int) -> torch.Tensor:
        memory = torch.empty(batch * count * length * size + 1, dtype=dtype, device=device)[0 if aligned else 1 :]
        like = _normal(batch, count, length, size, seed=seed, dtype=torch.float32, device=device)
        return memory[: like.numel()].view(like.shape).copy_(like)

    sinks_type = _type(variant, "sinks_ptr")
    sinks = None if sinks_type is None else torch.linspace(-1, 1, heads, device=device).to(sinks_type)
    key_range = torch.tensor([[0, keys], [3, keys - 5]], dtype=torch.int32, device=device) if ranged else None
    inputs = (
        tensor(heads, queries, 0),
        tensor(key_heads, keys, 1),
        tensor(key_heads, keys, 2),
        sinks,
        key_range,
        tensor(heads, queries, 3),
    )
    softmax_backward, temperature = _RULES[constants.get("RULE", "exact")]
    needs = (
        _has(variant, "grad_query_ptr"),
        _has(variant, "grad_key_ptr") or (_has(variant, "shift_ptr") and "grad_sink_ptr" in variant.signature),
        _has(variant, "grad_value_ptr"),
        _has(variant, "grad_sink_ptr"),
    )
    rule: dict[str, Any] = {"softmax_backward": softmax_backward, "temperature": temperature, "grad_scale": _SCALES}
    names = ("gradient of query", "gradient of key", "gradient of value", "gradient of sinks")

    def kernels(query: Any, key: Any, value: Any, sinks: Any, key_range: Any, grad_out: Any) -> Results:
        out, lse = attention_forward(query, key, value, sinks, key_range, options)
        if not any(needs):
            return {"output": out}
        read = (grad_out, query, key, value, sinks, key_range, out, lse)
        grads = attention_backward(*read, options, **rule, needs=needs)
        return dict(zip(names, grads, strict=True))

    def specified(query: Any, key: Any, value: Any, sinks: Any, key_range: Any, grad_out: Any) -> Results:
        leaves = q, k, v, s = _leaves((query, key, value, sinks), needs)
        with recording():
            out = reference.attention(q, k, v, sinks=s, key_range=key_range, **rule, **vars(options))
        if not any(needs):
            return {"output": out}
        return dict(zip(names, gradients(out, grad_out, leaves), strict=True))

    return Problem(inputs, kernels, specified)


def _fold_parts(variant: Variant, device: torch.device) -> Problem:
    dtype = _type(variant, "out_ptr")
    assert dtype is not None
    shape = (3, 2, 2, variant.constants["BLOCK_ROWS"] + 5, variant.constants["HEAD_SIZE"])

    def kernels(partial: torch.Tensor) -> Results:
        out = torch.empty(shape[1:], dtype=dtype, device=device)
        fold_parts(partial, out)
        return {"sum": out}

    def specified(partial: torch.Tensor) -> Results:
        return {"sum": partial.sum(0).to(torch.float64 if partial.dtype == torch.float64 else dtype)}

    return Problem((_normal(*shape, seed=0, dtype=torch.float32, device=device),), kernels, specified)


# ---- rows


def _matrix(variant: Variant, columns: int, seed: int, dtype: torch.dtype | None, device: torch.device) -> Any:
    """``[3, columns]``, or ``[2, 3, columns]`` whose rows need several strides; None without a dtype."""
    if dtype is None:
        return None
    if not _has(variant, "size1"):
        return _normal(3, columns, seed=seed, dtype=dtype, device=device)
    return _normal(3, 2, columns, seed=seed, dtype=dtype, device=device).transpose(0, 1)


def _norm(variant: Variant, device: torch.device) -> Problem:
    whole = variant.constants.get("ONE_PASS")
    columns = 130 if whole is None else variant.constants["BLOCK_COLUMNS"] - 3 if whole else 2**14 + 5
    centre = variant.name.startswith("gim_layer")
    sums = _has(variant, "partial_weight_ptr"), _has(variant, "partial_bias_ptr")
    dtype = _type(variant, "x_ptr") or _type(variant, "grad_y_ptr") or torch.float32
    folds = variant.kernel.__name__ == "fold_kernel"
    sums = (True, False) if folds else sums
    needs = ("grad_x_ptr" in variant.signature, *sums)
    frozen = not _has(variant, "x_ptr") and not folds
    weight_type, bias_type = _type(variant, "weight_ptr"), _type(variant, "bias_ptr")
    weight_type = dtype if sums[0] else weight_type
    bias_type = dtype if sums[1] else bias_type

    def parameter(seed: int, kind: torch.dtype | None) -> torch.Tensor | None:
        return None if kind is None else _normal(columns, seed=seed, dtype=kind, device=device)

    x = _matrix(variant, columns, 0, dtype, device)
    grad_y = _matrix(variant, columns, 1, _type(variant, "grad_y_ptr") or dtype, device)
    offset = 0.0 if centre else _OFFSET
    names = ("gradient of x", "gradient of weight", "gradient of bias")

    def kernels(x: Any, weight: Any, bias: Any, grad_y: Any) -> Results:
        mean = None
        if centre:
            y, mean, inverse = layer_norm_forward(x, weight, bias, _EPS)
        else:
            y, inverse = rms_norm_forward(x, weight, _EPS, offset)
        if not any(needs):
            return {"output": y}
        kept = x if not frozen or sums[0] else None
        grads = norm_backward(grad_y, kept, weight, mean, inverse, offset, frozen=frozen, needs=needs)
        rounded = (None if g is None else g.to(dtype) for g in grads)
        return dict(zip(names, rounded, strict=True))

    def specified(x: Any, weight: Any, bias: Any, grad_y: Any) -> Results:
        leaves = x, weight, bias = _leaves((x, weight, bias), needs)
        with recording():
            if centre:
                y = reference.layer_norm(x, weight, bias, _EPS, frozen=frozen)
            else:
                y = reference.rms_norm(x, weight, _EPS, weight_offset=offset, frozen=frozen)
        if not any(needs):
            return {"output": y.detach()}
        return dict(zip(names, gradients(y, grad_y, leaves), strict=True))

    return Problem((x, parameter(2, weight_type), parameter(3, bias_type), grad_y), kernels, specified)


def _gated(variant: Variant, device: torch.device) -> Problem:
    block, several = variant.constants["BLOCK_COLUMNS"], _has(variant, "size1")
    dtype = _type(variant, "gate_ptr")
    assert dtype is not None
    activation = {number: name for name, number in ACTIVATIONS.items()}[variant.constants["ACTIVATION"]]
    rows = (2, 3) if several else (1,)
    gate, up, grad_y = (_normal(*rows, block - 3, seed=seed, dtype=dtype, device=device) for seed in range(3))
    if several:
        up = up.transpose(0, 1).contiguous().transpose(0, 1)
    needs = (_has(variant, "grad_gate_ptr"), _has(variant, "grad_up_ptr"))
    rule = "ratio" if variant.constants.get("RATIO") else "exact"
    options: dict[str, Any] = {"grad_scale": _SCALES[:2], "activation_backward": rule}
    names = ("gradient of gate", "gradient of up")

    def kernels(gate: Any, up: Any, grad_y: Any) -> Results:
        if not any(needs):
            return {"output": gated_forward(gate, up, activation)}
        return dict(zip(names, gated_backward(grad_y, gate, up, activation, needs=needs, **options), strict=True))

    def specified(gate: Any, up: Any, grad_y: Any) -> Results:
        leaves = gate, up = _leaves((gate, up), needs)
        with recording():
            y = reference.gated(gate, up, activation, **options)
        return dict(zip(names, gradients(y, grad_y, leaves), strict=True)) if any(needs) else {"output": y.detach()}

    return Problem((gate, up, grad_y), kernels, specified)


#: By the name of the kernel.
_PROBLEMS: dict[str, Callable[[Variant, torch.device], Problem]] = {
    "attention_forward_kernel": _attention,
    "grad_query_kernel": _attention,
    "grad_key_value_kernel": _attention,
    "fold_parts_kernel": _fold_parts,
    "norm_forward_kernel": _norm,
    "norm_backward_kernel": _norm,
    "norm_backward_weight_kernel": _norm,
    "fold_kernel": _norm,
    "gated_forward_kernel": _gated,
    "gated_backward_kernel": _gated,
}
