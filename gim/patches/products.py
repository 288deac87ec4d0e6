"""Products ``activation(gate) * up``, found where a module's own code computes them.

A module keeps its forward; only the activation that it holds gives back a stand-in, which knows its argument. Where the
code multiplies it by a tensor of the same shape, the product is computed with the rules' backward, whatever the layout
of the projections around it: separate, fused, interleaved, experts. Anything else that the code does with it is done
with ``activation(gate)`` itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import gim_kernels
from gim.applied import UnsupportedModelError
from gim.intercept.sites import SITES
from gim.rules import Rules
from gim_kernels import engines
from gim_kernels.gated import Activation
from gim_kernels.reference import scale_gradient

PRODUCTS = frozenset(
    {
        torch.mul,
        torch.multiply,
        torch.Tensor.mul,
        torch.Tensor.multiply,
        torch.Tensor.__mul__,
        torch.Tensor.__rmul__,
    }
)
#: Functions that say something of a tensor without reading its numbers.
METADATA = frozenset(
    {
        torch.Tensor.size,
        torch.Tensor.dim,
        torch.Tensor.ndimension,
        torch.Tensor.stride,
        torch.Tensor.numel,
        torch.Tensor.nelement,
        torch.Tensor.is_contiguous,
        torch.Tensor.is_floating_point,
        torch.Tensor.__len__,
        torch.is_floating_point,
        torch.numel,
    }
)
#: Attributes that do the same; ``T``, ``data`` and the like give numbers.
ATTRIBUTES = frozenset(
    {"device", "dtype", "is_cpu", "is_cuda", "is_meta", "itemsize", "layout", "ndim", "requires_grad", "shape"}
)
#: Functions that take an activation's output without multiplying it elementwise: there it is no gate.
CONSUMERS = frozenset(
    {
        "addmm",
        "baddbmm",
        "bmm",
        "conv1d",
        "einsum",
        "grouped_mm",
        "_grouped_mm",
        "layer_norm",
        "linear",
        "matmul",
        "__matmul__",
        "mm",
        "rms_norm",
    }
)


#: Functions that only arrange an activation's output anew, so that arranging its argument is the same.
ARRANGERS = frozenset(
    {
        "contiguous",
        "flatten",
        "permute",
        "reshape",
        "squeeze",
        "transpose",
        "unflatten",
        "unsqueeze",
        "view",
    }
)


class RatioActivation(torch.autograd.Function):
    """``activation(x)`` with ``activation(x) / x`` in place of its derivative, and the derivative where x is 0."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, activation: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.activation = activation
        return activation(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            y = ctx.activation(leaf)
            (slope,) = torch.autograd.grad(y.sum(), leaf)
        ratio = torch.where(x == 0, slope, y.detach() / torch.where(x == 0, 1, x))
        return grads[0] * ratio, None


def product(
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: Callable[[torch.Tensor], torch.Tensor],
    known: Activation | None,
    rules: Rules,
) -> torch.Tensor:
    """``activation(gate) * up`` with the rules' factors on the gradients of both branches.

    Args:
        gate: ``[..., D]``.
        up: as ``gate``; its dtype may differ.
        activation: the function.
        known: its name where the kernels have it; else it runs in PyTorch.
        rules: of the backward.
    """
    if known is not None and up.dtype == gate.dtype and gate.dtype in engines.DTYPES:
        return gim_kernels.gated(gate, up, known, grad_scale=rules.gate_up_scale, activation_backward=rules.activation)
    branch = scale_gradient(gate, rules.gate_up_scale[0])
    activated = RatioActivation.apply(branch, activation) if rules.activation == "ratio" else activation(branch)
    with SITES.acting("gated_mlp"):
        return activated * scale_gradient(up, rules.gate_up_scale[1])


def hooked_product(activated: torch.Tensor, up: torch.Tensor, rules: Rules) -> torch.Tensor:
    """The same where a hook has seen, and maybe changed, the activation's output.

    Raises:
        UnsupportedModelError: the rules replace the activation's derivative, which the hook's output no longer has.
    """
    if rules.activation == "ratio":
        raise UnsupportedModelError(
            "a forward hook on an activation stands between it and its product, so act(x) / x cannot take the place of "
            "its derivative: remove the hook, or use rules with the exact derivative"
        )
    with SITES.acting("gated_mlp"):
        return scale_gradient(activated, rules.gate_up_scale[0]) * scale_gradient(up, rules.gate_up_scale[1])


class Site:
    """Where products are looked for: what one module's activations lead to.

    Args:
        rules: of the backward.
        on_product: called with the gate for every product found.
        on_unknown: called with the name of a function that took an activation's output and could hide a product.
    """

    def __init__(
        self, rules: Rules, on_product: Callable[[torch.Tensor], None], on_unknown: Callable[[str], None]
    ) -> None:
        self.rules = rules
        self.on_product = on_product
        self.on_unknown = on_unknown

    def activate(
        self,
        gate: torch.Tensor,
        activation: Callable[[torch.Tensor], torch.Tensor],
        known: Activation | None,
        value: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What stands for ``activation(gate)`` until the module's code says what it wants with it.

        ``value`` is what a hook on the activation made of it, where there is a hook.
        """
        stand_in = (gate if value is None else value).as_subclass(Activated)
        stand_in._gim = _StandsFor(self, gate, activation, known, value)
        return stand_in


@dataclass(frozen=True)
class _StandsFor:
    site: Site
    gate: torch.Tensor
    activation: Callable[[torch.Tensor], torch.Tensor]
    known: Activation | None
    value: torch.Tensor | None


class Activated(torch.Tensor):
    """Stands for ``activation(gate)``; has the gate's shape and dtype and holds no numbers of its own."""

    _gim: _StandsFor

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if func in METADATA or (name == "__get__" and func.__self__.__name__ in ATTRIBUTES):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in PRODUCTS and len(args) == 2 and not kwargs:
            first, second = args
            stand_in, other = (first, second) if isinstance(first, Activated) else (second, first)
            if isinstance(other, torch.Tensor) and other.shape == stand_in.shape:
                it, up = stand_in._gim, _value(other)
                if it.value is None:
                    y = product(it.gate, up, it.activation, it.known, it.site.rules)
                else:
                    y = hooked_product(it.value, up, it.site.rules)
                it.site.on_product(it.gate)
                return y
        if func is F.dropout and not _dropping(*args[1:], **kwargs):
            return args[0]
        if name in ARRANGERS and isinstance(args[0], Activated) and _is_pointwise(args[0]._gim.activation):
            it = args[0]._gim
            value = None if it.value is None else func(it.value, *args[1:], **kwargs)
            return it.site.activate(func(it.gate, *args[1:], **kwargs), it.activation, it.known, value)
        if name.split(".")[0] not in CONSUMERS:
            for stand_in in _stand_ins((args, kwargs)):
                stand_in._gim.site.on_unknown(name)
        return func(*_plain(args), **_plain(kwargs))


def _is_pointwise(activation: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Whether an activation treats all channels alike, so that it commutes with every arrangement."""
    return not isinstance(activation, torch.nn.Module) or all(p.numel() == 1 for p in activation.parameters())


def _dropping(p: float = 0.5, training: bool = True, inplace: bool = False, **_: Any) -> bool:
    return training and p > 0


def _value(x: Any) -> Any:
    """``activation(gate)`` in place of what stands for it."""
    if not isinstance(x, Activated):
        return x
    return x._gim.activation(x._gim.gate) if x._gim.value is None else x._gim.value


def _plain(tree: Any) -> Any:
    """The same arguments without stand-ins."""
    if isinstance(tree, list | tuple):
        return type(tree)(_plain(one) for one in tree)
    if isinstance(tree, dict):
        return {key: _plain(one) for key, one in tree.items()}
    return _value(tree)


def _stand_ins(tree: Any) -> list[Activated]:
    if isinstance(tree, Activated):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [found for one in tree for found in _stand_ins(one)] if isinstance(tree, list | tuple) else []


class FunctionalActivations(TorchFunctionMode):
    """Inside, activations that code calls as functions of ``torch.nn.functional`` give stand-ins, on this thread."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.silu and not kwargs.get("inplace", False) and len(args) == 1:
            return self.site.activate(args[0], F.silu, "silu")
        if func is F.gelu and len(args) == 1:
            approximate = kwargs.get("approximate", "none")
            known: Activation = "gelu_tanh" if approximate == "tanh" else "gelu"
            return self.site.activate(args[0], lambda x: F.gelu(x, approximate=approximate), known)
        return func(*args, **kwargs)
