"""What gradients stop at in a model, without a word of its code, is named; what sends them back passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gim
from gim.applied import UnsupportedModelError
from tests.gim.test_watch import HIDDEN, IDS, WIDTH, llama


def _int8(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x @ weight.mT`` over numbers rounded to 8 bits, as layers quantised for inference compute it."""
    flat = x.reshape(-1, WIDTH)
    flat = F.pad(flat, (0, 0, 0, 32 - len(flat)))
    scale = flat.abs().amax(-1, keepdim=True) / 127
    whole = torch._int_mm((flat / scale.clamp(min=1e-9)).round().to(torch.int8), weight.mT.contiguous())
    return (whole * scale)[:5].reshape(1, 5, HIDDEN)


def _int8_by_function(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return _int8(x, weight)

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            return grads[0] @ weight.float()

    return Product.apply(x)


@torch.no_grad()
def _without_gradients(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight.float())


def _in_inference_mode(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        y = F.linear(x, weight.float())
    return y.clone()


def _rounded_without_gradients(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        scale = x.abs().amax(-1, keepdim=True) / 127
        rounded = (x / scale).round().char()
    return F.linear(rounded.float(), weight.float()) * scale


def _rounded_and_back(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return F.linear((x / scale).round().int().to(x.dtype) * scale.detach(), weight.float())


def _packed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """torch's own, which has no gradient; by torch's operator for inference."""
    packed = torch.ops.quantized.linear_prepack(torch.quantize_per_tensor(weight.float(), 0.1, 0, torch.qint8), None)
    return torch.ops.quantized.linear_dynamic(x, packed)


_library = torch.library.Library("watchtests", "FRAGMENT")
_library.define("foreign_matmul(Tensor x, Tensor weight) -> Tensor")
_library.impl(
    "foreign_matmul", lambda x, weight: torch.from_numpy(x.detach().numpy() @ weight.float().mT.numpy()), "CPU"
)
_library.define("differentiable_matmul(Tensor x, Tensor weight) -> Tensor")
_library.impl("differentiable_matmul", lambda x, weight: F.linear(x, weight.float()), "CompositeImplicitAutograd")


@torch.library.custom_op("watchtests::foreign_linear", mutates_args=())
def _foreign_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight.float())


_foreign_linear.register_autograd(
    lambda ctx, grad: (grad @ ctx.saved_tensors[0].float(), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1]),
)


class Quantised(nn.Module):
    """An MLP whose first linear map is computed in some way over a weight of 8 bits."""

    def __init__(self, way: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.weight: torch.Tensor
        self.register_buffer("weight", torch.randint(-9, 9, (HIDDEN, WIDTH), dtype=torch.int8))
        self.down = nn.Linear(HIDDEN, WIDTH)
        self.way = way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.way(x, self.weight))


#: Ways of quantised layers that send no gradient back, and what is said of each.
STOPPING: dict[str, tuple[Callable[..., torch.Tensor], str]] = {
    "rounded": (_int8, r"_int_mm of rounded numbers"),
    "rounded, without gradients": (_rounded_without_gradients, "of rounded numbers"),
    "rounded and back": (_rounded_and_back, "of rounded numbers"),
    "without gradients": (_without_gradients, "without gradients"),
    "without gradients, cast": (
        torch.no_grad()(lambda x, w: (x.double().flip(-1) @ w.mT.double()).float()),
        "mm without gradients",
    ),
    "in inference mode": (_in_inference_mode, "mm without gradients"),
    "torch's dynamic": (_packed, "linear_dynamic"),
    "no formula": (torch.ops.watchtests.foreign_matmul, "foreign_matmul"),
}


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("way", STOPPING)
def test_a_linear_map_that_gradients_stop_at_is_named(way: str) -> None:
    how, said = STOPPING[way]
    model = llama(Quantised(how))
    leaf = torch.randn(1, 5, WIDTH, requires_grad=True)
    out = how(leaf, model.model.layers[0].mlp.weight)
    if out.requires_grad:  # by way of its scale alone, or torch promises one and gives none
        assert way in ("rounded", "rounded, without gradients", "torch's dynamic", "no formula")
        (out.sum() + 0 * leaf.sum()).backward()
        slope = model.model.layers[0].mlp.weight.float().sum(0)
        assert leaf.grad is not None and not torch.allclose(leaf.grad, slope.expand_as(leaf), rtol=0.2)
    where = rf"layers\.0\.mlp: operator without a gradient \(.*{said}, .*\.py:\d+\), so that what flows"
    for rules in ("GIM", "GRADIENT"):
        with pytest.raises(UnsupportedModelError, match=where):
            gim.explain(model, IDS, baseline_token_id=0, rules=rules)
    with gim.GIM(model, strict=False) as report:
        model(IDS)
    assert any(said in reason for _, reason in report.unsupported) and not report.complete
    with torch.no_grad(), gim.GIM(model) as report:
        model(IDS)
    assert report.complete


def _shown(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A mistake's size is looked at, and a place chosen by a map; nothing of that is in the result but an index."""
    with torch.no_grad():
        error = (F.linear(x, weight.float()) - _int8(x, weight)).abs().max()
        chosen = F.linear(x, weight.float()).argmax(-1, keepdim=True)
    assert error >= 0
    y = F.linear(x, weight.float())
    return y + 0.1 * y.gather(-1, chosen)


def _straight_through(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        scale = x.abs().amax(-1, keepdim=True) / 127
        rounded = (x / scale).round().to(torch.int8).to(x.dtype) * scale
    return F.linear(x + (rounded - x).detach(), weight.float())


#: Ways that have a gradient, or whose code says that it wants none.
FLOWING: dict[str, Callable[..., torch.Tensor]] = {
    "own function": _int8_by_function,
    "beside the result": _shown,
    "straight through": _straight_through,
    "dequantised": lambda x, weight: F.linear(x, weight.to(x.dtype) * 0.1),
    "formula": torch.ops.watchtests.foreign_linear,
    "made of torch's": torch.ops.watchtests.differentiable_matmul,
    "detached": lambda x, weight: F.linear(x, weight.float()) + F.linear(x, weight.float()).detach(),
}


@pytest.mark.parametrize("plan", ["none", "layer", "layer+attention", "mlp", "layer+tile=2"])
@pytest.mark.parametrize("part", ["mlp", "mlp.up_proj", "mlp.down_proj", "self_attn", "self_attn.o_proj"])
def test_a_module_that_runs_without_gradients_is_named(part: str, plan: str) -> None:
    model = llama(layers=2)
    module = model.model.layers[0].get_submodule(part)
    module.forward = torch.no_grad()(module.forward)
    where = rf"layers\.0\.{part}.*: operator without a gradient \(mm without gradients, .*\.py:\d+\)"
    if plan in ("mlp", "layer+tile=2") and part == "mlp":
        where = r"runs MLPs in parts, which does not apply to model\.layers\.0 "  # nobody may call it but as it stands
    elif plan in ("mlp", "layer+tile=2") and part == "mlp.down_proj":
        where = r"layers\.0\.mlp: the MLP runs without gradients, so that what flows"
    with pytest.raises((UnsupportedModelError, ValueError), match=where):
        gim.explain(model, IDS, baseline_token_id=0, memory=plan)


@pytest.mark.parametrize("way", ["rounded", "without gradients", "rounded, without gradients"])
def test_a_hook_may_compute_what_it_likes(way: str) -> None:
    model, how = llama(), STOPPING[way][0]
    weight = torch.randint(-9, 9, (HIDDEN, WIDTH), dtype=torch.int8)
    kept: list[torch.Tensor] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda _, given: kept.append(how(given[0], weight) + 1.0))
    with gim.GIM(model) as report:
        model(IDS)
    assert report.complete and len(kept) == 1


def test_a_table_of_another_library_is_a_constant() -> None:
    """An operator whose name speaks of quantising, and which takes no tensor."""
    _library.define("quantisation_table(int n) -> Tensor")
    _library.impl("quantisation_table", lambda n: torch.linspace(0.5, 1.5, n), "CompositeExplicitAutograd")

    def scaled(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            table = torch.ops.watchtests.quantisation_table(HIDDEN)
        return F.linear(x, weight.float() * table[:, None])

    with gim.GIM(model := llama(Quantised(scaled))) as report:
        model(IDS)
    assert report.complete


@pytest.mark.parametrize("way", FLOWING)
def test_a_linear_map_with_a_gradient_passes(way: str) -> None:
    model, leaf = llama(Quantised(FLOWING[way])), torch.randn(1, 5, WIDTH, requires_grad=True)
    weight = model.model.layers[0].mlp.weight
    y = FLOWING[way](leaf, weight)
    # By the formula of a linear map; one way adds a tenth of its largest number to every one.
    slope = weight.double().sum(0).expand(1, 5, WIDTH) * (0.1 if way == "dequantised" else 1.0)
    if way == "beside the result":
        slope = slope + 0.1 * HIDDEN * weight.double()[(leaf @ weight.mT.float()).argmax(-1)]
    torch.testing.assert_close(torch.autograd.grad(y.sum(), leaf)[0].double(), slope, rtol=1e-5, atol=1e-4)
    with gim.GIM(model) as report:
        model(IDS)
    assert report.complete and report.watched


def test_a_weight_packed_for_inference_is_watched_again() -> None:
    """As 4-bit weights on CPUs are by the first forward without gradients."""

    class State:
        packed = False

    class Packing(Quantised):
        def __init__(self) -> None:
            super().__init__(torch.ops.watchtests.foreign_matmul)
            self.weight = nn.Parameter(self._buffers.pop("weight").float(), requires_grad=False)
            self.weight.state = State()  # type: ignore[attr-defined]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            state = self.weight.state  # type: ignore[attr-defined]
            state.packed = state.packed or not x.requires_grad
            return self.down(self.way(x, self.weight) if state.packed else F.linear(x, self.weight))

    model = llama(Packing())
    plans = ("none", "mlp", "layer", "mlp+tile=2")
    found = [gim.explain(model, IDS, baseline_token_id=0, memory=plan) for plan in plans]
    assert not model.model.layers[0].mlp.weight.state.packed  # nothing of gim's ran it without gradients
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        model(IDS)
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp: operator without a gradient \(foreign_matmul"):
        gim.explain(model, IDS, baseline_token_id=0)
