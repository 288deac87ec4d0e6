"""MLPs that run again in the backward, a tile of tokens at a time.

What maps each token by itself may be run on any part of the tokens. Such modules are found by running them, whatever
their class: nothing here knows a model.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrize import ParametrizationList

from gim.intercept.gates import Changes, original_forward
from gim.parts import anatomy
from gim.parts.adapters import accelerate
from gim.parts.adapters.torch_modules import written
from gim.parts.hidden_states import device_of, dtypes_taken, weights_of
from gim.parts.layers import attentions, looks_like_norm
from gim.parts.placement import PLAIN, home_of

#: Tokens of a probe, and roundings by which the same token may differ between two batches of tokens.
PROBE_TOKENS = 5
PROBE_ULPS = 16
#: Size of the numbers of an outlier: int8 layers that keep those apart do so for every token of the batch. Tokens
#: beside it that are quiet show code that does one thing or another to all of them by how large any is.
PROBE_OUTLIER, PROBE_QUIET = 100.0, 0.1

Forward = Callable[[torch.Tensor], torch.Tensor]


class MLP(NamedTuple):
    """A module that maps each token by itself.

    Args:
        name: among its layer's children.
        module: it.
        whole: why only all tokens together give what the model gives, in words; empty where parts do.
        norms: the names of its layer's norms that map each token by themselves too, and may run with it in parts.
    """

    name: str
    module: nn.Module
    whole: str
    norms: tuple[str, ...]


#: An outlier changes what the other tokens get by a rounding of the weights' dtype.
OUTLIERS = "an outlier at one token changes its output at others"
HOOKED = "a hook inside it is to see all tokens"


def find_mlps(layer: nn.Module, width: int | None, dtype: torch.dtype) -> list[MLP] | str:
    """The children of a layer that are MLPs: they map ``[B, T, width]`` to the same shape, each token by itself.

    Args:
        layer: a decoder layer with its weights; inside a context or not.
        width, dtype: of the hidden states.

    Returns:
        The MLPs, or the reason, in words, why there is none.
    """
    if width is None:
        return "the model's config does not tell the width of its hidden states"
    norms = tuple(
        name
        for name, child in layer.named_children()
        if looks_like_norm(norm := written(child))
        and (not (is_users(type(norm).forward) or sets_forward(norm)) or maps_each_token(norm, width, dtype))
    )
    found: list[MLP] = []
    reason = "has no child that maps each token by itself, with one tensor in and one out"
    for name, held in layer.named_children():
        child = written(held)
        matrices = [weight for weight in weights_of(child) if weight.dim() >= 2]
        if len(matrices) < 2 or attentions(child):
            continue
        inside = anatomy.of(child).modules
        if any(weight.dim() > 2 for weight in matrices) or any(
            isinstance(module, nn.ModuleList) and not isinstance(module, ParametrizationList)
            for module in inside.values()
        ):
            reason = f"its {name} ({type(child).__name__}) is a mixture of experts, not one MLP for every token"
            continue
        if without_hooks(child) is None:
            reason = (
                f"the forward of its {name} ({type(child).__name__}), or of a module in it, has been set from outside"
            )
            continue
        alone = maps_each_token(child, width, dtype)
        if alone is not None:
            hooked = has_global_hooks() or any(has_hooks(module) for one, module in inside.items() if one)
            found.append(MLP(name, child, HOOKED if hooked else "" if alone else OUTLIERS, norms))
    return found or reason


def maps_each_token(module: nn.Module, width: int, dtype: torch.dtype) -> bool | None:
    """Whether a module's output at a token depends on that token alone, found by feeding numbers to a copy of it.

    Args:
        module: its weights may be of any kind, quantised ones too; the copy has the same, and no hook of a user's.
        width, dtype: of the hidden states, and of what it gives.

    Returns:
        True; False where it does so up to an outlier at another token, as int8 layers do that keep outliers apart;
        None where it does not.
    """
    return {"alone": True, "but for outliers": False}.get(_becomes(module, width, dtype, width))


def mixes_tokens(module: nn.Module, width: int, dtype: torch.dtype) -> bool:
    """Whether a module that takes hidden states alone is seen to give at a token what depends on others.

    Args:
        module: as in :func:`maps_each_token`; what it gives may be of another width.
        width, dtype: of the hidden states.
    """
    return _becomes(module, width, dtype, None) == "mixed"


def _becomes(
    module: nn.Module, width: int, dtype: torch.dtype, given: int | None
) -> Literal["alone", "but for outliers", "mixed", "unknown"]:
    """What becomes of tokens in a module, of which each gives ``given`` numbers, or any; unknown where it takes none"""
    generator = torch.Generator().manual_seed(0)
    # With a graph, as in the model's own forward: without one, some quantised layers pack their weights for good.
    forward, device = without_hooks(module), device_of(module) or torch.device("cpu")
    if forward is None or device.type == "meta":
        return "unknown"

    def run(x: torch.Tensor) -> Any:
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            y = forward(x.requires_grad_())
        return y.detach() if isinstance(y, torch.Tensor) else y

    tokens = torch.randn(1, PROBE_TOKENS, width, generator=generator, device="cpu").to(device)
    quiet = PROBE_QUIET * tokens
    # Some of them, in another order and around an outlier: where all of that changes nothing, none of it does.
    outlier = tokens[:, 2:3] * PROBE_OUTLIER
    around, beside = (torch.cat([x[:, 4:], outlier, x[:, 1:2]], 1) for x in (tokens, quiet))
    for taken in dtypes_taken(module, dtype):
        four = [x.to(taken, copy=True) for x in (tokens, around, quiet, beside)]
        try:
            results = [run(x) for x in four]
        except Exception:  # it takes something else than one tensor of tokens of this dtype
            continue
        for x, y in zip(four, results, strict=True):
            if not isinstance(y, torch.Tensor) or (given is not None and y.dtype != x.dtype):
                return "unknown"
            if y.shape != (*x.shape[:2], y.shape[-1] if given is None else given):
                return "unknown"
        if all(_same(y[:, [4, 1]], z[:, [0, 2]]) for y, z in (results[:2], results[2:])):
            return "alone"
        x, whole = four[0].detach(), results[0]
        apart = _same(whole, run(x.flip(1)).flip(1)) and _same(whole[:, 1:3], run(x[:, 1:3].clone()))
        return "but for outliers" if apart else "mixed"
    return "unknown"


#: Where a module keeps its hooks.
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def has_hooks(module: nn.Module) -> bool:
    """Whether a user has put a hook on a module itself; those of a library are its code."""
    held = module.__dict__
    return any(is_users(hook) for name in HOOKS if held[name] for hook in held[name].values())


def has_global_hooks() -> bool:
    """Whether a user has put a hook on all modules at once, which no module says of itself."""
    everywhere = (getattr(nn.modules.module, f"_global{name}") for name in HOOKS)
    return any(is_users(hook) for hooks in everywhere for hook in hooks.values())


def sets_forward(module: nn.Module) -> bool:
    """Whether a user has set the ``forward`` of a module; what accelerate sets to move tensors is none of theirs."""
    own = original_forward(module)
    of_class = getattr(own, "__func__", None) is type(module).forward
    return not of_class and not accelerate.only_moves(module) and is_users(own)


def is_users(function: Any) -> bool:
    """Whether a function is neither torch's, transformers' nor this package's."""
    return home_of(function).partition(".")[0] not in PLAIN


def without_hooks(module: nn.Module) -> nn.Module | None:
    """A copy of a module that shares its parameters, writes into nothing of it, and runs no hook of a user's; None
    where a user set its ``forward``.

    What stands before the ``forward`` of a class by a hook of accelerate's that only moves tensors is left out too.
    What a library has put there, as transformers' tensor parallelism does, stays where the module holds no other.
    """
    own = original_forward(module)
    of_class = getattr(own, "__func__", None) is type(module).forward
    if not of_class and not accelerate.only_moves(module) and (module._modules or is_users(own)):
        return None
    copied = object.__new__(type(module))
    copied.__dict__.update({name: _apart(one) for name, one in module.__dict__.items()})
    copied.__dict__.pop("forward", None)
    if not of_class and not accelerate.only_moves(module):
        copied.__dict__["forward"] = own
    for name in HOOKS:
        hooks = ((number, hook) for number, hook in module.__dict__[name].items() if not is_users(hook))
        copied.__dict__[name] = OrderedDict(hooks)
    children = {name: None if one is None else without_hooks(one) for name, one in module._modules.items()}
    if any(one is not None and children[name] is None for name, one in module._modules.items()):
        return None
    copied.__dict__["_modules"] = children
    if has_global_hooks():
        if any(copied.__dict__[name] for name in HOOKS):
            return None  # a library's hooks run in the same call as those
        copied.__dict__["_compiled_call_impl"] = copied.forward  # what torch calls in place of hooks and ``forward``
    return copied


def _apart(held: Any, depth: int = 4) -> Any:
    """What a module holds, so that code may write into it: tensors that lie in it, however deep, are copies."""
    if type(held) is torch.Tensor:
        return held.clone()
    if depth and type(held) in (dict, OrderedDict):
        return type(held)((key, _apart(one, depth - 1)) for key, one in held.items())
    if depth and type(held) in (list, tuple, set):
        return type(held)(_apart(one, depth - 1) for one in held)
    if depth and isinstance(own := getattr(held, "__dict__", None), dict) and not callable(held):
        inner = {name: _apart(one, depth - 1) for name, one in own.items()}
        if any(inner[name] is not own[name] for name in own):
            held = copy.copy(held)
            held.__dict__.update(inner)
    return held


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two results for the same tokens are equal but for the order of sums."""
    allowed = PROBE_ULPS * _rounding(one) * float(one.double().abs().nan_to_num().amax())
    return torch.allclose(one.double(), other.double(), rtol=0.0, atol=allowed, equal_nan=True)


def _rounding(y: torch.Tensor) -> float:
    """The rounding with which ``y`` was computed: quantised layers multiply in half and give what they were given."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    computed = next((dtype for dtype in dtypes if torch.equal(y.to(dtype).to(y.dtype), y)), y.dtype)
    return max(torch.finfo(computed).eps, torch.finfo(y.dtype).eps)


def outside_transforms() -> AbstractContextManager[Any]:
    """Inside, no ``torch.vmap`` is known of: for what runs again for several gradients, and is the same for each.

    Inside ``torch.vmap`` torch allows neither new leaves nor autograd functions written for no transform.
    """
    return cast(AbstractContextManager[Any], temporarily_clear_interpreter_stack())


def in_tiles(forward: Forward, x: torch.Tensor, tile: int | None) -> torch.Tensor:
    """``forward(x)`` for ``[B, T, H]``, ``tile`` tokens at a time."""
    if tile is None or tile >= x.shape[1]:
        return forward(x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for start in range(0, x.shape[1], tile):
        y[:, start : start + tile] = forward(x[:, start : start + tile])
    return y


class _Mark(torch.autograd.Function):
    """The identity in the forward; in the backward, the gradient of ``forward``, which runs again.

    Only its input is kept. It comes before the MLP, so that a checkpoint around both, which stops once it has
    everything that was saved, need not run the MLP a second time only to reach its end.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forward: Forward, tile: int | None, every_tile: bool) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.forward, ctx.tile, ctx.every_tile = forward, tile, every_tile
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        (x,) = ctx.saved_tensors
        (grad_y,) = grads
        tile = x.shape[1] if ctx.tile is None else min(ctx.tile, x.shape[1])
        # Of the gradient's kind: under torch.vmap that is several, and x one.
        grad_x = grad_y.new_empty(x.shape) if tile < x.shape[1] else None
        starts = range(0, x.shape[1], tile)
        for start in starts if ctx.every_tile else starts[:2]:
            tokens = slice(start, start + tile)
            with torch.enable_grad(), outside_transforms():
                leaf = x[:, tokens].detach().requires_grad_(True)
                y = ctx.forward(leaf)
            (grad,) = torch.autograd.grad(y, leaf, grad_y[:, tokens])
            del y
            if grad_x is None:
                return grad, None, None, None
            grad_x[:, tokens] = grad
        return grad_x, None, None, None


class _Give(torch.autograd.Function):
    """An MLP's output; in the backward the identity, for :class:`_Mark` does the work."""

    @staticmethod
    def forward(ctx: Any, marked: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y.detach()  # a model may write into what it gets

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


def run_again(
    source: torch.Tensor,
    again: Forward,
    compute: Callable[[], torch.Tensor],
    tile: int | None,
    every_tile: bool = True,
) -> torch.Tensor:
    """``compute()``, whose gradient with respect to ``source`` comes from running ``again(source)`` in tiles.

    Args:
        source: ``[B, T, H]``, kept for the backward.
        again: from ``source`` to what ``compute`` gives, each token by itself.
        compute: the output, ``[B, T, H]``, without a graph. It runs in no autograd function: what the model does
            without gradients inside it is the model's own.
        tile: tokens at a time; None for all at once.
        every_tile: False runs two tiles for all, which on tensors without data take the same memory.
    """
    marked = _Mark.apply(source, again, tile, every_tile)
    return _Give.apply(marked, compute())


class NormBefore:
    """The norm whose output a layer's MLP takes, found as the model runs: the tensor itself is the proof, where nobody
    has written into it or into what it was computed from, or has hung anything on its gradient.

    With it, a tile is a few tokens of the norm's input, and neither its output nor its gradient is ever whole.
    """

    def __init__(self) -> None:
        self._last: tuple[torch.Tensor, torch.Tensor, Forward, tuple[int, int]] | None = None

    def watch(self, norm: nn.Module, forward: Forward, changes: Changes) -> None:
        """Remember what this norm was called with, until its MLP has asked; ``forward`` runs it, in a backward too."""

        def run(hidden: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
            y = forward(hidden, *others, **named)
            if torch.is_grad_enabled() and hidden.requires_grad and not others and not named:
                self._last = (hidden, y, forward, (hidden._version, y._version))
            return y

        changes.replace_forward(norm, run)

    def take(self, hidden: torch.Tensor) -> tuple[torch.Tensor, Forward] | None:
        """The input and the forward of the norm that gave ``hidden``, or None where none did."""
        last, self._last = self._last, None
        if last is None or last[1] is not hidden:
            return None
        source, y, forward, written_then = last
        if (source._version, y._version) != written_then or y._backward_hooks or y.retains_grad:
            return None
        return source, forward

    def forget(self) -> None:
        """Hold no tensor any more."""
        self._last = None


def norms_of(layer: nn.Module) -> list[nn.Module]:
    """The norms among a layer's own children."""
    return [child for child in map(written, layer.children()) if looks_like_norm(child)]
