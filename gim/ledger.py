"""Counts the bytes that are alive, by what they are for, while a model runs on tensors without data."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.flop_counter import flop_registry

from gim_kernels import blockwise, composed, pointwise, reference_engine
from gim_kernels.types import Options

#: What a tensor is alive for: a part's name, or the position of the layer that made it.
Tag = str | int

_OPS = torch.ops.gim_kernels
_META = torch.device("meta")


class Ledger(TorchDispatchMode):
    """Inside, every storage that an operation makes is entered, and struck out when it is freed.

    Floating-point tensors are on the meta device. Integers and booleans, which models look at to build masks and
    positions, stay real, on the CPU.

    Args:
        engine: whose attention is accounted.
        device: type of the device, whose norms and gated products are.
    """

    def __init__(self, engine: str, device: str) -> None:
        super().__init__()
        self.engine = engine
        self.device = device
        #: Where the model is: the position of a layer, or the name of what comes before and after the layers.
        self.where: Tag = "embeddings"
        self.live: Counter[Tag] = Counter()
        self.total = 0
        self.peak = 0
        self.at_peak: tuple[Tag, Counter[Tag]] = ("embeddings", Counter())
        self.flops: Counter[Tag] = Counter()
        self._entries: dict[int, tuple[weakref.ref[Any], Tag, int]] = {}

    def exclude(self, model: nn.Module) -> None:
        """Never enter a model's parameters and buffers."""
        for x in (*model.parameters(), *model.buffers()):
            self._enter(x, 0)

    def add(self, tag: Tag, size: int) -> None:
        """Enter bytes without a tensor; negative ones take them out."""
        self.live[tag] += size
        self._grow(size, 0)

    def move(self, x: torch.Tensor, tag: Tag) -> None:
        """What a tensor is alive for has changed."""
        key = x.untyped_storage()._cdata
        if key in self._entries:
            reference, before, size = self._entries[key]
            self._entries[key] = (reference, tag, size)
            self.live[before] -= size
            self.live[tag] += size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        func_args, func_kwargs = _on_one_device(func, args, kwargs)
        out = func(*func_args, **func_kwargs)
        for x in tree_flatten(out)[0]:
            if isinstance(x, torch.Tensor):
                self._enter(x, None)
        self._count(func, func_args, func_kwargs, out)
        return out

    def _enter(self, x: torch.Tensor, size: int | None) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._entries:
            return
        size = storage.nbytes() if size is None else size
        reference = weakref.ref(storage, lambda _, key=key: self._strike(key))  # type: ignore[misc]
        self._entries[key] = (reference, self.where, size)
        self.live[self.where] += size
        self._grow(size, 0)

    def _strike(self, key: int) -> None:
        _, tag, size = self._entries.pop(key)
        self.live[tag] -= size
        self.total -= size

    def _grow(self, size: int, workspace: int) -> None:
        self.total += size
        if self.total + workspace > self.peak:
            self.peak = self.total + workspace
            live = Counter(self.live)
            live[self.where] += workspace
            self.at_peak = (self.where, live)

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Floating-point operations of a matrix product or of attention, and what attention holds as it runs."""
        if func is _OPS.attention.default:
            query, key, value, sinks, _, scale, causal, window, softcap = args[:9]
            options = Options(scale, causal, window, softcap)
            self.flops[self.where] += 2 * _product(query, key, causal, window)
            if self.engine == "blockwise":
                plain = blockwise.runs_torchs_kernel(query, key, options, sinks is None)
                self._grow(0, blockwise.forward_workspace(query, key, value, options, plain))
            elif self.engine == "composed":
                self._grow(0, composed.forward_workspace(query, key, value, options))
            elif self.engine == "reference":
                self._grow(0, reference_engine.forward_workspace(query, key))
        elif func is _OPS.attention_backward.default:
            query, key, value, _, _, scale, causal, window, softcap, softmax_backward, temperature = args[1:12]
            self.flops[self.where] += (2 if softmax_backward == "constant" else 5) * _product(
                query, key, causal, window
            )
            if self.engine in ("blockwise", "composed"):
                engine = blockwise if self.engine == "blockwise" else composed
                options = Options(scale, causal, window, softcap)
                rule = (softmax_backward, temperature)
                self._grow(0, engine.backward_workspace(query, key, value, options, *rule))
            elif self.engine == "reference":
                self._grow(0, reference_engine.backward_workspace(query, key))
            else:
                # Two or three numbers for each row, handed from one kernel to the next.
                self._grow(0, 3 * 4 * query.shape[:3].numel())
        elif func in _WORKSPACE:
            if self.device == "cpu":
                self._grow(0, _WORKSPACE[func](*args))
        elif func.overloadpacket in flop_registry:
            self.flops[self.where] += flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)


def _product(query: torch.Tensor, key: torch.Tensor, causal: bool, window: int | None) -> int:
    """Operations of one matrix product over the scores that the mask leaves."""
    batch, heads, queries, size = query.shape
    keys = key.shape[2]
    seen = queries * keys
    if causal:
        seen -= queries * (queries - 1) // 2
    if window is not None:
        seen = min(seen, queries * window)
    return 2 * batch * heads * seen * size


def _on_one_device(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Arguments such that floating-point results are on the meta device and all others real."""
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    if kwargs.get("device") is not None and torch.device(kwargs["device"]) == _META:
        dtype = kwargs.get("dtype") or (tensors[0].dtype if tensors else None)
        if dtype is None:
            dtype = torch.get_default_dtype() if any(isinstance(x, float) for x in args) else torch.int64
        if not dtype.is_floating_point and not any(x.is_meta for x in tensors):
            kwargs = {**kwargs, "device": torch.device("cpu")}
    if any(x.is_meta for x in tensors) and not all(x.is_meta for x in tensors):
        args, kwargs = tree_map_only(torch.Tensor, lambda x: x if x.is_meta else x.to(_META), (args, kwargs))
    return args, kwargs


def _norm_backward(*args: Any) -> int:
    frozen, _, (_, need_weight, _) = args[6:]
    return pointwise.norm_backward_workspace(args[0], frozen, need_weight)


#: What the code that runs an operator on a CPU holds for a moment, from the operator's own arguments.
_WORKSPACE: dict[Any, Callable[..., int]] = {
    _OPS.rms_norm.default: lambda x, *_: pointwise.forward_workspace(x),
    _OPS.norm_backward.default: _norm_backward,
    _OPS.gated_backward.default: lambda grad_y, gate, up, activation, scale, rule, *_: (
        pointwise.gated_backward_workspace(gate, activation, rule)
    ),
}
