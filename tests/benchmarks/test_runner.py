"""What is wrong is never timed; what cannot run is a row that says why; what was measured is kept."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import sysconfig
import time
import types
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import __main__ as program
from benchmarks import check, measure, outside_worker, runner
from benchmarks.cases import AttentionCase, Case, ExplainCase, PointwiseCase
from benchmarks.check import Checks, wrong
from benchmarks.outside import RIVALS, Outside, combinations, rules_applied
from benchmarks.results import load
from benchmarks.runner import BenchmarkError, Settings, Suite, cases_of, device_of, run_case
from benchmarks.systems import SYSTEMS, System, inputs_of, systems_of
from tests.first import first

CPU = torch.device("cpu")
ATTENTION = AttentionCase("temperature", 16, 64, 4, 2, True, "float32")
EXPLAIN = dataclasses.replace(ExplainCase("llama-4x256", 24, "float32").small(), tokens=24)
LIMITS = {"copy_gb_per_s": 10.0, "matrix_gflops": {"float32": 50.0, "bfloat16": 50.0}}
FAST = Settings(repeats=2, least=1, case_seconds=0.0)
OURS = SYSTEMS["attention"][0]
#: Where `make` puts gim-explain, whose import name is ours.
GIM_EXPLAIN = Path(sys.prefix) / "gim-explain"


def system(name: str, change: Callable[[tuple[torch.Tensor, ...]], Any]) -> System:
    """Ours, with its results changed."""

    def prepare(case: Any, inputs: tuple[Any, ...], device: torch.device) -> Any:
        run = OURS.prepare(case, inputs, device)
        return lambda: change(run())

    return System(name, "case", prepare)


def fail(error: Exception) -> Callable[[tuple[torch.Tensor, ...]], Any]:
    def run(_: tuple[torch.Tensor, ...]) -> Any:
        raise error

    return run


# ----------------------------------------------------------------------------------------------------- the oracle


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        *[dataclasses.replace(ATTENTION, rule=rule, part=part) for rule, part in
          (("temperature", "step"), ("exact", "step"), ("constant", "step"), ("exact", "forward"))],
        dataclasses.replace(ATTENTION, dtype="bfloat16", causal=False),
        PointwiseCase("rms_norm", 16, 32, "float32", frozen=True),
        PointwiseCase("layer_norm", 16, 32, "float32"),
        PointwiseCase("gated", 16, 32, "bfloat16"),
        EXPLAIN,
        dataclasses.replace(EXPLAIN, dtype="bfloat16"),
    ],
    ids=lambda case: case.name.replace(" ", "_"),
)  # fmt: skip
def test_every_system_agrees_with_float64(case: Case) -> None:
    inputs = inputs_of(case.small(), CPU)
    for one in systems_of(case, CPU):
        assert wrong(case.small(), one, inputs, CPU) is None, one.name


def test_a_wrong_system_is_not_timed() -> None:
    def off(found: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (*found[:2], found[2] * 1.001, found[3])

    rows = run_case(ATTENTION, CPU, LIMITS, Checks(CPU), FAST, (OURS, system("off", off)))
    assert "median_ms" in rows[0]
    assert "median_ms" not in rows[1] and rows[1]["note"].startswith("wrong, not timed: result 2: relative_error")


def test_a_system_with_another_rule_than_it_claims_is_wrong() -> None:
    exact = dataclasses.replace(next(one for one in SYSTEMS["attention"] if "exact" in one.name), rule="temperature")
    assert "result 1" in str(wrong(ATTENTION, exact, inputs_of(ATTENTION, CPU), CPU))
    gradient = dataclasses.replace(SYSTEMS["explain"][3], rule="GIM")
    assert gradient.name == "gim-kernels exact gradient"
    assert "result 0" in str(wrong(EXPLAIN, gradient, inputs_of(EXPLAIN, CPU), CPU))


def test_cases_that_differ_in_length_only_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def count(case: Case, one: System, inputs: Any, device: torch.device) -> None:
        asked.append(one.name)

    monkeypatch.setattr(check, "wrong", count)
    checks = Checks(CPU)
    for tokens in (1024, 2048):
        checks(dataclasses.replace(ATTENTION, tokens=tokens), (OURS,))
    assert asked == [OURS.name]


# ----------------------------------------------------------------------------------------------------------- rows


@pytest.mark.slow
def test_a_row_has_times_memory_and_its_share_of_the_roofline() -> None:
    rows = run_case(ATTENTION, CPU, LIMITS, Checks(CPU), FAST)
    assert [row["system"] for row in rows] == [one.name for one in systems_of(ATTENTION, CPU)]
    for row in rows:
        assert row["min_ms"] <= row["q1_ms"] <= row["median_ms"] <= row["q3_ms"] <= row["max_ms"]
        assert row["repeats"] == 1 and row["tokens"] == 64
        compute, memory = ATTENTION.flops() / 50e9, ATTENTION.bytes() / 10e9
        assert row["roofline_ms"] == pytest.approx(1000 * max(compute, memory), abs=1e-4)
        assert row["roofline_share"] == pytest.approx(row["roofline_ms"] / row["median_ms"], abs=2e-3)
        assert row["gflops"] == pytest.approx(ATTENTION.flops() / row["median_ms"] / 1e6, rel=0.05, abs=0.1)
    eager = rows[-1]
    assert eager["system"] == "eager GIM" and eager["difference_to_ours"] < 1e-5
    assert "difference_to_ours" not in next(row for row in rows if "exact" in row["system"])
    assert next(row for row in rows if "SDPA" in row["system"] and "exact" in row["system"])["backend"] == (
        "FLASH_ATTENTION"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "note"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("No available kernel.\nmore"), "refused: RuntimeError: No available kernel."),
        (NotImplementedError(), "refused: NotImplementedError"),
    ],
)
def test_a_rival_that_fails_is_a_row_that_says_so(error: Exception, note: str) -> None:
    rows = run_case(ATTENTION, CPU, LIMITS, Checks(CPU), FAST, (OURS, system("rival", fail(error))))
    assert rows[1]["note"] == note and "median_ms" in rows[0]


@pytest.mark.slow
def test_a_machine_too_small_for_a_rival_or_a_case_skips_it_with_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    long = dataclasses.replace(ATTENTION, tokens=2048)
    monkeypatch.setattr(runner, "available_bytes", lambda device: long.eager_bytes())
    rows = run_case(long, CPU, LIMITS, Checks(CPU), FAST)
    eager = rows[-1]
    assert eager["bytes_needed"] == long.eager_bytes() == 4 * 4 * 2048**2 * 4
    assert eager["note"] == "skipped: needs at least 0.2 GiB, 0.2 GiB are free" and "median_ms" in rows[0]
    monkeypatch.setattr(runner, "available_bytes", lambda device: 1000)
    rows = run_case(long, CPU, LIMITS, Checks(CPU), FAST)
    assert len(rows) == len(systems_of(long, CPU))
    assert all(row["bytes_needed"] == long.tensor_bytes() and row["note"].startswith("skipped") for row in rows)


def test_repetitions_are_interleaved_and_end_in_time() -> None:
    order: list[str] = []
    clock = iter(range(100))
    times = measure.interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")},
        lambda run: (run(), float(next(clock)))[1],
        repeats=3,
    )
    assert order == ["a", "b"] * 3
    assert times["a"].seconds == (0.0, 2.0, 4.0) and times["b"].median == 3.0
    once = measure.interleaved({"a": lambda: None}, lambda run: 1.0, repeats=50, least=2, seconds=0.0)
    assert once["a"].seconds == (1.0, 1.0)


def test_medians_and_quartiles() -> None:
    found = measure.Times((5.0, 1.0, 3.0, 2.0, 4.0)).to_dict()
    assert found == {"median_ms": 3000, "min_ms": 1000, "q1_ms": 2000, "q3_ms": 4000, "max_ms": 5000, "repeats": 5}
    assert measure.Times((2.0,)).to_dict()["q1_ms"] == 2000


@pytest.mark.slow
def test_peak_memory_is_what_a_call_allocates() -> None:
    mib = 96
    kept: list[torch.Tensor] = []

    def allocate() -> None:
        torch.ones(mib * measure.MIB, dtype=torch.uint8)

    # The kernel counts resident pages in batches for each thread: it may be short by a fraction of a MiB.
    assert mib - 1 < measure.peak_bytes(allocate) / measure.MIB < mib + 16
    held = measure.peak_bytes(lambda: kept.append(torch.ones(mib * measure.MIB, dtype=torch.uint8)))
    assert mib - 1 < held / measure.MIB < mib + 16


@pytest.mark.slow
def test_the_machine_is_measured() -> None:
    found = measure.machine(CPU, ["float32"])
    assert found["copy_gb_per_s"] > 0.1 and found["matrix_gflops"]["float32"] > 0.1
    assert "load_1min" in found["clocks"] and 0 <= found["busy_share"] <= 1


@pytest.mark.slow
def test_other_processes_are_noticed() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            time.sleep(0.5)
            share = measure.busy_share(1.0)
        finally:
            other.kill()
    assert share > 0.25 / (os.cpu_count() or 1)


# ---------------------------------------------------------------------------------------------------------- suites


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> Suite:
    """Three tiny cases on a machine that need not be measured."""
    monkeypatch.setattr(runner, "machine", lambda device, dtypes: LIMITS)
    cases = tuple(dataclasses.replace(ATTENTION, tokens=tokens) for tokens in (16, 32, 64))
    return Suite("attention", CPU, cases, FAST)


def shown(console: Console) -> str:
    return " ".join(console.export_text().split())


@pytest.mark.slow
def test_a_suite_writes_results_and_a_picture(suite: Suite, tmp_path: Path) -> None:
    console = Console(record=True, width=160)
    json_file, png = tmp_path / "found.json", tmp_path / "found.png"
    assert program.run_suite(suite, json_file, png, console) == 0
    found = load(json_file)
    assert found["complete"] and found["machine"] == LIMITS and found["suite"] == "attention"
    assert {row["tokens"] for row in found["rows"]} == {16, 32, 64}
    assert found["device"].endswith("threads") and found["versions"]["torch"] == torch.__version__
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "exponents over T" in shown(console)


@pytest.mark.slow
def test_an_interrupted_run_keeps_what_it_has(suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = runner.run_case

    def interrupted(case: Case, *rest: Any) -> Any:
        if case.tokens == 64:
            raise KeyboardInterrupt
        return original(case, *rest)

    monkeypatch.setattr(runner, "run_case", interrupted)
    console = Console(record=True, width=160)
    assert program.run_suite(suite, tmp_path / "found.json", tmp_path / "found.png", console) == 130
    found = load(tmp_path / "found.json")
    assert not found["complete"] and {row["tokens"] for row in found["rows"]} == {16, 32}
    assert "interrupted: 2 of 3 cases were measured and are kept" in shown(console)
    assert (tmp_path / "found.png").exists()


@pytest.mark.slow
def test_results_are_on_disk_after_every_case(suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = runner.run_case

    def look(case: Case, *rest: Any) -> Any:
        path = tmp_path / "found.json"
        seen.append(len({row["case"] for row in load(path)["rows"]}) if path.exists() else 0)
        return original(case, *rest)

    monkeypatch.setattr(runner, "run_case", look)
    program.run_suite(suite, tmp_path / "found.json", None, Console(record=True))
    assert seen == [0, 1, 2]


def test_a_spent_budget_names_what_was_not_reached(suite: Suite) -> None:
    suite.settings = dataclasses.replace(FAST, budget_seconds=0.0)
    console = Console(record=True, width=160)
    assert program.run_suite(suite, None, None, console) == 0
    assert suite.results["not_reached"] == [case.name for case in suite.cases]
    assert not suite.results["complete"] and "not reached in 0 s: 3 cases" in shown(console)


@pytest.mark.slow
def test_a_wrong_system_of_ours_is_an_exit_code(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "wrong", lambda case, one, inputs, device: "off" if one is OURS else None)
    console = Console(record=True, width=160)
    assert program.run_suite(suite, None, None, console) == 1
    assert "wrong, not timed: off" in shown(console)


def test_the_wrong_questions_are_answered_in_a_line() -> None:
    with pytest.raises(BenchmarkError, match="no suite is called 'speed': there are quick, attention, pointwise"):
        cases_of("speed", CPU)
    with pytest.raises(BenchmarkError, match="no case of suite 'quick' on cpu is left by --only 'D999'"):
        cases_of("quick", CPU, only="D999")
    with pytest.raises(BenchmarkError, match="'abc' is not the name of a device"):
        device_of("abc")
    with pytest.raises(BenchmarkError, match="suites exist for cpu and cuda, not for 'meta'"):
        device_of("meta")
    assert {case.tokens for case in cases_of("explain", CPU, tokens=(1024, 4096))} == {1024, 4096}


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_a_gpu_suite_without_a_gpu() -> None:
    with pytest.raises(BenchmarkError, match="'cuda' is asked for, and torch finds no GPU here"):
        device_of("cuda")


# ---------------------------------------------------------------------------------------------- another environment


@pytest.mark.parametrize("name", first(("softmax, norm, q/k/v, gate/up", "q/k/v", "norm, gate/up", "none"), ("q/k/v",)))
def test_a_rival_is_labelled_with_the_rules_that_its_scores_show(name: str) -> None:
    from benchmarks import decoder

    model, ids = EXPLAIN.build(CPU)
    rules = combinations()[name]
    scores = decoder.attribution(model, ids, rules, target=1, baseline=0, chunk=7)
    assert rules_applied(scores, model, ids) == f"rules really applied: {name}"
    half = scores * torch.linspace(0.5, 1.5, len(scores))
    assert rules_applied(half, model, ids).startswith("rules really applied: no combination fits (nearest: ")


def test_there_are_all_combinations_and_the_paper_has_all_rules() -> None:
    found = combinations()
    assert len(set(found.values())) == len(found) == 16
    assert "temperature=2.0" in str(found["softmax, norm, q/k/v, gate/up"])


@pytest.mark.slow
def test_an_environment_without_the_rival_says_so(tmp_path: Path) -> None:
    # This environment has no gim-explain: the worker must find that out, and not run our package in its name.
    found = Outside(Path(sys.executable)).systems(EXPLAIN, CPU)
    assert [one.name for one in found] == list(RIVALS)
    assert all("does not run: PackageNotFoundError" in one.backend for one in found)
    rows = run_case(EXPLAIN, CPU, LIMITS, Checks(CPU), FAST, (SYSTEMS["explain"][0], *found))
    assert all("refused: UnavailableError: PackageNotFoundError" in row["note"] for row in rows[1:])
    missing = Outside(tmp_path / "python").systems(EXPLAIN, CPU)
    assert "cannot start" in missing[0].backend


@pytest.fixture
def rival(tmp_path: Path) -> Path:
    """Python of an environment with gim-explain and all packages of this one but ours."""
    folder = tmp_path / "rival"
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    paths = (GIM_EXPLAIN, sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    # Folders named in such a file are searched, and the file there that leads to our package is not read.
    (site / "rival.pth").write_text("\n".join(map(str, dict.fromkeys(paths))) + "\n", encoding="utf-8")
    return folder / "bin" / "python"


@pytest.mark.slow
@pytest.mark.skipif(not GIM_EXPLAIN.exists(), reason="gim-explain is installed apart by make")
def test_the_released_rivals_are_labelled_with_what_they_apply(rival: Path) -> None:
    lens = pytest.importorskip("transformer_lens", reason="needs the extra transformer-lens")
    found = {one.name: one for one in Outside(rival).systems(EXPLAIN, CPU)}
    labels = {name: one.backend for name, one in found.items()}
    assert all("gim-explain 0.1.4" in labels[name] for name in labels if "has no" not in labels[name])
    assert labels["gim-explain, Hugging Face"].endswith("; rules really applied: q/k/v")
    # Its softmax takes no dtype, which the attention inside the bridge passes.
    assert "; does not run: TypeError" in labels["gim-explain, TransformerLens bridge"]
    hooked = "gim-explain, TransformerLens HookedTransformer"
    if "HookedTransformer" not in vars(lens):
        assert labels[hooked].endswith("has no HookedTransformer")
        return
    assert labels[hooked].endswith("; rules really applied: softmax, norm, q/k/v")
    rows = run_case(EXPLAIN, CPU, LIMITS, Checks(CPU), FAST, (SYSTEMS["explain"][0], found[hooked]))
    assert "median_ms" in rows[1] and rows[1]["peak_mib"] > 0 and rows[1]["backend"] == labels[hooked]


def small(name: str, kv_heads: int = 2, **options: Any) -> Any:
    """A small model of a benchmark, with biases that are not zero."""
    case = ExplainCase(name, 24, "float32").small()
    sizes = dataclasses.replace(case.sizes, kv_heads=kv_heads, options={**case.sizes.options, **options})
    model, _ = dataclasses.replace(case, decoder=sizes).build(CPU)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            parameter.normal_()
    return model


@pytest.fixture
def _hooked_transformer() -> None:
    lens = pytest.importorskip("transformer_lens", reason="needs the extra transformer-lens")
    if "HookedTransformer" not in vars(lens):
        pytest.skip("TransformerLens 4 has no HookedTransformer")


@pytest.mark.usefixtures("_hooked_transformer")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama-4x256", {}),
        ("llama-4x256", {"kv_heads": 4}),
        pytest.param("Qwen2.5-1.5B", {}, marks=pytest.mark.slow),
        ("Qwen2.5-1.5B", {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}}),
    ],
)
def test_a_converted_model_is_the_same_model(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    model = small(name, **options).to(dtype)
    lens = outside_worker.hooked_transformer(model, 24)
    outside_worker.check_logits(lens, model, 24)
    lens.unembed.W_U.data[:, 0] += 1.0
    with pytest.raises(RuntimeError, match=r"the converted model's logits are .* off"):
        outside_worker.check_logits(lens, model, 24)


@pytest.mark.usefixtures("_hooked_transformer")
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Gemma-2-2B", {}, "gemma2 is not converted to a HookedTransformer here"),
        (
            "llama-4x256",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
            "rotary angles of type linear",
        ),
        (
            "Qwen2.5-1.5B",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
            "sliding windows are not converted here",
        ),
    ],
)
def test_what_is_not_converted_says_so(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        outside_worker.hooked_transformer(small(name, **options), 24)


def test_a_release_of_transformer_lens_without_a_class_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformer_lens", reason="needs the extra transformer-lens")

    def removed(name: str) -> Any:
        raise ImportError(f"{name} was removed", name=name)  # as 4.0 does

    def broken(name: str) -> Any:
        raise ImportError("no einops", name="einops")

    monkeypatch.setitem(sys.modules, "transformer_lens", types.ModuleType("transformer_lens"))
    monkeypatch.setitem(sys.modules, "transformer_lens.model_bridge", None)
    for arguments in (("HookedTransformer",), ("TransformerBridge", "transformer_lens.model_bridge")):
        with pytest.raises(RuntimeError, match=rf"transformer-lens [\d.]+ has no {arguments[0]}"):
            outside_worker.of_transformer_lens(*arguments)
    monkeypatch.setattr(sys.modules["transformer_lens"], "__getattr__", removed, raising=False)
    with pytest.raises(RuntimeError, match="has no HookedTransformer"):
        outside_worker.of_transformer_lens("HookedTransformer")
    monkeypatch.setattr(sys.modules["transformer_lens"], "__getattr__", broken)
    with pytest.raises(ImportError, match="no einops"):
        outside_worker.of_transformer_lens("HookedTransformer")


@pytest.mark.slow
def test_results_are_json_with_plain_numbers(suite: Suite) -> None:
    for _ in suite.run():
        pass
    assert json.loads(json.dumps(suite.results)) == suite.results
