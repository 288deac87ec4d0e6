"""The methods that are evaluated: each is what its name says."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

import gim
import gim.demo
from gim.evaluation.case import Case
from gim.evaluation.methods import parse
from gim.evaluation.perturbation import Forwards, Masked, outcomes_of
from gim.parts import anatomy
from gim_kernels.budget import largest_error
from tests.oracle import assert_agree

PROMPT = "The password of Irene is lantern. The password of Irene is"


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return gim.demo.load()


def case_of(model: Any, tokenizer: Any, seed: int = 0, tokens: int | None = None) -> Case:
    ids = torch.tensor(tokenizer(PROMPT).input_ids)[:tokens]
    forwards = Forwards(model)
    with torch.no_grad():
        logits = forwards.logits(ids[None])
    target, foil = logits[0].topk(2).indices.tolist()
    base = tokenizer.encode(" ", add_special_tokens=False)[0]
    masked = Masked(forwards, ids, target, foil, base, outcomes_of(logits, target, foil)[0])
    return Case(model, ids, target, base, masked, seed, "the example", "key")


def scores(case: Case, name: Any) -> torch.Tensor:
    return parse(name)[0].scores(case)


@pytest.fixture
def case(demo: Any) -> Case:
    return case_of(*demo)


def embedded(case: Case, ids: torch.Tensor) -> torch.Tensor:
    embedding: Any = anatomy.of(case.model).embedding
    found: torch.Tensor = embedding(ids)
    return found.detach()


def gradient(case: Case, where: torch.Tensor) -> torch.Tensor:
    """Of the target's logit at embeddings [1, T, D], by autograd alone."""
    leaf = where.clone().requires_grad_(True)
    (found,) = torch.autograd.grad(case.model(inputs_embeds=leaf).logits[0, -1, case.target], leaf)
    return found


def test_a_preset_is_explain_and_gradient_x_difference_is_the_preset_gradient(case: Case) -> None:
    wanted = gim.explain(
        case.model, case.ids, target_token_id=case.target, baseline_token_id=case.baseline_id, rules="ATTNLRP"
    )
    assert_agree(scores(case, "attnlrp"), wanted.double(), "preset by name")
    assert_agree(scores(case, gim.rules.ATTNLRP), wanted.double(), "rules")
    plain = gradient(case, embedded(case, case.ids[None]))
    difference = embedded(case, case.ids) - embedded(case, torch.full_like(case.ids, case.baseline_id))
    assert_agree(scores(case, "gradient_x_difference"), (plain[0] * difference).sum(-1).double(), "difference")
    inputs = embedded(case, case.ids)
    assert_agree(scores(case, "gradient_x_input"), (plain[0] * inputs).sum(-1).double(), "input")
    assert all(weight.grad is None and weight.requires_grad for weight in case.model.parameters())


def test_integrated_gradients_is_the_mean_gradient_along_the_way(case: Case) -> None:
    whole = embedded(case, case.ids[None])
    base = embedded(case, torch.full_like(case.ids, case.baseline_id)[None])
    nodes, weights = torch.tensor([-(0.6**0.5), 0.0, 0.6**0.5]), torch.tensor([5.0, 8.0, 5.0]) / 18
    mean = sum(
        weight * gradient(case, base + (node + 1) / 2 * (whole - base))
        for node, weight in zip(nodes, weights, strict=True)
    )
    assert_agree(scores(case, "IG:3"), ((whole - base) * mean)[0].sum(-1).double(), "three Gauss-Legendre points")


def test_occlusion_leaves_out_one_token_after_another(case: Case) -> None:
    found = scores(case, "occlusion")
    assert found[0] == found[-1] == 0
    with torch.no_grad():
        full = case.model(case.ids[None]).logits[0, -1, case.target]
        for place in (1, 6, len(case.ids) - 2):
            row = case.ids.clone()
            row[place] = case.baseline_id
            alone = full - case.model(row[None]).logits[0, -1, case.target]
            assert abs(found[place] - alone) < 1e-4 * full.abs()


@pytest.mark.parametrize("name", [pytest.param("KernelSHAP:40", marks=pytest.mark.slow), "LIME:20", "random"])
def test_what_is_drawn_depends_on_the_seed_and_the_example_alone(demo: Any, name: str) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = scores(case_of(*demo), name)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = scores(case_of(*demo), name), scores(case_of(*demo, seed=1), name)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", ["KernelSHAP:100", "LIME:200"])
def test_samples_find_the_weights_of_a_model_that_adds_them(name: str) -> None:
    weight = torch.tensor([0.0, 3.0, 0.5, -2.0, 1.0, 0.0])

    class Adds(torch.nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros(*ids.shape, 6)
            logits[..., 5] = weight[ids].sum(-1, keepdim=True)
            return logits

    ids = torch.tensor([5, 1, 2, 3, 4, 5])
    forwards = Forwards(Adds())
    masked = Masked(forwards, ids, 5, 0, 0, forwards.outcomes(ids[None], 5, 0)[0])
    found = scores(Case(Adds(), ids, 5, 0, masked, 0, "", ""), name)
    # A lasso shrinks what it finds a little.
    assert largest_error(found, weight[ids].double()) < (1e-5 if name.startswith("Kernel") else 0.05)


def test_attention_is_what_the_last_token_looks_at(case: Case) -> None:
    model: Any = case.model
    before = model.config._attn_implementation
    found = scores(case, "attention")
    assert model.config._attn_implementation == before
    assert abs(float(found.sum()) - 1) < 1e-5
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(case.ids[None], output_attentions=True).attentions
    model.set_attn_implementation(before)
    assert_agree(found, torch.stack(weights)[:, 0, :, -1].double().mean((0, 1)), "attention")
    with pytest.raises(ValueError, match="method attention: Sequential is no transformers model"):
        parse("attention")[0].scores(Case(torch.nn.Sequential(), case.ids, 0, 0, case.masked, 0, "", ""))


def test_deep_lift_runs_where_it_is_another_method_and_is_refused_where_it_is_not(demo: Any) -> None:
    with pytest.raises(ValueError, match="DeepLIFT: on LlamaForCausalLM captum's rules reach no module"):
        scores(case_of(*demo), "DeepLIFT")
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=2048,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        init_std=0.5,
    )
    relu = case_of(OPTForCausalLM(config).eval(), demo[1])
    found, plain = scores(relu, "DeepLIFT"), scores(relu, "gradient_x_input")
    assert found.shape == plain.shape and not torch.allclose(found, plain)


def test_a_function_is_a_method_and_what_it_returns_is_looked_at(demo: Any) -> None:
    case = case_of(*demo)

    def mine(ids: torch.Tensor) -> list[float]:
        ids.zero_()  # the prompt itself stays as it is
        return [1.0] * len(ids)

    before = case.ids.clone()
    assert scores(case, mine).tolist() == [1.0] * len(before)
    assert torch.equal(case.ids, before)

    def short(ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(2)

    def endless(ids: torch.Tensor) -> torch.Tensor:
        return torch.full((len(ids),), float("inf"))

    with pytest.raises(ValueError, match="method short: scores must have the shape"):
        scores(case, short)
    with pytest.raises(ValueError, match="method endless: scores must be finite, and those of the example are not"):
        scores(case, endless)
    assert parse(mine)[0].key != parse(short)[0].key

    def nothing(ids: torch.Tensor) -> None:
        return None

    def turned(ids: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(ids), dtype=torch.complex64)

    with pytest.raises(TypeError, match="method nothing: scores must be numbers, got None"):
        scores(case, nothing)
    with pytest.raises(TypeError, match="method turned: scores must be real numbers, got torch.complex64"):
        scores(case, turned)


def test_a_function_is_told_from_another_by_its_code_and_what_it_holds() -> None:
    def closing(weight: float, log: list[int]) -> Any:
        def closed(ids: torch.Tensor) -> torch.Tensor:
            log.append(len(ids))
            return ids * weight + (lambda: 1)()

        return closed

    def defaulting(weight: float) -> Any:
        def defaulted(ids: torch.Tensor, by: float = weight, *, more: tuple[float, ...] = (weight,)) -> torch.Tensor:
            return ids * by * more[0]

        return defaulted

    def inner(weight: float) -> Any:
        first, second = (lambda ids: (lambda: ids * 2)()), (lambda ids: (lambda: ids * 3)())
        return first if weight == 2 else second

    def plain(ids: torch.Tensor, weight: float) -> torch.Tensor:
        return ids * weight

    makers = (
        lambda weight: closing(weight, []),
        defaulting,
        inner,
        lambda weight: functools.partial(plain, weight=weight),
        lambda weight: functools.partial(closing(weight, [])),
    )
    for make in makers:
        key, same, other = (parse(make(weight))[0].key for weight in (2, 2, 3))
        assert key == same != other
    # What a function keeps count in is not what it is.
    log: list[int] = []
    before = parse(closing(2, log))[0].key
    log.append(1)
    assert parse(closing(2, log))[0].key == before


@pytest.mark.parametrize("name", ["occlusion", "KernelSHAP", "LIME:20", "IG:5", "GIM", "attention", "random"])
def test_a_prompt_with_one_token_to_replace_has_scores(demo: Any, name: str) -> None:
    few = case_of(*demo, tokens=3)
    found = scores(few, name)
    assert found.shape == (3,)
    if name == "KernelSHAP":  # the Shapley value of a single token is what leaving it out does
        assert torch.equal(found, scores(few, "occlusion")) and float(found[1]) != 0


def test_what_fails_is_named_with_its_example(demo: Any) -> None:
    def mine(ids: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no scores today")

    with pytest.raises(RuntimeError, match="no scores today") as caught:
        gim.evaluate(*demo, ["The password of Irene is"], methods=mine)
    assert caught.value.__notes__ == ["method mine on example 0 (data, row 0)"]


def test_no_code_that_comes_with_data_is_run() -> None:
    folder = Path(gim.__file__).parent / "evaluation"
    for path in folder.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "load_dataset(" not in text and "trust_remote_code" not in text, path
