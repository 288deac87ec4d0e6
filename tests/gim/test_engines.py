"""The engine is chosen by whoever asks, told by what ran, repeated by the report, and refused before anything runs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import gim
import gim.demo
from gim import cli
from gim_kernels import composed, engines
from tests.families import ids, make
from tests.oracle import FLOAT64_MODEL_RELATIVE, assert_close64

ROOT = Path(__file__).parents[2]
SAID = {
    "auto": {"attention": "blockwise", "norm": "blockwise", "gated_mlp": "blockwise"},
    "blockwise": {"attention": "blockwise", "norm": "blockwise", "gated_mlp": "blockwise"},
    "composed": {"attention": "composed (FLASH_ATTENTION)", "norm": "blockwise", "gated_mlp": "blockwise"},
    "reference": {"attention": "reference", "norm": "reference", "gated_mlp": "reference"},
}
TARGET: Any = {"target_token_id": 11, "baseline_token_id": 3}


@pytest.mark.parametrize(
    ("family", "memory"),
    [
        ("qwen2-window", "none"),
        *(
            pytest.param(family, memory, marks=pytest.mark.slow)
            for family in ("llama", "gpt2")
            for memory in ("none", "layer+attention")
        ),
    ],
)
def test_every_engine_gives_the_same_attribution(family: str, memory: str) -> None:
    model, tokens = make(family, torch.float64), ids(2)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    want = gim.explain(model, tokens, attention_mask=mask, memory=memory, **TARGET)
    for engine in ("composed", "reference"):
        got = gim.explain(model, tokens, attention_mask=mask, memory=memory, engine=engine, **TARGET)
        assert_close64(got, want, f"{family} {engine}", FLOAT64_MODEL_RELATIVE)


@pytest.mark.parametrize("engine", SAID)
def test_the_report_repeats_what_the_operators_said(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama", torch.float64)
    for _ in range(2):  # the second time, norms are known from the start
        with gim.GIM(model, engine=engine) as report:
            model(ids(1))
        assert report.engines == SAID[engine]
    # It is not worked out from what was asked for: an engine that says something else is believed.
    monkeypatch.setattr(composed, "tell", lambda _: None)
    with gim.GIM(model, engine="composed") as report:
        model(ids(1))
    assert "attention" not in report.engines


def test_an_unknown_engine_is_refused_before_anything_runs() -> None:
    model, tokenizer = gim.demo.load()
    model.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    tries: tuple[Callable[..., Any], ...] = (
        lambda **named: gim.GIM(model, **named),
        lambda **named: gim.explain(model, torch.tensor([[1, 2]]), baseline_token_id=0, **named),
        lambda **named: gim.attribute(model, tokenizer, "a b", **named),
    )
    for attempt in tries:
        with pytest.raises(ValueError, match=r"engine must be one of .* got 'fast'"):
            attempt(engine="fast")


def test_an_impossible_engine_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from gim_kernels.triton import device

    monkeypatch.setattr(device, "interpreted", lambda: False)
    model = make("llama", torch.float32)
    model.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    tries: tuple[Callable[[], Any], ...] = (
        lambda: gim.GIM(model, engine="triton").__enter__(),
        lambda: gim.explain(model, ids(1), engine="triton", **TARGET),
    )
    for attempt in tries:
        with pytest.raises(RuntimeError, match='engine="triton" needs tensors on a GPU, got model on cpu'):
            attempt()
    with pytest.raises(TypeError, match="must be float32, float16 or bfloat16 for the triton engine"):
        gim.GIM(make("llama", torch.float64), engine="triton").__enter__()


def test_what_an_engine_has_not_is_refused_by_name() -> None:
    with pytest.raises(NotImplementedError, match='engine="composed" has no softcap'):
        gim.explain(make("gemma2", torch.float64), ids(1), engine="composed", **TARGET)


@pytest.mark.slow
def test_the_command_line_takes_an_engine_and_shows_what_ran() -> None:
    folder = str(ROOT / "gim/demo/model")
    runner = CliRunner(env={"COLUMNS": "200"})
    shown = runner.invoke(cli.app, ["check", folder, "--engine", "composed"])
    assert shown.exit_code == 0, shown.output
    assert "ran: attention by composed (FLASH_ATTENTION), norm by blockwise, gated mlp by blockwise" in shown.output
    assert "over auto" in shown.output and "attention by blockwise" in shown.output
    explained = runner.invoke(
        cli.app, ["explain", "-m", folder, "-p", "The password of Irene is", "--engine", "reference"]
    )
    assert explained.exit_code == 0 and "reference" in explained.output, explained.output
    refused = runner.invoke(cli.app, ["check", folder, "--engine", "triton", "--dtype", "float64"])
    assert refused.exit_code == 2 and "--engine: model must be float32" in refused.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "parameter"),
    [
        ("composed.py", "key_range: torch.Tensor | None"),
        ("blockwise/backward.py", "needs: tuple[bool, bool, bool, bool]"),
        ("pointwise.py", "frozen: bool"),
        ("reference_engine.py", "activation_backward: str"),
        ("triton/attention_grad.py", "grad_scale: tuple[float, float, float]"),
        ("triton/gated.py", "needs: tuple[bool, bool]"),
    ],
)
def test_mypy_sees_an_engine_that_lost_a_parameter(file: str, parameter: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "gim_kernels", tmp_path / "gim_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / "gim_kernels" / file
    text = path.read_text()
    assert f"    {parameter},\n" in text
    before, _, after = text.rpartition(f"    {parameter},\n")
    path.write_text(before + after)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "gim_kernels/engines.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    said = [line for line in done.stdout.splitlines() if line.startswith("gim_kernels/engines.py")]
    assert said and "Incompatible types in assignment" in said[0], done.stdout


def test_auto_is_never_composed() -> None:
    for device in ("cpu", "meta"):
        assert engines.choose("auto", torch.empty(1, device=device)) == "blockwise"
