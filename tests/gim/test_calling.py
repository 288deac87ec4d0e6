"""How a model is called: through wrappers, on padded rows, with positions of its own; and that its anatomy is kept."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import nn

import gim
from gim import checkpoint, scoring
from gim.parts import anatomy
from gim.parts.adapters.hugging_face import as_before
from gim.parts.calling import Kept, Rows
from gim.plan import MemoryPlan
from tests.families import SHARED, SPECIAL, VOCABULARY, ids, make
from tests.first import first
from tests.head import heads_run
from tests.oracle import FLOAT64_MODEL_RELATIVE, assert_close64

BASELINE = 3
TARGET = 2
VIRTUAL = 3
LONG, SHORT = 17, 12
PLANS = (
    "none",
    "none+head=all",
    "mlp",
    "mlp+tile=5",
    "layer",
    "layer+tile=5",
    "layer+attention",
    "layer+attention+tile=5",
    "layer+offload+tile=5",
    "layer+attention+offload+tile=5",
)
#: What the fast suite takes of the grid: every kind of plan, on one family a method.
FEW = ("none", "mlp+tile=5", "layer+attention")
SIDES = ("left", "right")


def explain(model: Any, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    return gim.explain(model, tokens, **{"target_token_id": TARGET, "baseline_token_id": BASELINE, **options})


def prompts() -> list[torch.Tensor]:
    """A long and a short row, without the tokens that mean something to a model."""
    return [ids(1, length, seed=length)[0].clamp_min(10) for length in (LONG, SHORT)]


def padded(rows: list[torch.Tensor], side: str, pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as one batch and its mask."""
    length = max(len(row) for row in rows)
    tokens = torch.full((len(rows), length), pad)
    mask = torch.zeros_like(tokens)
    for index, row in enumerate(rows):
        columns = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        tokens[index, columns], mask[index, columns] = row, 1
    return tokens, mask


def check_rows(
    model: Any, want: list[torch.Tensor], plans: tuple[str, ...] = ("none",), pad: int = 0, **options: Any
) -> None:
    """Every row, alone and padded on either side, gives what is wanted under every plan."""
    rows = prompts()
    for plan in plans:
        for row, truth in zip(rows, want, strict=True):
            assert_close64(explain(model, row, memory=plan, **options), truth, plan, FLOAT64_MODEL_RELATIVE)
        for side in SIDES:
            tokens, mask = padded(rows, side, pad)
            scores = explain(model, tokens, attention_mask=mask, memory=plan, **options)
            assert not scores[mask == 0].any()
            for got, exists, truth in zip(scores, mask.bool(), want, strict=True):
                assert_close64(got[exists], truth, f"{plan} {side}", FLOAT64_MODEL_RELATIVE)


def alone(model: Any, row: torch.Tensor, at: int = -1) -> torch.Tensor:
    """Attributions ``[T]`` of one row that is not padded, from the model's own call, without anything of gim's but its
    rules."""
    leaves = []

    def leaf(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    embed = model.get_input_embeddings()
    baseline = embed(torch.tensor([[BASELINE]])).detach()
    with gim.GIM(model):
        handle = embed.register_forward_hook(leaf)
        logits = model(row[None]).logits
        handle.remove()
        explained = logits[0, TARGET] if logits.dim() == 2 else logits[0, at, TARGET]
        (grad,) = torch.autograd.grad(explained, leaves[0])
    return ((leaves[0] - baseline) * grad).sum(-1)[0].detach()


# ---- PEFT

DECODERS = ("llama", "gpt2", "gemma2", "qwen3")


def classifier(kind: str, **settings: Any) -> Any:
    """A random sequence classifier of three classes."""
    torch.manual_seed(0)
    config = getattr(hf, f"{kind}Config")(**{**SHARED, "num_labels": 3, **settings})
    return getattr(hf, f"{kind}ForSequenceClassification")(config).double().eval()


def adapted(family: str, method: str) -> Any:
    """A model with a randomly initialised adapter."""
    fan = {"fan_in_fan_out": True} if family == "gpt2" else {}
    linear = ["c_attn"] if family == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    task: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    config = {
        "lora": lambda: peft.LoraConfig(**task, **fan, r=2, target_modules=linear, init_lora_weights=False),
        "dora": lambda: peft.LoraConfig(
            **task, **fan, r=2, target_modules=linear, use_dora=True, init_lora_weights=False
        ),
        "ia3": lambda: peft.IA3Config(
            **task, **fan, target_modules=linear[:1], feedforward_modules=[], init_ia3_weights=False
        ),
        "prompt": lambda: peft.PromptTuningConfig(**task, num_virtual_tokens=VIRTUAL),
        "prefix": lambda: peft.PrefixTuningConfig(**task, num_virtual_tokens=VIRTUAL),
        "p-tuning": lambda: peft.PromptEncoderConfig(**task, num_virtual_tokens=VIRTUAL, encoder_hidden_size=8),
    }[method]()
    model = make(family)
    torch.manual_seed(1)
    return peft.get_peft_model(model, config).double().eval()


def by_hand(wrapped: Any, method: str, row: torch.Tensor) -> torch.Tensor:
    """Attributions ``[T]`` of the model inside, called with what the adapter stands for."""
    inner = wrapped.get_base_model()
    embed = inner.get_input_embeddings()
    with torch.no_grad():
        learned = wrapped.get_prompt(batch_size=1, max_cache_len=len(row) + VIRTUAL)
    with gim.GIM(inner):
        leaf = embed(row[None]).detach().requires_grad_()
        if method == "prefix":
            logits = inner(inputs_embeds=leaf, past_key_values=learned).logits
        else:
            logits = inner(inputs_embeds=torch.cat([learned.detach(), leaf], 1), use_cache=False).logits
        (grad,) = torch.autograd.grad(logits[0, -1, TARGET], leaf)
    return ((leaf - embed(torch.tensor([[BASELINE]]))) * grad).sum(-1)[0].detach()


def grid(methods: tuple[str, ...], fast: tuple[tuple[str, str], ...]) -> list[Any]:
    """Every method on every family under every plan, which is for the whole suite; a few of each for every run."""
    few = [
        pytest.param(family, method, FEW, id=f"{family}-{method}-few", marks=pytest.mark.slow if at == 2 else [])
        for at, (family, method) in enumerate(fast)
    ]
    every = [
        pytest.param(family, method, PLANS, id=f"{family}-{method}", marks=pytest.mark.slow)
        for family in DECODERS
        for method in methods
    ]
    return few + every


@pytest.mark.parametrize(
    ("family", "method", "plans"),
    grid(("lora", "dora", "ia3"), (("llama", "lora"), ("gemma2", "dora"), ("gpt2", "ia3"))),
)
def test_an_adapter_gives_what_the_merged_model_gives(family: str, method: str, plans: tuple[str, ...]) -> None:
    model = adapted(family, method)
    merged = copy.deepcopy(model).merge_and_unload().eval()
    want = [alone(merged, row) for row in prompts()]
    assert float((alone(make(family), prompts()[0]) - want[0]).norm()) > 1e-3 * float(want[0].norm())
    check_rows(model, want, plans)


@pytest.mark.parametrize(
    ("family", "method", "plans"),
    grid(("prompt", "prefix", "p-tuning"), (("llama", "prompt"), ("gpt2", "prefix"), ("qwen3", "p-tuning"))),
)
def test_learned_prompts_give_what_the_call_by_hand_gives(family: str, method: str, plans: tuple[str, ...]) -> None:
    model = adapted(family, method)
    check_rows(model, [by_hand(model, method, row) for row in prompts()], plans)


#: Further methods, by what their configs need besides the layers.
FURTHER: dict[str, tuple[Any, dict[str, Any]]] = {
    "adalora": (peft.AdaLoraConfig, {"init_r": 2, "target_r": 2, "total_step": 10}),
    "loha": (peft.LoHaConfig, {"r": 2, "init_weights": False}),
    "lokr": (peft.LoKrConfig, {"r": 2, "init_weights": False}),
    "oft": (peft.OFTConfig, {"r": 0, "oft_block_size": 8, "init_weights": False}),
    "vera": (peft.VeraConfig, {"r": 2, "init_weights": False}),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", FURTHER)
def test_further_adapters_give_what_the_merged_model_gives(method: str) -> None:
    kind, settings = FURTHER[method]
    plain = make("llama")
    torch.manual_seed(1)
    config = kind(task_type="CAUSAL_LM", target_modules=["q_proj", "o_proj"], **settings)
    model: Any = peft.get_peft_model(make("llama"), config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    merged = copy.deepcopy(model).merge_and_unload().eval()
    want = [alone(merged, row) for row in prompts()]
    assert float((alone(plain, prompts()[0]) - want[0]).norm()) > 1e-3 * float(want[0].norm())
    check_rows(model, want, FEW)


@pytest.mark.parametrize("family", ["bert-classifier", "llama-classifier"])
def test_an_adapted_classifier_gives_what_the_merged_model_gives(family: str) -> None:
    model = make(family) if family == "bert-classifier" else classifier("Llama", **SPECIAL)
    linear = ["query", "value"] if family == "bert-classifier" else ["q_proj", "v_proj"]
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=linear, init_lora_weights=False)
    adapted_model = peft.get_peft_model(model, config).double().eval()
    merged = copy.deepcopy(adapted_model).merge_and_unload().eval()
    check_rows(adapted_model, [alone(merged, row) for row in prompts()])


def test_positions_reach_the_model_inside() -> None:
    """Learned positions, so that another place gives another result."""
    model = adapted("gpt2", "lora")
    places = [torch.arange(40, 40 + len(row)) for row in prompts()]
    merged = copy.deepcopy(model).merge_and_unload().eval()
    table = merged.transformer.wpe
    want = []
    for row, at in zip(prompts(), places, strict=True):
        handle = table.register_forward_hook(lambda _, __, ___, at=at: table.weight[at][None].detach())
        want.append(alone(merged, row))
        handle.remove()
        assert float((alone(merged, row) - want[-1]).norm()) > 1e-2 * float(want[-1].norm())
    for plan in FEW:
        for side in SIDES:
            tokens, mask = padded(prompts(), side)
            positions, _ = padded(places, side)
            for wrapped in (model, Anything(model)):
                got = explain(wrapped, tokens, attention_mask=mask, position_ids=positions, memory=plan)
                for one, exists, truth in zip(got, mask.bool(), want, strict=True):
                    assert_close64(one[exists], truth, f"{plan} {side}", FLOAT64_MODEL_RELATIVE)


def test_packed_documents_stay_apart_inside_a_wrapper() -> None:
    model = adapted("llama", "lora")
    merged = copy.deepcopy(model).merge_and_unload().eval()
    first, second = prompts()
    positions = torch.cat([torch.arange(len(first)), torch.arange(len(second))])
    got = explain(model, torch.cat([first, second]), position_ids=positions, memory="layer")
    assert not got[: len(first)].any()
    assert_close64(got[len(first) :], alone(merged, second), "packed", FLOAT64_MODEL_RELATIVE)


def test_positions_that_a_wrapper_drops_are_an_error() -> None:
    row = prompts()[0]
    with (
        pytest.warns(UserWarning, match="Position ids are not supported"),
        pytest.raises(ValueError, match="position_ids cannot be given to PeftModelForCausalLM, which does not hand"),
    ):
        explain(adapted("llama", "prompt"), row, position_ids=torch.arange(5, 5 + LONG))


# ---- wrappers of one's own


class Anything(nn.Module):
    """Hands on whatever it is given."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner: Any = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class Bare(Anything):
    """Takes ids and a mask, calls forward itself, and gives logits alone."""

    def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:
        return self.inner.forward(input_ids, attention_mask).logits


class Headless(Anything):
    """Runs the head of a causal model itself."""

    def forward(self, input_ids: Any, **kwargs: Any) -> Any:
        return self.inner.lm_head(self.inner.model(input_ids, **kwargs)[0])


class Soft(Anything):
    """Puts virtual tokens in front of the prompt's, or behind them."""

    def __init__(self, inner: Any, behind: bool = False) -> None:
        super().__init__(inner)
        generator = torch.Generator().manual_seed(5)
        self.virtual = nn.Parameter(torch.randn(1, VIRTUAL, SHARED["hidden_size"], generator=generator).double())
        self.behind = behind

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        embedded: Any = self.inner.get_input_embeddings()(input_ids)
        virtual = self.virtual.expand(len(input_ids), -1, -1)
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask.new_ones(len(input_ids), VIRTUAL), attention_mask], 1)
        joined = torch.cat([embedded, virtual] if self.behind else [virtual, embedded], 1)
        return self.inner(inputs_embeds=joined, attention_mask=attention_mask, **kwargs)


@pytest.mark.parametrize(
    "wrap", [*first((Anything, Bare, Headless), (Headless,)), lambda x: Anything(Bare(Anything(x)))]
)
def test_a_wrapper_changes_nothing(wrap: Callable[[Any], nn.Module]) -> None:
    model = make("llama")
    check_rows(wrap(model), [alone(model, row) for row in prompts()], FEW)


def test_a_wrapper_around_an_encoder_or_a_classifier_changes_nothing() -> None:
    for family in ("bert", "bert-classifier"):
        model = make(family)
        check_rows(Anything(model), [alone(model, row) for row in prompts()])


def test_the_head_runs_on_the_explained_positions_through_a_wrapper() -> None:
    model = make("llama")
    seen: list[int] = []
    with heads_run(model, seen):
        for wrapped in (Anything(model), Bare(model), Soft(model)):
            explain(wrapped, prompts()[0], memory="none")
    assert seen == [1, 1, 1]


@pytest.mark.parametrize("plan", ["none", "layer"])
def test_no_cache_is_filled_through_a_wrapper(plan: str) -> None:
    seen: list[Any] = []
    for model in (make("llama"), adapted("llama", "lora")):
        inner = getattr(model, "base_model", model).model if hasattr(model, "peft_config") else model
        for layer in inner.model.layers:
            layer.register_forward_pre_hook(
                lambda _, __, named: seen.append(named.get("past_key_values")), with_kwargs=True
            )
        for wrapped in (model, Anything(model)):
            explain(wrapped, prompts()[0], memory=plan)
    assert len(seen) >= 12 and not any(one is not None for one in seen)


class Warm(Anything):
    """Makes something of each logit by itself."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return {"logits": self.inner(*args, **kwargs).logits * 0.5}


class Centred(Anything):
    """Makes something of the logits at all places together."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        logits = self.inner(*args, **kwargs).logits
        return None, logits - 0.1 * logits.mean(1, keepdim=True)


class Weighed(Anything):
    """Weighs the logits by those at a place from where no gradient comes."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.inner(*args, **kwargs)
        out.logits = out.logits * out.logits[:, 1:2].detach().sigmoid()
        return out


class Around(Anything):
    """Has a head of its own, which sees what the last layer gives at a place from where no gradient comes."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = self.inner.model(*args, **kwargs).last_hidden_state
        return self.inner.lm_head(hidden * hidden[:, 1:2].detach().sigmoid())


class Closing(Anything):
    """Gives the logits at the last column alone."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs).logits[:, -1]


def test_what_a_wrapper_makes_of_the_logits_is_explained() -> None:
    model, row = make("llama"), prompts()[0]
    want = alone(model, row)
    assert_close64(explain(Warm(model), row), 0.5 * want, "by itself", FLOAT64_MODEL_RELATIVE)
    assert_close64(explain(Closing(model), row), want, "the last", FLOAT64_MODEL_RELATIVE)
    mean = torch.stack([alone(model, row, at) for at in range(LONG)]).mean(0)
    for plan in ("none+head=all", "none", "layer", "auto"):
        got = explain(Centred(model), row, memory=plan)
        assert_close64(got, want - 0.1 * mean, f"together, {plan}", FLOAT64_MODEL_RELATIVE)
    for plan in ("none", "layer"):
        for outer in (Weighed(model), Around(model)):
            got, want = explain(outer, row, memory=plan), explain(outer, row, memory="none+head=all")
            assert_close64(got, want, f"{type(outer).__name__}, {plan}", FLOAT64_MODEL_RELATIVE)


def test_logits_that_cannot_be_told_are_an_error() -> None:
    model = make("llama")
    with pytest.raises(ValueError, match="Closing gives one row of logits for each prompt, not one for each token"):
        explain(Closing(model), prompts()[0], target_position=-2)
    with pytest.raises(
        ValueError, match=r"LlamaModel must put out logits \[B, T, V\] or \[B, C\], .*got BaseModelOutput"
    ):
        explain(model.model, prompts()[0])


class Head(nn.Module):
    """A head of one's own on an encoder without one, whose mask must be given."""

    def __init__(self, inner: Any, classes: int) -> None:
        super().__init__()
        self.encoder: Any = inner
        self.out = nn.Linear(SHARED["hidden_size"], classes).double()
        torch.manual_seed(0)
        nn.init.normal_(self.out.weight)

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        hidden = self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state
        mean = (hidden * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
        found: torch.Tensor = self.out(mean)
        return found[:, 0] if found.shape[1] == 1 else found


@pytest.mark.parametrize(("classes", "target"), [(3, TARGET), (1, 0)])
def test_a_head_of_ones_own(classes: int, target: int) -> None:
    model = Head(make("bert").bert, classes)
    embed = model.encoder.embeddings.word_embeddings
    want = []
    for row in prompts():
        with gim.GIM(model):
            leaf = embed(row[None]).detach().requires_grad_()
            hidden = model.encoder(inputs_embeds=leaf).last_hidden_state
            (grad,) = torch.autograd.grad(model.out(hidden.mean(1))[0, target], leaf)
        want.append(((leaf - embed(torch.tensor([[BASELINE]]))) * grad).sum(-1)[0].detach())
    check_rows(model, want, target_token_id=target)
    with pytest.raises(ValueError, match=f"target must be in 0..{classes - 1}, as many as there are logits, got 50"):
        explain(model, prompts()[0], target_token_id=50)


class Repeated(Anything):
    """Runs each row twice."""

    def forward(self, input_ids: Any, **kwargs: Any) -> Any:
        return self.inner(input_ids.repeat(2, 1), **kwargs).logits[: len(input_ids)]


def test_ids_that_are_not_embedded_as_they_are_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"as they are, of shape \(1, 17\); it embedded \(2, 17\) of them"):
        explain(Repeated(make("llama")), prompts()[0])


def test_ids_that_are_embedded_in_another_order_are_an_error() -> None:
    """A model that takes the sequence first: with as many rows as tokens the shapes are the same."""

    class SequenceFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)

        def get_input_embeddings(self) -> nn.Embedding:
            return self.embed

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return torch.as_tensor(self.head(self.embed(input_ids.mT).cumsum(0)).transpose(0, 1))

    tokens = torch.arange(16).reshape(4, 4)
    with pytest.raises(ValueError, match="embedded other ids, or these in another order"):
        gim.explain(SequenceFirst().eval(), tokens, baseline_token_id=0, rules="GRADIENT")


@pytest.mark.parametrize("wrap", [Soft, lambda x: Anything(Soft(x))])
def test_virtual_tokens_in_front_are_no_part_of_the_prompt(wrap: Callable[[Any], nn.Module]) -> None:
    model = make("llama")
    virtual = Soft(model).virtual
    embed = model.get_input_embeddings()
    want = []
    for row in prompts():
        with gim.GIM(model):
            leaf = embed(row[None]).detach().requires_grad_()
            logits = model(inputs_embeds=torch.cat([virtual.detach(), leaf], 1), use_cache=False).logits
            (grad,) = torch.autograd.grad(logits[0, -1, TARGET], leaf)
        want.append(((leaf - embed(torch.tensor([[BASELINE]]))) * grad).sum(-1)[0].detach())
    check_rows(wrap(model), want, FEW)


def test_virtual_tokens_behind_are_an_error() -> None:
    for plan in ("none", "layer"):
        with pytest.raises(ValueError, match="makes 20 tokens of 17 ids, and the ids are not the last of them"):
            explain(Soft(make("llama"), behind=True), prompts()[0], memory=plan)


class Plain(nn.Module):
    """A causal model outside transformers, whose one argument has a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(97, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 97)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        q = self.norm(self.embed(tokens)).unflatten(-1, (2, 8)).transpose(1, 2)
        mixed = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        out: torch.Tensor = self.head(mixed.transpose(1, 2).flatten(-2))
        return out


def test_a_plain_model_in_a_wrapper_gives_what_it_gives_alone() -> None:
    torch.manual_seed(0)
    model, row = Plain().double(), prompts()[0]
    assert_close64(explain(Anything(model), row), explain(model, row), "plain")
    tokens, mask = padded(prompts(), "left")
    for one in (model, Anything(model)):
        with pytest.raises(ValueError, match=f"attention_mask cannot be given to {type(one).__name__}"):
            explain(one, tokens, attention_mask=mask)


# ---- positions and padding

POSITIONS: dict[str, Callable[[], Any]] = {
    "roberta": lambda: masked("Roberta"),
    "xlm-roberta": lambda: masked("XLMRoberta"),
    "camembert": lambda: masked("Camembert"),
    "esm": lambda: masked("Esm", position_embedding_type="absolute", token_dropout=False, mask_token_id=4),
    "esm-rotary": lambda: masked("Esm", position_embedding_type="rotary", token_dropout=False, mask_token_id=4),
    "roberta-classifier": lambda: classifier("Roberta", pad_token_id=1),
    "camembert-classifier": lambda: classifier("Camembert", pad_token_id=1),
}


def masked(kind: str, **settings: Any) -> Any:
    """A random masked language model that counts positions from behind those of padding."""
    torch.manual_seed(0)
    config = getattr(hf, f"{kind}Config")(**{**SHARED, "max_position_embeddings": 34, "pad_token_id": 1, **settings})
    return getattr(hf, f"{kind}ForMaskedLM")(config).double().eval()


@pytest.mark.parametrize("name", first(POSITIONS, ("esm", "esm-rotary", "camembert-classifier")))
def test_positions_count_as_in_the_row_alone(name: str) -> None:
    model = POSITIONS[name]()
    want = [alone(model, row) for row in prompts()]
    for pad in (1, 5):  # what stands at padding says nothing to the model
        check_rows(model, want, pad=pad)


def test_the_place_of_padding_is_no_position_of_a_prompt() -> None:
    model = masked("Roberta")
    assert anatomy.of(model).position_limit == 32
    row = ids(1, 32)[0].clamp_min(10)
    assert_close64(explain(model, row), alone(model, row), "the longest", FLOAT64_MODEL_RELATIVE)
    with pytest.raises(ValueError, match="the prompt has 33 tokens, and RobertaForMaskedLM has 32 positions"):
        explain(model, ids(1, 33)[0].clamp_min(10))


CLASSIFIERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: make("bert-classifier"),
    "llama": lambda: classifier("Llama", **SPECIAL),
    "qwen3": lambda: classifier("Qwen3", head_dim=16, **SPECIAL),
    "gemma2": lambda: classifier("Gemma2", head_dim=16, attn_implementation="eager", **SPECIAL),
    "gpt2": lambda: classifier("GPT2", n_embd=48, n_layer=2, n_head=4, n_positions=64, **SPECIAL),
    "opt": lambda: classifier("OPT", ffn_dim=80, word_embed_proj_dim=48, init_std=0.2, **SPECIAL),
    "electra": lambda: classifier("Electra", embedding_size=16),
    "distilbert": lambda: classifier("DistilBert", dim=48, hidden_dim=80, n_layers=2, n_heads=4),
}


@pytest.mark.parametrize("name", first(CLASSIFIERS, ("llama", "gpt2", "distilbert")))
def test_a_classifier_reads_no_padding(name: str) -> None:
    model = CLASSIFIERS[name]()
    want = [alone(model, row) for row in prompts()]
    assert all(float(one.norm()) > 0 for one in want)
    check_rows(model, want)
    check_rows(Anything(model), want, ("layer",))


class Pooled(Anything):
    """Reads a class off the mean over all columns, padding too."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs).logits.mean(1)


def test_a_model_that_reads_padding_is_an_error() -> None:
    model = Pooled(make("bert"))
    tokens, mask = padded(prompts(), "left")
    with pytest.raises(ValueError, match="Pooled reads padding in row 1, so a padded row does not give what it gives"):
        explain(model, tokens, attention_mask=mask)


def test_rows_are_put_in_one_alignment_and_back() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        batch, length = (int(one) for one in torch.randint(1, 9, (2,), generator=generator))
        start = torch.randint(0, length, (batch,), generator=generator)
        stop = start + 1 + (torch.rand(batch, generator=generator) * (length - start)).long().clamp_max(length - 1)
        columns = torch.arange(length)
        mask = (columns >= start[:, None]) & (columns < stop[:, None])
        tokens, places = ids(batch, length), torch.randint(0, 99, (batch, length), generator=generator)
        rows = Rows.of(tokens, mask, places, pad_token_id=96)
        for index in range(batch):
            own = slice(int(start[index]), int(stop[index].clamp_max(length)))
            count = int(mask[index].sum())
            assert rows.position_ids is not None
            torch.testing.assert_close(rows.ids[index, :count], tokens[index, own], rtol=0.0, atol=0.0)
            torch.testing.assert_close(rows.position_ids[index, :count], places[index, own], rtol=0.0, atol=0.0)
            assert (rows.ids[index, count:] == 96).all()
            assert rows.mask is None or (rows.mask[index].sum() == count and bool(rows.mask[index, :count].all()))
        torch.testing.assert_close(rows.columns(start[:, None]), torch.zeros(batch, 1, dtype=torch.int64))
        scores = torch.rand(rows.ids.shape, generator=generator)
        back = rows.as_given(scores)
        assert back.shape == mask.shape and not back[~mask].any()
        again = Rows.of(back, mask, pad_token_id=0).ids
        torch.testing.assert_close(again, scores if rows.mask is None else scores.masked_fill(~rows.mask, 0.0))


# ---- text alone on models that also see or hear

EYES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT: dict[str, Any] = {**SHARED, "num_hidden_layers": 2, "rms_norm_eps": 1e-6}
QWEN_IDS = {"image_token_id": 90, "vision_start_token_id": 91, "vision_end_token_id": 92, "video_token_id": 93}
QWEN_EYES: dict[str, Any] = {"depth": 2, "patch_size": 4, "spatial_merge_size": 2, "num_heads": 2, "in_channels": 3}
ROTARY = {"rope_type": "default", "mrope_section": [1, 2, 3]}


def gemma3() -> tuple[Any, Any]:
    config = hf.Gemma3Config(
        text_config={**TEXT, "head_dim": 16, "sliding_window": 6},
        vision_config={**EYES, "image_size": 8, "patch_size": 4, "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=90,
        boi_token_index=91,
        eoi_token_index=92,
    )
    return hf.Gemma3ForConditionalGeneration(config), hf.Gemma3ForCausalLM(config.text_config)


def gemma3n() -> tuple[Any, Any]:
    text = {
        **TEXT,
        "num_hidden_layers": 4,
        "intermediate_size": [80] * 4,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "head_dim": 16,
        "sliding_window": 6,
        "num_kv_shared_layers": 2,
        "laurel_rank": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
    }
    config = hf.Gemma3nConfig(
        text_config=text,
        vision_config={"hidden_size": 16, "vocab_offset": VOCABULARY, "vocab_size": 4},
        audio_config={
            "hidden_size": 16,
            "vocab_offset": VOCABULARY + 4,
            "vocab_size": 4,
            "conf_num_hidden_layers": 1,
            "conf_num_attention_heads": 2,
        },
    )
    return hf.Gemma3nForConditionalGeneration(config), hf.Gemma3nForCausalLM(config.text_config)


def llava() -> tuple[Any, Any]:
    eyes = hf.CLIPVisionConfig(**EYES, image_size=8, patch_size=4, projection_dim=16)
    config = hf.LlavaConfig(vision_config=eyes, text_config=hf.LlamaConfig(**TEXT), image_token_index=90)
    return hf.LlavaForConditionalGeneration(config), hf.LlamaForCausalLM(config.text_config)


def qwen2_vl() -> tuple[Any, Any]:
    config = hf.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": {"rope_theta": 10_000.0, **ROTARY}},
        vision_config={**QWEN_EYES, "embed_dim": 16, "hidden_size": 48, "mlp_ratio": 2},
        **QWEN_IDS,
    )
    return hf.Qwen2VLForConditionalGeneration(config), hf.Qwen2ForCausalLM(hf.Qwen2Config(**TEXT))


def qwen3_vl() -> tuple[Any, Any]:
    config = hf.Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 12, "rope_parameters": {"rope_theta": 10_000.0, **ROTARY}},
        vision_config={**QWEN_EYES, "hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 48},
        **QWEN_IDS,
    )
    return hf.Qwen3VLForConditionalGeneration(config), hf.Qwen3ForCausalLM(hf.Qwen3Config(**TEXT, head_dim=12))


def blind(model: Any, tokens: torch.Tensor, mask: torch.Tensor | None, plan: str) -> torch.Tensor:
    """Attributions ``[B, T]`` of a model whose eyes and ears do not run, which a strict context takes for a fault."""
    terms = scoring.Terms(
        torch.tensor([[-1]]) % tokens.shape[1] if mask is None else last(mask),
        torch.full((len(tokens), 1), TARGET),
        torch.ones(len(tokens), 1, dtype=torch.int64),
        "logit",
    )
    chosen = MemoryPlan.parse(plan)
    request = scoring.Request.of(tokens, mask, terms, pad_token_id=anatomy.of(model).pad_token_id)
    with gim.GIM(model, strict=False), checkpoint.applied(chosen, model, request.kept, tokens.device):
        scores = scoring.passes(model, request, BASELINE, chosen).scores
    return request.rows.as_given(scores)


def last(mask: torch.Tensor) -> torch.Tensor:
    """The column ``[B, 1]`` of each row's last token."""
    return (torch.arange(mask.shape[1]) * mask).amax(-1)[:, None]


@pytest.mark.parametrize(
    "build", [gemma3, *(pytest.param(one, marks=pytest.mark.slow) for one in (gemma3n, llava, qwen2_vl, qwen3_vl))]
)
def test_text_alone_gives_what_the_text_model_gives(
    build: Callable[[], tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Gemma 3n sees with a package that need not be there; what sees does not run.
    from transformers.models.gemma3n import modeling_gemma3n

    made = modeling_gemma3n.AutoModel.from_config
    siglip = hf.SiglipVisionConfig(**EYES, image_size=8, patch_size=4, vision_use_head=False)
    monkeypatch.setattr(
        modeling_gemma3n.AutoModel,
        "from_config",
        lambda config, **named: made(siglip if type(config).__name__ == "Gemma3nVisionConfig" else config, **named),
    )
    torch.manual_seed(0)
    model, text = build()
    model, text = model.double().eval(), text.double().eval()
    with torch.no_grad():  # a new model has 0 there, and Gemma 3n takes a root of it
        model.get_input_embeddings().weight[0].normal_(0.0, 0.2)
    text.model.load_state_dict(model.model.language_model.state_dict())
    text.lm_head.load_state_dict(model.lm_head.state_dict())
    parts = anatomy.of(model)
    assert parts.embedding is model.model.language_model.embed_tokens
    assert [layer for _, layer in parts.layers] == list(model.model.language_model.layers)
    want = [alone(text, row) for row in prompts()]
    for plan in FEW if build is not gemma3n else ("none", "layer+attention"):
        for row, truth in zip(prompts(), want, strict=True):
            assert_close64(blind(model, row[None], None, plan)[0], truth, plan, FLOAT64_MODEL_RELATIVE)
        for side in SIDES:
            tokens, mask = padded(prompts(), side)
            got = blind(model, tokens, mask.bool(), plan)
            for one, exists, truth in zip(got, mask.bool(), want, strict=True):
                assert_close64(one[exists], truth, f"{plan} {side}", FLOAT64_MODEL_RELATIVE)


# ---- the anatomy


def test_an_anatomy_is_frozen_and_knows_its_parts_through_wrappers() -> None:
    model = make("llama")
    for wrapped in (model, Anything(model), Anything(Bare(model))):
        parts = anatomy.of(wrapped)
        assert parts.model is wrapped
        assert parts.embedding is model.model.embed_tokens
        assert [layer for _, layer in parts.layers] == list(model.model.layers)
        assert all(parts.modules[name] is layer for name, layer in parts.layers)
        assert parts.cores == (model, model.model)
        assert (parts.head, parts.hidden_size, parts.vocabulary_size) == ("next token", 48, VOCABULARY)
        assert (parts.dtype, parts.device) == (torch.float64, torch.device("cpu"))
        with pytest.raises(dataclasses.FrozenInstanceError):
            parts.head = "class"
    assert anatomy.of(Anything(make("bert"))).head == "masked token"
    assert anatomy.of(Anything(make("bert-classifier"))).head == "class"


def test_an_anatomy_is_found_once_and_again_where_the_model_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    searches: list[Any] = []
    find = anatomy._find

    def counted(modules: Any, tree: int) -> Any:
        searches.append(modules)
        return find(modules, tree)

    monkeypatch.setattr(anatomy, "_find", counted)
    model = make("llama")
    explain(model, prompts()[0], memory="layer")
    # A context gives activations another class for a while, which is another model.
    before = len(searches)
    explain(model, prompts()[0], memory="layer")
    anatomy.of(model)
    outside = len(searches)
    anatomy.of(model)
    assert len(searches) == outside
    assert before <= 2 and outside <= 2 * before
    model.resize_token_embeddings(VOCABULARY + 5)
    parts = anatomy.of(model)
    assert len(searches) == outside + 1 and parts.vocabulary_size == VOCABULARY + 5
    assert parts.embedding is model.get_input_embeddings()
    model.model.layers = model.model.layers[:2]
    assert len(anatomy.of(model).layers) == 2


def test_an_anatomy_holds_no_model_and_goes_into_no_copy() -> None:
    model = make("llama")
    bare = {name: set(vars(module)) for name, module in model.named_modules()}
    explain(Anything(model), prompts()[0], memory="none")
    assert {name: set(vars(module)) for name, module in model.named_modules()} == bare
    twin = copy.deepcopy(model)
    assert anatomy.of(twin).embedding is twin.model.embed_tokens
    again = pickle.loads(pickle.dumps(model))
    assert anatomy.of(again).embedding is again.model.embed_tokens
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_call_leaves_the_model_as_it_was_after_an_error_too() -> None:
    model = make("llama")
    wrapped = Anything(Bare(model))
    before = {name: dict(vars(module)) for name, module in wrapped.named_modules()}

    def fail(*_: Any) -> None:
        raise RuntimeError("of a hook")

    for hook in (None, fail):
        if hook is not None:
            handle = model.model.norm.register_forward_hook(hook)
            with pytest.raises(RuntimeError, match="of a hook"):
                explain(wrapped, prompts()[0])
            handle.remove()
        else:
            explain(wrapped, prompts()[0])
        after = {name: dict(vars(module)) for name, module in wrapped.named_modules()}
        assert {name: set(one) for name, one in after.items()} == {name: set(one) for name, one in before.items()}
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in wrapped.modules())


def test_places_among_more_tokens_count_from_the_end() -> None:
    kept = Kept(torch.tensor([1, 4]), tokens=5)
    assert kept.among(5).tolist() == [1, 4] and kept.among(8).tolist() == [4, 7]
    with pytest.raises(ValueError, match="makes 4 tokens of 5 ids, so none of them has a place"):
        kept.among(4)


def test_a_cache_as_it_was_does_not_grow() -> None:
    cache = hf.DynamicCache()
    states = torch.rand(1, 2, 3, 4)
    cache.update(states, states, 0)
    kept = as_before(cache)
    cache.update(states, states, 0)
    cache.update(states, states, 1)
    assert (kept.get_seq_length(0), cache.get_seq_length(0), len(kept.layers), len(cache.layers)) == (3, 6, 1, 2)
    assert as_before(states) is states
