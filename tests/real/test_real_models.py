"""Trained models against the rules applied to their own code: `make real GIM_MODELS=DIR`.

Random weights make every head and gate matter alike; trained ones have massive activations, sharp softmaxes and
embeddings of other sizes. DIR holds one folder for each model, as ``save_pretrained`` writes it.
"""

from __future__ import annotations

import copy
import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gim
from gim.plan import PLANS, MemoryPlan
from tests import eager, model_code
from tests.gim.test_layerwise import PERS, TARGET, inside
from tests.model_code import Wide
from tests.oracle import FLOAT64_MODEL_RELATIVE, FLOAT64_PLAN_RELATIVE, assert_close64, assert_within_budget

pytestmark = pytest.mark.real

#: For each `model_type` of a config: its gated MLPs, as in tests/families.py, and the norms of a layer.
KINDS: dict[str, tuple[dict[str, str], int]] = {
    "llama": ({"LlamaMLP": "separate"}, 2),
    "gemma3_text": ({"Gemma3MLP": "separate"}, 6),
}
PROMPTS = [
    "When Mary and John went to the store, John gave a drink to",
    "The capital of France is Paris. The capital of Italy is",
    "2, 4, 6, 8,",
    "Rome",
]
BASELINE = 3


@functools.cache
def folders() -> dict[str, Path]:
    """The folder of each kind of model in GIM_MODELS: the first by name where there are several."""
    base = os.environ.get("GIM_MODELS", "")
    if not Path(base).is_dir() or not base:
        pytest.fail(f"GIM_MODELS must be a folder of models, got {base!r}: make real GIM_MODELS=DIR", pytrace=False)
    found: dict[str, Path] = {}
    for config in sorted(Path(base).glob("*/config.json")):
        found.setdefault(json.loads(config.read_text(encoding="utf-8"))["model_type"], config.parent)
    return found


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name not in folders():
        pytest.fail(f"GIM_MODELS={os.environ['GIM_MODELS']} holds no model of type {name!r}", pytrace=False)
    return name


@pytest.fixture(scope="module")
def model(kind: str) -> Any:
    """The model in float64, in which two correct computations agree to many digits."""
    return AutoModelForCausalLM.from_pretrained(folders()[kind], dtype=torch.float32, local_files_only=True).double()


@pytest.fixture(scope="module")
def rows(kind: str) -> list[torch.Tensor]:
    """The ids of each prompt."""
    tokenizer = AutoTokenizer.from_pretrained(folders()[kind], local_files_only=True)
    return [tokenizer(text, return_tensors="pt").input_ids[0] for text in PROMPTS]


def padded(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All prompts as one batch, and its mask."""
    longest = max(map(len, rows))
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for index, row in enumerate(rows):
        where = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        tokens[index, where], mask[index, where] = row, 1
    return tokens, mask


@pytest.mark.parametrize("preset", eager.PRESETS)
def test_every_preset_equals_the_rules_on_the_models_own_code(
    model: Any, kind: str, rows: list[torch.Tensor], preset: str
) -> None:
    with Wide():
        got = gim.explain(model, rows[0], baseline_token_id=BASELINE, rules=preset)
    want, _ = model_code.attribution(model, rows[:1][0][None], eager.PRESETS[preset], KINDS[kind][0], baseline=BASELINE)
    assert_close64(got, want[0], f"{kind} {preset}", relative=FLOAT64_MODEL_RELATIVE)


def test_layers_and_heads_are_those_of_the_models_own_code(model: Any, kind: str, rows: list[torch.Tensor]) -> None:
    (products, _), ids = KINDS[kind], rows[0][None]
    want = model_code.inside(model, ids, eager.PRESETS["GIM"], products, layers=model.model.layers, target=TARGET)
    for per, scores in zip(PERS, want, strict=True):
        with Wide():
            found = inside(model, ids, per)
        assert_close64(found.inside, scores, f"{kind} {per}", relative=FLOAT64_MODEL_RELATIVE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(model: Any, kind: str, rows: list[torch.Tensor], side: str) -> None:
    tokens, mask = padded(rows, side)
    with Wide():
        got = gim.explain(model, tokens, baseline_token_id=BASELINE, attention_mask=mask)
        alone = [gim.explain(model, row, baseline_token_id=BASELINE) for row in rows]
    want, _ = model_code.attribution(model, tokens, eager.PRESETS["GIM"], KINDS[kind][0], baseline=BASELINE, mask=mask)
    assert_close64(got, want, f"{kind} {side}", relative=FLOAT64_MODEL_RELATIVE)
    for index, row in enumerate(alone):
        assert_close64(got[index][mask[index].bool()], row, f"row {index}", relative=FLOAT64_MODEL_RELATIVE)


def test_every_part_is_counted_and_the_model_comes_back(model: Any, kind: str, rows: list[torch.Tensor]) -> None:
    tokens, layers = rows[0][None], model.config.num_hidden_layers
    with torch.no_grad():
        before = model(tokens).logits
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    with gim.GIM(model) as report:
        inside = model(inputs_embeds=embedded).logits
    with torch.no_grad():
        after = model(tokens).logits
    norms = KINDS[kind][1] * layers + 1
    counts = {"attention": layers, "norm": norms, "gated_mlp": layers}
    assert report.counts() == {part: (count, count) for part, count in counts.items()}
    assert report.complete and report.watched and report.notes == []
    assert torch.equal(after, before)
    assert torch.equal(inside.argmax(-1), before.argmax(-1))


def test_every_memory_plan_gives_the_same(model: Any, rows: list[torch.Tensor]) -> None:
    want = gim.explain(model, rows[0], baseline_token_id=BASELINE, memory=MemoryPlan("none", head="all"))
    for plan in (*PLANS, MemoryPlan("layer", True, "cpu", 5), MemoryPlan("mlp", mlp_tile=5)):
        got = gim.explain(model, rows[0], baseline_token_id=BASELINE, memory=plan)
        assert_close64(got, want, plan.name, relative=FLOAT64_PLAN_RELATIVE)


@pytest.mark.parametrize("preset", ["GIM", "GIM_CONSTANT", "ATTNLRP"])
def test_float32_errs_at_most_twice_as_much_as_the_models_own_code(
    model: Any, kind: str, rows: list[torch.Tensor], preset: str
) -> None:
    single, (tokens, mask) = copy.deepcopy(model).float(), padded(rows, "left")
    rules, products = eager.PRESETS[preset], KINDS[kind][0]
    got = gim.explain(single, tokens, baseline_token_id=BASELINE, rules=preset, target_token_id=11, attention_mask=mask)
    truth, yardstick = (
        model_code.attribution(one, tokens, rules, products, baseline=BASELINE, target=11, mask=mask)[0]
        for one in (model, single)
    )
    assert_within_budget(got, truth, yardstick, f"{kind} {preset}")
