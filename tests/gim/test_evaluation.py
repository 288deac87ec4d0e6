"""The numbers of an evaluation: those of the definitions in float64, of scipy's bootstrap, of what is known."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import gim
import gim.demo
from gim.evaluation import measures, perturbation, statistics
from gim.evaluation.methods import parse
from tests import planted
from tests.oracle import assert_evaluation_close

MEASURES = ("logprob", "logit", "logodds", "contrast")


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return gim.demo.load()


def pairs(count: int, facts: int = 2) -> list[tuple[str, str]]:
    prompts = [gim.demo.make_prompt(f"evaluation-{seed}", facts=facts) for seed in range(count)]
    return [(prompt.text, prompt.answer) for prompt in prompts]


def tied(ids: torch.Tensor) -> torch.Tensor:
    """Scores of which several are equal."""
    return (ids % 5).float()


def by_name(found: gim.Evaluation) -> dict[tuple[int, str, str, str], float]:
    return {(r.example, r.method, r.measure, r.metric): r.value for r in found.to_dataframe().itertuples()}


@pytest.mark.parametrize("protocol", ["aopc", pytest.param("paper", marks=pytest.mark.slow)])
def test_numbers_are_those_of_the_definitions_in_float64(demo: Any, protocol: str) -> None:
    model, tokenizer = demo
    found = gim.evaluate(model, tokenizer, pairs(1, 1), methods=[tied], measures=MEASURES, protocol=protocol)
    wide = copy.deepcopy(model).double()
    base = tokenizer.encode(" ", add_special_tokens=False)[0]
    values = by_name(found)
    assert len(values) == len(MEASURES) * 3
    for row in found.examples().itertuples():
        ids = tokenizer(pairs(1, 1)[row.example][0]).input_ids
        with torch.no_grad():
            logits = wide(input_ids=torch.tensor([ids])).logits[0, -1]
        assert row.target == int(logits.argmax()) and row.foil == int(logits.topk(2).indices[1])
        scores, exact = tied(torch.tensor(ids)).tolist(), planted.Truth(wide, ids, base)
        for measure in MEASURES:
            wanted = exact.metrics(scores, row.target, row.foil, measure, paper=protocol == "paper")
            for metric, value in wanted.items():
                got = values[row.example, "tied", measure, metric]
                assert_evaluation_close(got, value, f"{protocol} {measure} {metric}")


def test_a_constant_on_all_logits_leaves_log_probabilities_alone_and_moves_ratios(demo: Any) -> None:
    model, tokenizer = demo
    asked: dict[str, Any] = {"methods": [tied, "random"], "measures": MEASURES, "grid": "coarse"}
    before = by_name(gim.evaluate(model, tokenizer, pairs(2), **asked))
    after = by_name(gim.evaluate(planted.Shifted(model, 30.0), tokenizer, pairs(2), **asked))
    for key, value in before.items():
        if key[2] != "logit":
            assert_evaluation_close(after[key], value, str(key))
        elif abs(value) > 0.01:
            # (f - f') / (f + c) in place of (f - f') / f.
            assert abs(after[key]) < 0.9 * abs(value), key


def test_the_paper_s_vector_of_fifty_keeps_zeros_and_a_negative_logit_turns_no_correlation_round() -> None:
    assert measures.comprehensiveness([1.0] * 10, "aopc") == 1.0
    assert measures.comprehensiveness([1.0] * 10, "paper") == 10 / 50
    whole, masked = perturbation.Outcome(-2.0, 0, 0, 0), perturbation.Outcome(-4.0, 0, 0, 0)
    assert measures.drops(whole, [masked], "logit") == [-1.0]
    record: dict[str, Any] = {
        "whole": whole.to_list(),
        "single": [[-4.0, 0, 0, 0], [-3.0, 0, 0, 0]],
        "methods": {"m": {"scores": [0, 2.0, 1.0, 0], "first": [masked.to_list()], "last": [masked.to_list()]}},
    }
    assert measures.of_method(record, "m", "logit", "aopc")["loo_correlation"] > 0.99
    record |= {"whole": [0.0] * 4, "example": 3}
    with pytest.raises(ZeroDivisionError, match="example 3: the target's logit on the whole prompt is 0"):
        measures.of_method(record, "m", "logit", "aopc")


def test_a_planted_perfect_method_is_best_and_random_worst(demo: Any) -> None:
    _, tokenizer = demo
    model = planted.Planted(len(tokenizer))
    texts = [(text, planted.TARGET) for text, _ in pairs(8)]

    def perfect(ids: torch.Tensor) -> torch.Tensor:
        return model.weight[ids]

    def half(ids: torch.Tensor) -> torch.Tensor:
        return model.weight[ids] * (torch.arange(len(ids)) % 2)

    methods = [half, perfect, "random", "occlusion"]
    found = gim.evaluate(model, tokenizer, texts, methods=methods, grid="coarse")
    for (measure, metric), rows in found.table().groupby(["measure", "metric"]):
        means = rows.set_index("method")["mean"]
        best, worst = (means.max(), means.min()) if metric != "sufficiency" else (means.min(), means.max())
        assert_evaluation_close(means["perfect"], best, f"{measure} {metric}")
        assert means["random"] == worst, (measure, metric)
        assert means["random"] != means["half"]
    gap = found.compare("perfect", "random")
    assert (gap["better"] == "perfect").all()
    assert set(found.compare("perfect", "perfect")["better"]) == {""}


def test_equal_scores_are_taken_in_the_order_of_the_text() -> None:
    scores = torch.tensor([9.0, 1.0, 2.0, 1.0, 2.0, 1.0, 9.0])
    ranked = perturbation.ranking(scores)
    assert ranked == [2, 4, 1, 3, 5]
    assert perturbation.first(ranked, 3) == [2, 4, 1]
    assert perturbation.last(ranked, 0.5) == [3, 5]
    assert perturbation.last(ranked, 0.1) == []
    assert perturbation.ranking(torch.zeros(5)) == [1, 2, 3]
    assert perturbation.Grid.of("full", 60).counts == tuple(range(1, 51))
    assert perturbation.Grid.of("full", 7).counts == tuple(range(1, 8))
    assert perturbation.Grid.of("coarse", 7).counts == (1, 2, 4)


def test_results_do_not_depend_on_the_batch_or_on_the_other_methods(demo: Any) -> None:
    asked: dict[str, Any] = {"measures": "logprob", "grid": "coarse"}
    one = by_name(gim.evaluate(*demo, pairs(1, 1), methods=["random", "occlusion"], batch_tokens=1, **asked))
    other = by_name(gim.evaluate(*demo, pairs(1, 1), methods=["occlusion", tied, "random"], **asked))
    for key, value in one.items():
        assert_evaluation_close(other[key], value, str(key))


@pytest.mark.slow
def test_an_input_that_several_methods_ask_for_runs_once(demo: Any) -> None:
    model, tokenizer = demo
    prompts = [(f"The river. {text}", answer) for text, answer in pairs(4)]
    masked: list[tuple[int, ...]] = []

    def see(_: Any, __: Any, named: dict[str, Any], ___: Any) -> None:
        rows = named["input_ids"]
        # Integrated gradients asks for the prompt and for the baseline alone, which are no masked inputs.
        is_masked = (rows == base).any(-1) & (rows[:, 0] != base)
        masked.extend([] if torch.is_grad_enabled() else [tuple(row) for row in rows[is_masked].tolist()])

    base = tokenizer.encode(" ", add_special_tokens=False)[0]
    handle = model.register_forward_hook(see, with_kwargs=True)
    methods = [*gim.rules.PRESETS, "gradient_x_input", "IG:50", "attention", "random"]
    try:
        found = gim.evaluate(model, tokenizer, prompts, methods=methods, grid="coarse")
    finally:
        handle.remove()
    assert set(found.examples()["tokens"]) == {32}
    assert len(set(masked)) == len(masked)
    # Alone, each of the twelve would ask for seven of a prompt, 84 in all.
    assert len(masked) / len(prompts) <= 70


@pytest.mark.parametrize("values", [[0.5, 1.5, 2.0, -1.0, 4.0], [1.0, 1.0, 1.0]])
def test_intervals_are_scipy_s_at_the_same_seed(values: list[float]) -> None:
    found = statistics.estimate(values, 3)
    assert found.mean == np.mean(values) and found.n == len(values)
    if len(set(values)) == 1:
        assert (found.low, found.high) == (1.0, 1.0)
        return
    wanted = stats.bootstrap((values,), np.mean, rng=np.random.default_rng(3)).confidence_interval
    assert (found.low, found.high) == (wanted.low, wanted.high)
    for few in (values[:1], [0.5, 0.5], [0.0, 1.0]):
        found = statistics.estimate(few, 3)
        assert found.mean == 0.5 and math.isnan(found.low) and math.isnan(found.high)


def test_differences_are_scipy_s_paired_bootstrap(demo: Any) -> None:
    model, tokenizer = demo
    found = gim.evaluate(
        model, tokenizer, pairs(4), methods=[tied, "random"], measures="logprob", grid="coarse", seed=7
    )
    frame = found.to_dataframe()
    row = found.compare("tied", "random").set_index("metric").loc["sufficiency"]
    chosen = frame[frame["metric"] == "sufficiency"].pivot(index="example", columns="method", values="value")
    wanted = stats.bootstrap(
        (chosen["tied"], chosen["random"]),
        lambda a, b, axis: (a - b).mean(axis),
        paired=True,
        vectorized=True,
        rng=np.random.default_rng(7),
    ).confidence_interval
    assert row["mean"] == (chosen["tied"] - chosen["random"]).mean()
    np.testing.assert_allclose([row["low"], row["high"]], [wanted.low, wanted.high], rtol=1e-12)
    table = found.table("random").set_index(["metric", "method"])
    assert table.loc[("sufficiency", "tied"), "difference_low"] == row["low"]
    assert table.loc[("sufficiency", "random"), "difference"] == 0


def test_curves_are_what_the_metrics_are_means_of(demo: Any) -> None:
    model, tokenizer = demo
    found = gim.evaluate(model, tokenizer, pairs(2), methods=[tied], measures="logprob")
    curves, table = found.curves(), found.table().set_index("metric")
    for metric in ("comprehensiveness", "sufficiency"):
        drawn = curves[curves["metric"] == metric]
        assert (drawn["n"] == 2).all()
        assert_evaluation_close(drawn["drop"].mean(), table.loc[metric, "mean"], metric)


def test_masked_forwards_may_run_in_another_type_in_a_copy(demo: Any) -> None:
    model, tokenizer = demo
    asked: dict[str, Any] = {"methods": [tied], "grid": "coarse", "measures": "logprob"}
    half = by_name(gim.evaluate(model, tokenizer, pairs(1), forward_dtype=torch.bfloat16, **asked))
    full = by_name(gim.evaluate(model, tokenizer, pairs(1), **asked))
    assert next(model.parameters()).dtype == torch.float32
    assert half != full
    for key, value in full.items():
        assert abs(half[key] - value) < 0.1 * max(1.0, abs(value)), key


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("methods", [], "methods must hold at least one"),
        ("methods", ["GIMM"], "methods: 'GIMM' is none of GIM, "),
        ("methods", ["IG:0"], "methods: 'IG:0' must be a whole number of steps"),
        ("methods", ["random:3"], "methods: 'random:3' must be random alone"),
        ("methods", ["random", "random"], "methods must have different names, got 'random' 2 times"),
        ("methods", ["GIM", "gim"], "methods must be different ones, and 'GIM' and 'gim' are the same"),
        ("methods", ["IG", "ig:50"], "methods must be different ones, and 'IG' and 'ig:50' are the same"),
        ("methods", [gim.rules.GIM, "gim"], "methods must be different ones, and 'GIM' and 'gim' are the same"),
        (
            "methods",
            ["gradient-x-input", "gradient_x_input"],
            "methods must be different ones, and 'gradient-x-input' and 'gradient_x_input' are the same",
        ),
        ("measures", ["probability"], "measures must be of logprob"),
        ("measures", None, "measures must be of logprob"),
        ("methods", None, "methods must be names, rules or functions, got None"),
        ("forward_dtype", torch.int64, "forward_dtype must be a floating-point torch.dtype or None, got torch.int64"),
        ("forward_dtype", "bfloat16", "forward_dtype must be a floating-point torch.dtype or None, got 'bfloat16'"),
        ("measures", ["logit", "logit"], "none twice"),
        ("protocol", "mine", "protocol must be one of"),
        ("grid", "fine", "grid must be one of"),
        ("batch_tokens", 0, "batch_tokens must be a whole number >= 1"),
        ("limit", True, "limit must be a whole number >= 1"),
        ("seed", -1, "seed must be a whole number >= 0"),
        ("baseline", "no token", "baseline must be one token"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(demo: Any, argument: str, value: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        gim.evaluate(*demo, pairs(1), **{argument: value})


def test_logits_may_come_in_a_dict(demo: Any) -> None:
    model = planted.Planted(len(demo[1]))
    asked: dict[str, Any] = {"methods": ["random"], "grid": "coarse"}
    texts = [(text, planted.TARGET) for text, _ in pairs(2)]
    want, own = by_name(gim.evaluate(model, demo[1], texts, **asked)), model.forward
    model.forward = lambda input_ids: {"logits": own(input_ids).logits}  # type: ignore[method-assign]
    assert by_name(gim.evaluate(model, demo[1], texts, **asked)) == want


def test_whole_numbers_may_be_numpys(demo: Any, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"methods": ["random"], "grid": "coarse"}
    found = by_name(gim.evaluate(*demo, pairs(2), seed=3, limit=1, batch_tokens=64, **asked))
    seed, limit, tokens = np.array([3, 1, 64])
    kept = tmp_path / "kept"
    assert found == by_name(
        gim.evaluate(*demo, pairs(2), seed=seed, limit=limit, batch_tokens=tokens, resume=kept, **asked)
    )


def test_the_paper_has_one_grid_and_dropout_is_refused(demo: Any) -> None:
    with pytest.raises(ValueError, match="protocol 'paper' has one grid"):
        gim.evaluate(*demo, pairs(1), protocol="paper", grid="coarse")
    dropping = torch.nn.Sequential(torch.nn.Embedding(4, 4), torch.nn.Dropout(0.1))
    with pytest.raises(ValueError, match="evaluation mode"):
        gim.evaluate(dropping, demo[1], pairs(1))
    with pytest.raises(TypeError, match="methods must be names or functions"):
        parse([3])  # type: ignore[list-item]
