"""The examples run, and give what the equations give."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gim
import gim.demo
from gim_kernels.budget import relative_error
from tests import eager
from tests.families import ids, make
from tests.oracle import FLOAT64_MODEL_RELATIVE, assert_agree, assert_close64

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
#: Where `make` puts gim-explain, whose import name is ours.
GIM_EXPLAIN = Path(sys.prefix) / "gim-explain"
DEMO = ROOT / "gim" / "demo" / "model"
PROMPT = "The password of Irene is lantern. The password of Irene is"


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, *arguments: str, path: tuple[Path, ...] = ()) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT)))}
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=EXAMPLES, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not GIM_EXPLAIN.exists(), reason="gim-explain is installed apart by make")
def test_the_temperature_acts_in_gim_explain_with_our_attention(tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    options = ("--json", str(file), "--temperatures", "2", "5")
    run("other_front_end", str(DEMO), PROMPT, *options, path=(GIM_EXPLAIN,))
    found = json.loads(file.read_text(encoding="utf-8"))
    stock, ours = (
        [torch.tensor(one[key], dtype=torch.float64) for one in found["scores"]] for key in ("stock", "ours")
    )
    # In the released wheel the temperature does nothing to a Hugging Face model.
    assert torch.equal(stock[0], stock[1])
    assert relative_error(ours[0], stock[0]) > 1e-2
    # What acts is what gim-explain has for this model: the softmax and the factors of attention. It knows no norm of
    # Llama's and, in this release, no factor of gates.
    model = gim.demo.load()[0].double()
    tokens = torch.tensor(found["ids"])[None]
    for temperature, got in zip((2.0, 5.0), ours, strict=True):
        rules = eager.EagerRules(temperature=temperature, freeze_norm=False, gate_up=(1, 1))
        want, _ = eager.attribution(model, tokens, rules, baseline=found["baseline"])
        assert_agree(got, want[0], f"temperature {temperature}")  # the model's norms compute in float32


@pytest.mark.slow
def test_the_edge_example_runs_on_the_demo_model() -> None:
    out = run("edge_attribution")
    assert len(out.splitlines()) == 10 and "logits" in out


@pytest.mark.slow
def test_captums_gradients_follow_the_rules() -> None:
    pytest.importorskip("captum", reason="needs the extra dev")
    example, model, tokens = load("captum_layer"), make("qwen3"), ids(1, 13)
    table = model.get_input_embeddings().weight.detach()
    for preset, rules in eager.PRESETS.items():
        _, grad = eager.attribution(model, tokens, rules, baseline=0, target=7)
        want = (table[tokens] * grad).sum(-1)[0]
        assert_close64(example.scores(model, tokens, 7, preset), want, preset, relative=FLOAT64_MODEL_RELATIVE)
    assert "lantern" in run("captum_layer").replace("Ġ", " ")


@pytest.mark.slow
@pytest.mark.skipif(not GIM_EXPLAIN.exists(), reason="gim-explain is installed apart by make")
def test_code_written_for_gim_explain_finds_the_same_names_and_defaults() -> None:
    code = (
        "import gim, inspect, json, sys;"
        "show = lambda f: [(p.name, str(p.kind), repr(p.default)) for p in inspect.signature(f).parameters.values()];"
        "print(json.dumps([gim.__file__, show(gim.GIM), show(gim.explain)]))"
    )
    found = []
    for path in ((GIM_EXPLAIN, ROOT), (ROOT,)):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
        out = subprocess.run(
            [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, env=environment
        )
        found.append(json.loads(out.stdout.splitlines()[-1]))
    (theirs, *their_signatures), (ours, *our_signatures) = found
    assert Path(theirs).is_relative_to(GIM_EXPLAIN) and Path(ours).is_relative_to(ROOT / "gim")
    for their, our in zip(their_signatures, our_signatures, strict=True):
        known = {name: (kind, default.removesuffix(".0")) for name, kind, default in our}
        for name, kind, default in their:
            assert known[name] == (kind, default.removesuffix(".0")), name


@pytest.mark.parametrize("rules", ["GIM", "GIM_CONSTANT", "GRADIENT"])
def test_a_front_end_sets_the_rules_of_attention_on_its_model(rules: str) -> None:
    """It switches the implementation once; its own code does the rest, here nothing.

    The model's own norms compute in float32 whatever its dtype is.
    """
    model, other, tokens = make("qwen2"), make("qwen2"), ids(1, 15)
    for one in (model, other):
        one.set_attn_implementation("gim")
    gim.set_attention_rules(model, rules)

    def gradient(one: Any) -> torch.Tensor:
        embedded = one.get_input_embeddings()(tokens).detach().requires_grad_(True)
        (grad,) = torch.autograd.grad(one(inputs_embeds=embedded, use_cache=False).logits[0, -1, 7], embedded)
        return grad

    from dataclasses import replace

    want = eager.PRESETS[rules]
    _, expected = eager.attribution(
        model, tokens, replace(want, freeze_norm=False, gate_up=(1, 1)), baseline=0, target=7
    )
    assert_agree(gradient(model), expected, rules)
    _, plain = eager.attribution(model, tokens, eager.PRESETS["GRADIENT"], baseline=0, target=7)
    assert_agree(gradient(other), plain, "another model")
    with gim.GIM(model, rules="GRADIENT"):  # a context's rules are the innermost
        assert_agree(gradient(model), plain, "in a context")
    assert_agree(gradient(model), expected, "after a context")
    gim.set_attention_rules(model, None)
    assert_agree(gradient(model), plain, "taken back")
    assert all(set(vars(a)) == set(vars(b)) for a, b in zip(model.modules(), other.modules(), strict=True))


def test_rules_of_attention_need_the_implementation() -> None:
    model = make("llama")
    with pytest.raises(gim.UnsupportedModelError, match=r"set_attn_implementation\(\"gim\"\) first"):
        gim.set_attention_rules(model, "GIM")
    with pytest.raises(TypeError, match="must be a transformers PreTrainedModel, got Linear"):
        gim.set_attention_rules(torch.nn.Linear(2, 2), "GIM")
