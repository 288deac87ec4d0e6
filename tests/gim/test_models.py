"""GIM on Hugging Face decoders: what it counts, leaves behind and keeps apart. Its numbers are test_families.py's."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaForCausalLM, StaticCache

import gim
from gim.context import inspect
from gim_kernels.budget import relative_error
from tests import eager
from tests.families import FAMILIES, KINDS, ids, make, text_model, tokenizer
from tests.first import first
from tests.model_code import Wide
from tests.oracle import (
    FLOAT64_MODEL_RELATIVE,
    FLOAT64_SAME_RELATIVE,
    assert_agree,
    assert_close64,
    assert_within_budget,
)

BASELINE = 3


def embedding_gradient(model: Any, tokens: torch.Tensor, **context: Any) -> torch.Tensor:
    """The gradient of the last logits' sum of squares with respect to the embeddings, by the user's own backward."""
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_(True)
    with gim.GIM(model, **context):
        model(inputs_embeds=embedded, use_cache=False).logits[:, -1].pow(2).sum().backward()
    assert embedded.grad is not None
    return embedded.grad


def enable_checkpoints(model: Any, *how: Any) -> None:
    """Hugging Face's own layer checkpoints, under the name that the installed version has for them."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(*how)


by_kind = pytest.mark.parametrize("family", first(FAMILIES, KINDS))


@pytest.mark.parametrize("family", first(FAMILIES, ("gemma2", "mixtral")))
def test_every_rule_alone_changes_the_gradient(family: str) -> None:
    model, tokens = make(family), ids(1)
    plain = gim.rules.GRADIENT
    off: dict[str, Any] = {
        "freeze_norm": False, "softmax_temperature": None, "q_scale": None, "k_scale": None, "v_scale": None,
        "gate_scale": None, "up_scale": None,
    }  # fmt: skip
    base = embedding_gradient(model, tokens, rules=plain)
    assert torch.equal(base, embedding_gradient(model, tokens, **off))
    seen = [base]
    gated = FAMILIES[family].gated != 0
    for name, value in (
        ("freeze_norm", True), ("softmax_temperature", 2.0), ("q_scale", 0.25), ("k_scale", 0.25), ("v_scale", 0.5),
        ("gate_scale", 0.5), ("up_scale", 0.5),
    ):  # fmt: skip
        gradient = embedding_gradient(model, tokens, **{**off, name: value})
        if name in ("gate_scale", "up_scale") and not gated:
            assert torch.equal(gradient, base)  # and the report says so: see the test of its counts
            continue
        for other in seen:
            assert relative_error(gradient, other) > 1e-3, name
        seen.append(gradient)
    for changed in [{"softmax": "constant"}, *([{"activation": "ratio"}] if gated else [])]:
        rules = gim.rules.Rules(**{**plain.to_dict(), **changed})
        assert relative_error(embedding_gradient(model, tokens, rules=rules), base) > 1e-3


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.slow)]
)
@by_kind
def test_the_forward_ignores_the_rules_and_is_the_models_own(family: str, dtype: torch.dtype) -> None:
    model, tokens = make(family, dtype), ids()
    mask = torch.ones_like(tokens)
    mask[1, -8:] = 0
    for arguments in ({}, {"attention_mask": mask}):
        with torch.no_grad():
            own = model(tokens, use_cache=False, **arguments).logits
            inside = []
            for preset in gim.rules.PRESETS:
                with gim.GIM(model, rules=preset):
                    inside.append(model(tokens, use_cache=False, **arguments).logits)
            with Wide():
                truth = copy.deepcopy(model).double()(tokens, use_cache=False, **arguments).logits
        for other in inside[1:]:
            assert torch.equal(inside[0], other)
        keep = mask.bool() if arguments else torch.ones_like(mask).bool()
        assert_within_budget(inside[0][keep], truth[keep], own[keep], "logits")


@pytest.mark.parametrize("side", ["left", pytest.param("right", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", first(FAMILIES, ("gemma2", "gpt2")))
def test_each_row_of_a_batch_equals_its_own_run(family: str, side: str) -> None:
    model = make(family)
    rows = [ids(1, length, seed=length)[0] for length in (23, 9, 1, 16)]
    longest = max(map(len, rows))
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for index, row in enumerate(rows):
        where = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        tokens[index, where], mask[index, where] = row, 1
    got = gim.explain(model, tokens, baseline_token_id=BASELINE, attention_mask=mask)
    assert got.shape == tokens.shape
    for index, row in enumerate(rows):
        alone = gim.explain(model, row, baseline_token_id=BASELINE)
        assert alone.shape == row.shape
        assert_close64(got[index][mask[index].bool()], alone, f"row {index}", relative=FLOAT64_MODEL_RELATIVE)
        assert bool((got[index][~mask[index].bool()] == 0).all())


def state(model: torch.nn.Module) -> dict[str, Any]:
    """Everything about a model that a context could leave behind."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers", "_modules"):
                found[f"{name}/{key}"] = {k: (id(v), None if v is None else v.__class__) for k, v in value.items()}
            elif isinstance(value, dict):
                found[f"{name}/{key}"] = dict(value)
            else:
                found[f"{name}/{key}"] = id(value) if isinstance(value, torch.Tensor) else value
        config = getattr(module, "config", None)
        if config is not None:
            found[f"{name}/config"] = dict(vars(config))
    for name, parameter in model.named_parameters():
        found[f"{name}/parameter"] = (
            parameter.requires_grad,
            parameter.grad,
            parameter.detach().clone().numpy().tobytes(),
        )
    return found


@pytest.mark.parametrize("family", first(FAMILIES, ("llama", "gpt2")))
def test_undo_is_exact(family: str) -> None:
    model, tokens = make(family, torch.float32), ids()
    before, logits = state(model), model(tokens).logits
    gim.explain(model, tokens, baseline_token_id=BASELINE)
    gim.explain(model, tokens, baseline_token_id=BASELINE, memory="layer")
    assert state(model) == before
    with pytest.raises(KeyError), gim.GIM(model):
        model(tokens)
        raise KeyError("a user's own error")
    assert state(model) == before
    with gim.GIM(model, rules="GIM"):
        with gim.GIM(model, rules="GRADIENT") as inner:
            model(tokens)
        with gim.GIM(model, rules="GIM_CONSTANT"):
            pass
    assert inner.forwards == 1
    assert state(model) == before
    assert torch.equal(model(tokens).logits, logits)


def test_nested_contexts_follow_the_inner_rules_and_come_back() -> None:
    model, tokens = make("llama"), ids(1)
    gim_gradient, plain = (embedding_gradient(model, tokens, rules=name) for name in ("GIM", "GRADIENT"))
    with gim.GIM(model):
        assert torch.equal(embedding_gradient(model, tokens, rules="GRADIENT"), plain)
        embedded = model.get_input_embeddings()(tokens).detach().requires_grad_(True)
        model(inputs_embeds=embedded, use_cache=False).logits[:, -1].pow(2).sum().backward()
        assert embedded.grad is not None and torch.equal(embedded.grad, gim_gradient)


def test_parameters_keep_no_gradient_and_keep_asking() -> None:
    model = make("qwen3", torch.float32)
    frozen = model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    gim.explain(model, ids(), baseline_token_id=BASELINE)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad == (parameter is not frozen) for parameter in model.parameters())


def test_a_users_own_backward_gets_parameter_gradients() -> None:
    model, tokens = make("llama"), ids(1, 12)
    with gim.GIM(model, rules="GRADIENT"):
        model(tokens).logits[:, -1].logsumexp(-1).sum().backward()
    got = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    table = model.get_input_embeddings().weight
    model.zero_grad()
    parameters = dict(model.named_parameters())

    class Live:
        """The model with parameters that stay attached, for the eager implementation."""

        config = model.config

        @staticmethod
        def named_parameters() -> Any:
            return parameters.items()

    # The eager implementation detaches weights; for this test alone they must stay leaves.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "detach", lambda self: self)
        eager.forward(Live, table[tokens], eager.PRESETS["GRADIENT"])[:, -1].logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert_close64(got[name], parameter.grad, name, relative=FLOAT64_MODEL_RELATIVE)


def test_two_threads_with_two_models_and_two_rule_sets_do_not_see_each_other() -> None:
    first = make("llama", seed=1)
    second = type(first)(first.config).double().eval()  # one config object for both: the hardest case
    second.load_state_dict(make("llama", seed=2).state_dict())
    jobs = [(first, "GIM"), (second, "GRADIENT")]
    tokens = ids(1, 24)
    want = [gim.explain(model, tokens, baseline_token_id=BASELINE, rules=rules) for model, rules in jobs]
    failures: list[str] = []
    barrier = threading.Barrier(2)
    count = torch.get_num_threads()

    def work(index: int) -> None:
        torch.set_num_threads(count)  # a new thread takes every core at first, and rounds its sums otherwise
        model, rules = jobs[index]
        barrier.wait()
        for _ in range(8):
            got = gim.explain(model, tokens, baseline_token_id=BASELINE, rules=rules)
            if not torch.equal(got, want[index]):
                failures.append(rules)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert first.config._attn_implementation == "sdpa"


def test_one_model_in_two_threads_follows_the_rules_of_each() -> None:
    model, tokens = make("llama"), ids()
    count = torch.get_num_threads()
    want = {rules: embedding_gradient(model, tokens, rules=rules) for rules in ("GIM", "ATTNLRP", "GRADIENT")}
    plain = model(tokens).logits
    wrong: list[str] = []

    def work(rules: str | None) -> None:
        torch.set_num_threads(count)  # a new thread takes every core at first, and rounds its sums otherwise
        for _ in range(3):
            if rules is None:  # a thread that has opened no context
                if relative_error(model(tokens).logits, plain) > FLOAT64_MODEL_RELATIVE:
                    wrong.append("no context")
            elif not torch.equal(embedding_gradient(model, tokens, rules=rules), want[rules]):
                wrong.append(rules)

    threads = [threading.Thread(target=work, args=(rules,)) for rules in (*want, None)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("preset", ["GIM", "GIM_CONSTANT"])
def test_a_constant_softmax_sends_nothing_into_queries_and_keys(preset: str) -> None:
    model = make("llama")
    attention = model.model.layers[0].self_attn
    weights = [getattr(attention, f"{name}_proj").weight.requires_grad_(True) for name in "qkv"]
    with gim.GIM(model, rules=preset):
        loss = model(ids(), use_cache=False).logits.pow(2).sum()
        grads = torch.autograd.grad(loss, weights, allow_unused=True)
    # None is not zeros, which would have cost their products.
    assert [grad is None for grad in grads] == [preset == "GIM_CONSTANT"] * 2 + [False]
    assert all(grad.any() for grad in grads if grad is not None)


class GatedByAnother(torch.nn.Module):
    """A gated MLP that wants a second argument."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.mlp, self.act_fn = torch.nn.ModuleList([mlp.gate_proj, mlp.up_proj, mlp.down_proj]), mlp.act_fn

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        gate, up, down = self.mlp
        out: torch.Tensor = down(self.act_fn(gate(x)) * up(x)) * mask
        return out


class Called(torch.nn.Module):
    """Gives its one argument, and another, to the module that it holds."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x, torch.ones_like(x))
        return out


def test_a_gated_mlp_whatever_it_is_called_with() -> None:
    model, tokens = make("llama"), ids()
    want = gim.explain(model, tokens, baseline_token_id=BASELINE)
    for layer in model.model.layers:
        layer.mlp = Called(GatedByAnother(layer.mlp))
    with gim.GIM(model) as report:
        model(tokens)
        assert report.notes == [] and report.counts()["gated_mlp"] == (len(model.model.layers), len(model.model.layers))
    got = gim.explain(model, tokens, baseline_token_id=BASELINE)
    assert_close64(got, want, "a gated MLP found when it runs", relative=FLOAT64_MODEL_RELATIVE)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_report_counts_the_models_own_layers(family: str) -> None:
    model = make(family)
    row, layers = FAMILIES[family], model.config.num_hidden_layers
    with gim.GIM(model) as report:
        model(ids())
        model(ids())
    gated = layers if row.gated is None else row.gated
    counts = {"attention": layers, "norm": row.norms * layers + row.other_norms, "gated_mlp": gated}
    assert report.counts() == {part: (count, 2 * count) for part, count in counts.items()}
    engines = {part: "blockwise" for part, count in counts.items() if count}
    if family == "gpt-oss":
        engines["gated_mlp"] = "torch"  # an activation of its own, which the kernels do not have
    assert report.engines == engines
    # A router's weights are told of, for no rule is about them.
    notes = [note for note in report.notes if not note.startswith("one factor for a row")]
    assert notes == ([] if gated else ["gate_scale and up_scale: the model has no gated MLP"])
    assert report.complete and report.forwards == 2
    found = inspect(model)
    assert {part: n for part, (n, _) in found.counts().items()} == counts
    assert {a.module for a in found.of("attention")} == {f"{row.layers}.{i}.{row.attention}" for i in range(layers)}


@pytest.mark.parametrize("memory", ["none", "layer", "auto", gim.MemoryPlan("layer")])
def test_every_memory_plan_gives_the_same_attribution(memory: Any) -> None:
    model, tokens = make("qwen3"), ids()
    want, _ = eager.attribution(model, tokens, eager.PRESETS["GIM"], baseline=BASELINE)
    got = gim.explain(model, tokens, baseline_token_id=BASELINE, memory=memory)
    assert_close64(got, want, str(memory), relative=FLOAT64_MODEL_RELATIVE)


class Scaled(LlamaForCausalLM):
    """Writes into what its embedding puts out, as CTRL does and many a model that adds positions."""

    def forward(self, input_ids: Any = None, **named: Any) -> Any:
        embedded = self.model.embed_tokens(input_ids)
        embedded *= 3.0
        return super().forward(inputs_embeds=embedded, **named)


def test_a_model_may_write_into_its_embeddings() -> None:
    model, twin, tokens = make("llama"), make("llama"), ids(2, 9)
    with torch.no_grad():
        twin.get_input_embeddings().weight.mul_(3.0)
    model.__class__ = Scaled
    want = gim.explain(twin, tokens, target_token_id=7, baseline_token_id=BASELINE)
    for plan in ("none", "layer", "mlp+tile=4"):
        found = gim.explain(model, tokens, target_token_id=7, baseline_token_id=BASELINE, memory=plan)
        assert_close64(found, want, plan, FLOAT64_SAME_RELATIVE)
    assert inspect(model).counts() == inspect(twin).counts()
    ran = []
    with model.get_input_embeddings().register_forward_hook(lambda *_: ran.append(1)):
        gim.explain(model, tokens, target_token_id=7, baseline_token_id=BASELINE)
        known = len(ran)
        gim.explain(twin, tokens, target_token_id=7, baseline_token_id=BASELINE)
    with twin.get_input_embeddings().register_forward_hook(lambda *_: ran.append(1)):
        gim.explain(twin, tokens, target_token_id=7, baseline_token_id=BASELINE)
    assert known == len(ran) - known  # once it is known, such a model runs as often as any other


class Beside(nn.Module):
    """Two models that read the same ids, as an ensemble or contrastive decoding does."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None) -> torch.Tensor:
        return torch.stack([one(input_ids, attention_mask=attention_mask).logits for one in self.models]).sum(0)


class TwoTables(LlamaForCausalLM):
    """Adds what a second table says of the ids to what its layers put out."""

    def forward(self, input_ids: Any = None, **named: Any) -> Any:
        out = super().forward(input_ids, **named)
        out.logits = out.logits + self.look_up(self.beside, input_ids)[:, -1:]
        return out


#: How a row of a table is had by its number.
LOOKUPS: dict[str, Callable[[nn.Embedding, torch.Tensor], torch.Tensor]] = {
    "module": lambda table, ids: table(ids),
    "function": lambda table, ids: F.embedding(ids, table.weight),
    "by name": lambda table, ids: F.embedding(weight=table.weight, input=ids.clone()),
    "index": lambda table, ids: table.weight[ids],
    "index of columns too": lambda table, ids: table.weight[ids, :],
    "index_select": lambda table, ids: table.weight.index_select(0, ids.flatten()).view(*ids.shape, -1),
    "index_select by name": lambda table, ids: torch.index_select(table.weight, dim=0, index=ids[0])[None],
    "one_hot": lambda table, ids: F.one_hot(ids, len(table.weight)).to(table.weight) @ table.weight,
    "bag": lambda table, ids: F.embedding_bag(ids.view(-1, 1), table.weight).view(*ids.shape, -1),
}


class Held(nn.Module):
    """An embedding in a wrapper, as PEFT's are."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table, self.weight = table, table.weight

    def forward(self, ids: torch.Tensor) -> Any:
        return self.table(ids)


@pytest.mark.parametrize("how", LOOKUPS)
def test_a_second_table_of_ids_is_noted(how: str) -> None:
    model: Any = text_model()
    model.__class__, model.look_up = TwoTables, LOOKUPS[how]
    model.beside = nn.Embedding(320, 320, dtype=torch.float64)
    (note,) = gim.attribute(model, tokenizer(), "The cat sat on the mat").report.notes
    assert note.endswith("looks up the ids beside the model's embedding, and what a token does by it is in no score")


def test_ids_that_a_second_model_reads_are_refused() -> None:
    with pytest.raises(ValueError, match=r"models\.1\.model\.embed_tokens looks up the ids .* of its LlamaForCausalLM"):
        gim.explain(Beside(make("llama"), make("qwen3")), ids(1, 9), baseline_token_id=BASELINE)


def test_a_wrapper_around_the_embedding_is_no_second_table() -> None:
    model: Any = text_model()
    model.model.embed_tokens = Held(model.model.embed_tokens)
    assert gim.attribute(model, tokenizer(), "The cat sat on the mat").report.notes == []


def test_a_checkpoint_counts_each_module_once() -> None:
    model = make("llama")
    enable_checkpoints(model)
    model.train()  # Hugging Face checkpoints in training mode only; this model has no dropout
    embedded = model.get_input_embeddings()(ids()).detach().requires_grad_(True)
    with gim.GIM(model) as report:
        model(inputs_embeds=embedded, use_cache=False).logits[:, -1].pow(2).sum().backward()
    assert report.counts()["norm"] == (7, 7)
    model.eval()
    assert embedded.grad is not None
    assert_close64(embedded.grad, embedding_gradient(model, ids()), "gradient", relative=FLOAT64_MODEL_RELATIVE)


def test_a_recompute_after_the_context_closed_raises() -> None:
    model = make("llama")
    enable_checkpoints(model)
    model.train()
    embedded = model.get_input_embeddings()(ids()).detach().requires_grad_(True)
    with gim.GIM(model):
        loss = model(inputs_embeds=embedded, use_cache=False).logits[:, -1].pow(2).sum()
    with pytest.raises(RuntimeError, match=r"model\.layers\.2: a checkpoint runs this layer again after"):
        loss.backward()


def test_the_attention_implementation_is_ordinary_attention_outside_a_context() -> None:
    model, tokens = make("mistral"), ids()
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    own = model(tokens, attention_mask=mask).logits
    model.set_attn_implementation("gim")
    got = model(tokens, attention_mask=mask).logits
    assert_close64(got[mask.bool()], own[mask.bool()], "logits", relative=FLOAT64_MODEL_RELATIVE)


def test_a_cache_works_inside_a_context() -> None:
    model, tokens = make("mistral"), ids(1, 20)
    own = model(tokens).logits[:, -1]
    with gim.GIM(model), torch.no_grad():
        start = model(tokens[:, :-1], use_cache=True)
        last = model(tokens[:, -1:], past_key_values=start.past_key_values).logits[:, -1]
    assert_close64(last, own, "logits", relative=1e-6)  # the model's own norms compute in float32


def test_a_mask_of_every_query_is_the_pattern_that_it_says() -> None:
    model, tokens = make("mistral"), ids()
    padding = torch.arange(tokens.shape[1]) >= torch.tensor([[0], [5]])
    window = model.config.sliding_window
    dense = torch.ones(2, 1, *2 * tokens.shape[1:], dtype=torch.bool).tril().triu(1 - window) & padding[:, None, None]
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    found = []
    for mask in (
        padding.long(),
        dense,
        torch.zeros(dense.shape).double().masked_fill(~dense, torch.finfo(torch.float64).min),
    ):
        with gim.GIM(model):
            logits = model(inputs_embeds=embedded, attention_mask=mask, use_cache=False).logits
        found.append((logits.detach()[padding], torch.autograd.grad(logits[:, -1].pow(2).sum(), embedded)[0]))
    for got in found[1:]:
        for one, other, name in zip(got, found[0], ("logits", "gradient"), strict=True):
            assert_close64(one, other, name, relative=FLOAT64_SAME_RELATIVE)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", first(("mistral", "qwen3", "gemma3"), ("mistral", "gemma3")))
@pytest.mark.parametrize("left", [0, 4])
def test_generation_with_a_static_cache(left: int, family: str, implementation: str) -> None:
    """Whose masks are made before the forward, for all slots of the cache, and left out where none is needed."""
    model, tokens = make(family, torch.float32), ids(2, 11)
    model.set_attn_implementation(implementation)
    mask = torch.ones_like(tokens)
    mask[1, :left] = 0
    named: dict[str, Any] = {
        "attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0,
        "cache_implementation": "static", "return_dict_in_generate": True, "output_logits": True,
    }  # fmt: skip
    own = model.generate(tokens, **named)
    with gim.GIM(model) as report:
        got = model.generate(tokens, **named)
    assert report.complete and torch.equal(got.sequences, own.sequences)
    for one, other in zip(got.logits, own.logits, strict=True):
        assert_agree(one, other, "logits")


@pytest.mark.parametrize("family", ["mistral", "qwen3", "gemma3"])
def test_a_forward_with_a_static_cache_is_one_without(family: str) -> None:
    model, tokens = make(family), ids(2, 11)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    found = []
    for cache in (None, StaticCache(config=model.config, max_cache_len=20)):
        with gim.GIM(model):
            out = model(inputs_embeds=embedded, attention_mask=mask, past_key_values=cache, use_cache=cache is not None)
        found.append((out.logits.detach()[mask.bool()], torch.autograd.grad(out.logits[:, -1].sum(), embedded)[0]))
    for one, other, name in zip(*found, ("logits", "gradient"), strict=True):
        assert_close64(one, other, name, relative=FLOAT64_SAME_RELATIVE)
