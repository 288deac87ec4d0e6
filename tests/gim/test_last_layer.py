"""The last layer runs for the explained positions alone, unless somebody may read what it gives at others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gim
from gim import checkpoint, memory
from gim.applied import UnsupportedModelError
from gim.plan import MemoryPlan
from gim_kernels.budget import relative_error
from tests.families import ids, make
from tests.first import first
from tests.gim.test_memory import BASELINE, EVERYTHING, LENGTH, close, explain, request
from tests.oracle import FLOAT64_PLAN_RELATIVE, assert_close64


def _mixing(x: torch.Tensor) -> torch.Tensor:
    return x + x.mean(1, keepdim=True)


def test_the_last_layer_may_not_reach_other_positions() -> None:
    model, tokens = make("llama"), ids(1, LENGTH)

    class Body(type(model.model)):
        """What no look at a module on numbers tells: the code around the layers."""

        def forward(self, *given: Any, **named: Any) -> Any:
            out = super().forward(*given, **named)
            out.last_hidden_state = _mixing(out.last_hidden_state)
            return out

    model.model.__class__ = Body
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.2: .* other positions .* head=all"):
        explain(model, tokens, MemoryPlan("none"))
    want = explain(model, tokens, EVERYTHING)
    close(explain(model, tokens, MemoryPlan("layer", True, head="all")), want, "head=all")


class Changing(nn.Module):
    """Another module, whose result is changed."""

    def __init__(self, inner: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.inner, self.change = inner, change

    @property
    def weight(self) -> Any:
        return self.inner.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.change(self.inner(x))


#: What a final norm or a head of somebody's own may do that makes a position depend on others.
MIXING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "the mean": _mixing,
    "the one before": lambda x: x + F.pad(x, (0, 0, 1, 0))[:, :-1],
    "the place": lambda x: x * (1 + torch.arange(x.shape[1])[:, None]),
    "how many there are": lambda x: x * x.shape[1],
    "the largest, as a constant": lambda x: x / x.detach().abs().amax(),
}


@pytest.mark.parametrize("part", ["norm", "head"])
@pytest.mark.parametrize("way", MIXING)
def test_a_final_norm_or_head_that_mixes_positions_gets_all_of_them(way: str, part: str) -> None:
    model, tokens = make("llama"), ids(1, LENGTH)
    if part == "norm":
        model.model.norm = Changing(model.model.norm, MIXING[way])
    else:
        model.lm_head = Changing(model.lm_head, MIXING[way])
    want = explain(model, tokens, EVERYTHING)
    for name in ("none", "layer", "mlp"):
        close(explain(model, tokens, MemoryPlan.parse(name)), want, name)
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    with gim.GIM(model):
        logits = model(inputs_embeds=embedded, use_cache=False).logits[0, -1]
        (grad,) = torch.autograd.grad(logits.log_softmax(-1)[7], embedded)
    scores = ((embedded - model.get_input_embeddings().weight[BASELINE]) * grad).sum(-1).detach()
    assert_close64(want.scores, scores, "the model's own forward", relative=FLOAT64_PLAN_RELATIVE)


def test_a_final_norm_or_head_of_ones_own_that_mixes_nothing_costs_nothing() -> None:
    model = make("llama")
    model.model.norm = Changing(model.model.norm, lambda x: 2 * x)
    model.lm_head = Changing(model.lm_head, torch.tanh)
    assert checkpoint.suited(MemoryPlan("none"), model).head == "explained"


def _centred(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean(1, keepdim=True).detach()


def _behind(module: nn.Module, change: Any) -> Any:
    return module.register_forward_hook(
        lambda _, __, out: (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)
    )


def _in_front(module: nn.Module, change: Any) -> Any:
    return module.register_forward_pre_hook(lambda _, given: (change(given[0]),))


def _behind_the_body(module: nn.Module, change: Any) -> Any:
    return module.register_forward_hook(
        lambda _, __, out: out.__setitem__("last_hidden_state", change(out.last_hidden_state))
    )


def _for_all(module: nn.Module, change: Any) -> Any:
    return nn.modules.module.register_module_forward_hook(
        lambda one, _, out: change(out) if one is module else None, always_call=False
    )


def _in_front_for_all(module: nn.Module, change: Any) -> Any:
    return nn.modules.module.register_module_forward_pre_hook(
        lambda one, given: (change(given[0]),) if one is module else None
    )


class _Set:
    """A ``forward`` that the user has set, to be taken away like a hook."""

    def __init__(self, module: nn.Module, change: Any) -> None:
        self.module, own = module, module.forward
        module.__dict__["forward"] = lambda *given, **named: change(own(*given, **named))

    def remove(self) -> None:
        del self.module.__dict__["forward"]


LAST = "model.layers.2"
#: Where a user may read what the last layer gives: in it, or behind it.
READ: dict[str, tuple[str, Callable[[nn.Module, Any], Any]]] = {
    "layer": (LAST, _behind),
    "attention": (f"{LAST}.self_attn", _behind),
    "attention's product": (f"{LAST}.self_attn.o_proj", _behind),
    "before attention's product": (f"{LAST}.self_attn.o_proj", _in_front),
    "MLP": (f"{LAST}.mlp", _behind),
    "before the MLP's last map": (f"{LAST}.mlp.down_proj", _in_front),
    "norm": (f"{LAST}.post_attention_layernorm", _in_front),
    "final norm": ("model.norm", _in_front),
    "body": ("model", _behind_the_body),
    "head": ("lm_head", _in_front),
    "logits": ("lm_head", _behind),
    "for all modules": (f"{LAST}.self_attn.o_proj", _for_all),
    "before all modules": (f"{LAST}.mlp.down_proj", _in_front_for_all),
    "set on the final norm": ("model.norm", _Set),
    "set on attention's product": (f"{LAST}.self_attn.o_proj", _Set),
}


@pytest.mark.parametrize("where", first(READ, ("norm", "body", "for all modules", "set on the final norm")))
def test_what_a_user_reads_of_the_last_layer_is_there(where: str) -> None:
    """Read without a gradient, zeros in its place would tell nobody."""
    model, tokens = make("llama"), ids(2, LENGTH)
    plain = explain(model, tokens, EVERYTHING)
    name, put = READ[where]
    seen: list[torch.Tensor] = []

    def change(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.detach().clone())
        return _centred(x)

    handle = put(model.get_submodule(name), change)
    try:
        want = explain(model, tokens, EVERYTHING)
        own = seen[0]
        assert relative_error(want.scores, plain.scores) > 1e-4
        for plan in ("none", "layer+attention", "layer"):
            seen.clear()
            got = explain(model, tokens, MemoryPlan.parse(plan))
            close(got, want, plan)
            assert got.plan.head == "all"
            assert_close64(seen[0], own, plan, relative=FLOAT64_PLAN_RELATIVE)
        found = memory.run(*request(model), memory="auto", progress=None)
        assert found.plan == EVERYTHING and "last layer at every position" in found.memory
        (told,) = gim.estimate_memory(model, LENGTH, plans=[MemoryPlan("layer")])
        assert told.plan == MemoryPlan("layer", head="all")
    finally:
        handle.remove()
    assert explain(model, tokens, MemoryPlan()).plan.head == "explained"


def test_a_hook_before_the_last_layer_reads_nothing_of_it() -> None:
    model, tokens = make("llama"), ids(2, LENGTH)
    _behind(model.model.layers[1], _centred)
    _in_front(model.model.embed_tokens, lambda tokens: tokens)
    got = explain(model, tokens, MemoryPlan())
    assert got.plan.head == "explained"
    close(got, explain(model, tokens, EVERYTHING), "none")
