"""FlexAttention, held against its rule written with detached tensors in float64."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import flex_attention as torch_flex
from transformers import LlamaConfig, LlamaForCausalLM

import gim
from gim.applied import UnsupportedModelError
from gim.intercept import flex
from gim.rules import Rules
from gim.rules import get as get_rules
from tests.first import first
from tests.oracle import FLOAT64_SAME_RELATIVE, assert_close64

TOKENS, HEADS, WIDTH, VOCABULARY = 13, 4, 32, 40
IDS = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13], [21, 3, 2, 9, 8, 30, 4, 31, 5, 6, 1, 0, 14]])
RULES = ("GIM", "GIM_CONSTANT", "GRADIENT", "ATTNLRP", "TSG_ONLY", "SCALES_ONLY")
PLANS = ("none", "layer", "layer+attention", "layer+offload", "mlp+tile=4")

#: What each query sees ``[T, S]``, and what is added to the scores ``[HQ, T, S]``, as functions and as tensors.
_place = torch.arange(TOKENS)
_slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)
_document = torch.tensor([0] * 4 + [1] * 6 + [2] * 3)
_table = torch.randn(HEADS, TOKENS, TOKENS, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
_far = _place[:, None] - _place[None]


def _seen(b: Any, h: Any, i: Any, j: Any) -> Any:
    return (i >= j) & (_document[i] == _document[j])


MASKS: dict[str, tuple[Callable[..., Any] | None, torch.Tensor]] = {
    "all": (None, torch.ones(TOKENS, TOKENS, dtype=torch.bool)),
    "causal": (lambda b, h, i, j: i >= j, _far >= 0),
    "documents": (_seen, (_far >= 0) & (_document[:, None] == _document)),
    "every third": (lambda b, h, i, j: (i >= j) & ((i - j) % 3 == 0), (_far >= 0) & (_far % 3 == 0)),
    "not itself": (lambda b, h, i, j: i > j, _far > 0),  # the first query sees nothing
}
SCORES: dict[str, tuple[Callable[..., Any] | None, Callable[[torch.Tensor], torch.Tensor]]] = {
    "plain": (None, lambda s: s),
    "slopes": (lambda s, b, h, i, j: s - _slopes[h] * (i - j), lambda s: s - _slopes[:, None, None] * _far),
    "softcap": (lambda s, b, h, i, j: 2 * torch.tanh(s / 2), lambda s: 2 * torch.tanh(s / 2)),
    "table": (lambda s, b, h, i, j: s + _table[h, i, j], lambda s: s + _table),
    "window by -inf": (
        lambda s, b, h, i, j: torch.where(i - j < 4, s, -float("inf")),
        lambda s: s.masked_fill(_far >= 4, -torch.inf),
    ),
}


def scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    return factor * x + (1 - factor) * x.detach()


class Attention(nn.Module):
    """Attention of a layer of Llama: by FlexAttention, or written out under rules."""

    def __init__(self, mask: str, score: str, *, kv_heads: int = HEADS, scale: float | None = None) -> None:
        super().__init__()
        self.mask, self.score, self.kv_heads, self.scale = mask, score, kv_heads, scale
        self.rules: Rules | None = None
        self.call: Callable[..., Any] = torch_flex.flex_attention
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * kv_heads) * 8, bias=False)
        self.out = nn.Linear(HEADS * 8, WIDTH, bias=False)

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        batch, tokens, _width = hidden_states.shape
        heads = self.qkv(hidden_states).view(batch, tokens, -1, 8).transpose(1, 2)
        q, k, v = heads.split([HEADS, self.kv_heads, self.kv_heads], 1)
        y = self.by_flex(q, k, v) if self.rules is None else self.written(q, k, v, self.rules)
        return self.out(y.transpose(1, 2).flatten(2)), None

    def by_flex(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        sees, change = MASKS[self.mask][0], SCORES[self.score][0]
        mask = None if sees is None else torch_flex.create_block_mask(sees, None, None, TOKENS, TOKENS, device="cpu")
        y: torch.Tensor = self.call(
            q, k, v, score_mod=change, block_mask=mask, scale=self.scale, enable_gqa=self.kv_heads != HEADS
        )
        return y

    def written(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rules: Rules) -> torch.Tensor:
        q, k, v = (scaled(x, by) for x, by in zip((q, k, v), rules.qkv_scale, strict=True))
        k, v = (x.repeat_interleave(HEADS // self.kv_heads, 1) for x in (k, v))
        scores = SCORES[self.score][1](q @ k.mT * (8**-0.5 if self.scale is None else self.scale))
        seen = MASKS[self.mask][1] & (scores > -torch.inf)
        # Far below all others in place of -inf, so that a row that sees nothing is a number, which is then dropped.
        scores = torch.where(seen, scores, -1e9)
        weights = scores.softmax(-1)
        if rules.softmax == "constant":
            weights = weights.detach()
        elif rules.softmax == "temperature":
            soft = (scores / rules.temperature).softmax(-1)
            weights = weights.detach() + rules.temperature * (soft - soft.detach())
        return (weights * seen.any(-1, keepdim=True)) @ v


class Sunk(Attention):
    """A sink by way of the logsumexp."""

    def by_flex(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        y, aux = torch_flex.flex_attention(q, k, v, return_aux=torch_flex.AuxRequest(lse=True))
        return y * torch.sigmoid(aux.lse)[..., None]


def llama(**how: Any) -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=HEADS, **shape)).double().eval()
    for layer in model.model.layers:
        layer.self_attn = Attention(**how).double()
    return model


def gradient(model: Any, rules: str | Rules, **named: Any) -> torch.Tensor:
    x = model.get_input_embeddings()(IDS).detach().requires_grad_()
    with gim.GIM(model, rules=rules, **named):
        logits = model(inputs_embeds=x, use_cache=False).logits
    return torch.autograd.grad(logits[:, -1, 3].sum(), x)[0]


def wanted(model: Any, rules: str) -> torch.Tensor:
    """The gradient with attention written out; norms and gates by the package, which other tests hold to account."""
    model, chosen = copy.deepcopy(model), get_rules(rules)
    for layer in model.model.layers:
        layer.self_attn.rules = chosen
    rest = dataclasses.replace(chosen, softmax="exact", q_scale=1.0, k_scale=1.0, v_scale=1.0)
    return gradient(model, rest, strict=False)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "BLOCK_SCORES", 5 * len(IDS) * HEADS * TOKENS)  # thirteen queries in three blocks


def near(got: torch.Tensor, want: torch.Tensor) -> None:
    assert want.abs().max() > 0
    assert_close64(got, want, "the gradient")


def _one_by_one(score: str, mask: str, rules: str) -> bool:
    """Every function of each kind beside a plain one of the other, and a rule that differs with several at once."""
    alone = (score == "plain" or mask == "causal") and rules == "GIM"
    return alone or (score, mask, rules) == ("table", "documents", "GIM_CONSTANT")


@pytest.mark.parametrize(("score", "mask", "rules"), first(itertools.product(SCORES, MASKS, RULES), _one_by_one))
def test_flex_attention_follows_its_rule(mask: str, score: str, rules: str) -> None:
    model = llama(mask=mask, score=score)
    near(gradient(model, rules), wanted(model, rules))


@pytest.mark.parametrize("rules", ["GIM", "GIM_CONSTANT"])
def test_grouped_heads_and_a_scale(rules: str) -> None:
    model = llama(mask="causal", score="slopes", kv_heads=2, scale=0.7)
    near(gradient(model, rules), wanted(model, rules))


@pytest.mark.parametrize("kind", ["plain", "with its logsumexp"])
def test_the_forward_is_torchs_own(kind: str) -> None:
    torch.manual_seed(0)
    attention = (Attention("documents", "table", kv_heads=2) if kind == "plain" else Sunk("all", "plain")).double()
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        own = attention(x)[0]  # where no gradient is asked for, torch's own runs on a CPU
        with gim.GIM(attention) as report:
            ours = attention(x)[0]
    assert_close64(ours, own, kind, relative=FLOAT64_SAME_RELATIVE)
    assert report.counts()["attention"] == (1, 1)


def test_torch_refuses_its_gradient_on_a_cpu_as_before() -> None:
    model = llama(mask="causal", score="plain")
    gradient(model, "GIM")
    with pytest.raises(NotImplementedError, match="FlexAttention does not support backward on CPU"):
        model(IDS)


@pytest.mark.parametrize("plan", first(PLANS, ("layer", "layer+attention")))
@pytest.mark.parametrize("rules", first(("GIM", "GIM_CONSTANT"), ("GIM",)))
def test_every_memory_plan_gives_the_same(plan: str, rules: str) -> None:
    model = llama(mask="causal", score="slopes")
    one, other = (gim.explain(model, IDS, baseline_token_id=0, rules=rules, memory=how) for how in ("none", plan))
    assert_close64(other, one, plan, relative=FLOAT64_SAME_RELATIVE)
    for layer in model.model.layers:
        layer.self_attn.rules = get_rules(rules)
    rest = dataclasses.replace(get_rules(rules), softmax="exact", q_scale=1.0, k_scale=1.0, v_scale=1.0)
    want = gim.explain(model, IDS, baseline_token_id=0, rules=rest, memory="none", strict=False)
    near(other, want)


class Bent(Attention):
    """Scores are changed by what is computed from the input, and by a table that is learned."""

    def __init__(self) -> None:
        super().__init__("causal", "plain")
        self.forget = nn.Linear(8, 1)
        self.table = nn.Parameter(torch.randn(HEADS, TOKENS, TOKENS))

    def by_flex(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        kept, table = self.forget(k)[..., 0].cumsum(-1), self.table
        mask = torch_flex.create_block_mask(lambda b, h, i, j: i >= j, None, None, TOKENS, TOKENS, device="cpu")
        y: torch.Tensor = torch_flex.flex_attention(
            q, k, v, lambda s, b, h, i, j: s + kept[b, h, i] - kept[b, h, j] + table[h, i, j], block_mask=mask
        )
        return y

    def written(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rules: Rules) -> torch.Tensor:
        kept = self.forget(k)[..., 0].cumsum(-1)
        q, k, v = (scaled(x, by) for x, by in zip((q, k, v), rules.qkv_scale, strict=True))
        scores = q @ k.mT * 8**-0.5 + kept[..., None] - kept[..., None, :] + self.table
        scores = torch.where(_far >= 0, scores, -torch.inf)
        soft = (scores / rules.temperature).softmax(-1)
        return (scores.softmax(-1).detach() + rules.temperature * (soft - soft.detach())) @ v


def test_gradients_flow_into_what_the_functions_hold() -> None:
    model = llama(mask="causal", score="plain")
    for layer in model.model.layers:
        layer.self_attn = Bent().double()
    near(gradient(model, "GIM"), wanted(model, "GIM"))
    tables = [layer.self_attn.table for layer in model.model.layers]
    with gim.GIM(model):
        ours = torch.autograd.grad(model(IDS).logits[:, -1, 3].sum(), tables)
    for layer in model.model.layers:
        layer.self_attn.rules = get_rules("GIM")
    rest = dataclasses.replace(get_rules("GIM"), softmax="exact", q_scale=1.0, k_scale=1.0, v_scale=1.0)
    with gim.GIM(model, rules=rest, strict=False):
        want = torch.autograd.grad(model(IDS).logits[:, -1, 3].sum(), tables)
    for mine, theirs in zip(ours, want, strict=True):
        near(mine, theirs)


def test_a_gradient_through_the_logsumexp_is_an_error_that_names_the_module() -> None:
    model = llama(mask="all", score="plain")
    model.model.layers[1].self_attn = Sunk("all", "plain").double()
    with pytest.raises(UnsupportedModelError, match=r"^model\.layers\.1\.self_attn: .*logsumexp of flex_attention"):
        gradient(model, "GIM")


def test_scores_of_one_block_live_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, tokens = 4, 512
    monkeypatch.setattr(flex, "BLOCK_SCORES", 16 * heads * tokens)
    attention = Attention("all", "plain").double()
    attention.call = lambda q, k, v, **_: torch_flex.flex_attention(q, k, v, lambda s, b, h, i, j: s - 0.01 * (i - j))
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for one in out if isinstance(out, list | tuple) else [out]:
                largest = max(largest, one.numel() if isinstance(one, torch.Tensor) else 0)
            return out

    x = torch.randn(1, tokens, WIDTH, dtype=torch.float64, requires_grad=True)
    with Sizes():
        with gim.GIM(attention, strict=False):
            y = attention(x)[0]
        torch.autograd.grad(y.sum(), x)
    assert 16 * heads * tokens <= largest <= 2 * 16 * heads * tokens < heads * tokens * tokens / 8


def _with_function(made: Callable[[], Callable[..., Any]]) -> tuple[Any, torch.Tensor]:
    """A model whose score functions are made anew in each layer's forward, and its input."""
    model = llama(mask="causal", score="slopes")
    for layer in model.model.layers:
        layer.self_attn.call = lambda q, k, v, score_mod, **named: torch_flex.flex_attention(
            q, k, v, score_mod=made(), **named
        )
    return model, model.get_input_embeddings()(IDS).detach().requires_grad_()


def test_a_function_goes_on_to_hold_what_it_held() -> None:
    """Functions that are made in a loop share its variable."""

    kept: list[Any] = []

    def made() -> Callable[..., Any]:
        slopes = _slopes
        kept.append(lambda s, b, h, i, j: s - slopes[h] * (i - j))
        found: Callable[..., Any] = kept[-1]
        return found

    model, x = _with_function(made)
    want = wanted(llama(mask="causal", score="slopes"), "GIM")
    with gim.GIM(model):
        logits = model(inputs_embeds=x, use_cache=False).logits
    for one in kept:
        one.__closure__[0].cell_contents = 5 * _slopes
    near(torch.autograd.grad(logits[:, -1, 3].sum(), x)[0], want)


@pytest.mark.parametrize("how", ["in place", "an attribute"])
def test_what_a_function_holds_and_changes_before_the_backward_is_an_error(how: str) -> None:
    class Held:
        slopes = _slopes.clone()

    held = Held()
    model, x = _with_function(lambda: lambda s, b, h, i, j: s - held.slopes[h] * (i - j))
    with gim.GIM(model):
        logits = model(inputs_embeds=x, use_cache=False).logits
    if how == "in place":
        held.slopes.mul_(2)
    else:
        held.slopes = 2 * held.slopes
    with pytest.raises(
        UnsupportedModelError, match=r"^model\.layers\.1\.self_attn: the functions of flex_attention give"
    ):
        torch.autograd.grad(logits[:, -1, 3].sum(), x)


def test_blocks_that_a_mask_leaves_out_are_left_out() -> None:
    size, tokens = 4, 12
    count = torch.ones(1, 1, 3, dtype=torch.int32)
    index = torch.arange(3, dtype=torch.int32)[:, None].expand(1, 1, 3, 3).contiguous()
    mask = torch_flex.BlockMask.from_kv_blocks(count, index, BLOCK_SIZE=size, seq_lengths=(tokens, tokens))
    x = torch.randn(1, HEADS, tokens, 8, dtype=torch.float64, requires_grad=True)

    class Blocks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch_flex.flex_attention(x, x, x, block_mask=mask)

    model = Blocks()
    with gim.GIM(model):
        y = model(x)
    seen = torch.arange(tokens)[:, None] // size == torch.arange(tokens) // size
    assert_close64(y, torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=seen), "blocks")


def test_a_function_mode_of_the_users_stands_in_between() -> None:
    model = llama(mask="causal", score="plain")
    want = gradient(model, "GIM")
    with torch.device("cpu"):
        near(gradient(model, "GIM"), want)
