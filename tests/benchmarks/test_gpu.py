"""`make gpu` keeps to its time and leaves what each step wrote; tiles are tried in order."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from typer.testing import CliRunner

import gim_kernels
from benchmarks import gpu, gpu_cache, time_tiles
from benchmarks.gpu import Step
from benchmarks.systems import COMPOSED, OURS, OURS_COMPOSED
from gim import cli
from gim_kernels import reference
from gim_kernels.triton import tiles
from gim_kernels.triton.tiles import Tile
from tests.oracle import assert_within_budget

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")

SLEEPS = (
    "import sys, time\n"
    "sys.stdout.write('begun\\n')\n"
    "try:\n    time.sleep(60)\n"
    "except KeyboardInterrupt:\n    sys.stdout.write('kept\\n'); sys.exit(130)"
)


def test_steps_run_in_order_and_one_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    todo = [
        Step("good", ("-c", "import sys; sys.stdout.write('out'); sys.stderr.write('err')"), 30),
        Step("bad", ("-c", "raise SystemExit(3)"), 30),
        Step("last", ("-c", ""), 30),
    ]
    want = {"good": "ok", "bad": "exit code 3", "last": "ok"}
    assert gpu.run(todo, tmp_path, limit=100) == want
    assert json.loads((tmp_path / "summary.json").read_text()) == want
    assert sorted((tmp_path / "good.log").read_text()) == sorted("outerr")
    assert [line.split()[2] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["good:", "bad:", "last:"]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.default_int_handler, signal.SIG_IGN], ids=["here", "in the background"])
def test_a_step_that_takes_too_long_is_interrupted_and_can_write_what_it_has(tmp_path: Path, how: Any) -> None:
    before = signal.signal(signal.SIGINT, how)  # as a shell leaves it to what it runs
    begin = time.monotonic()
    try:
        outcome = gpu.run([Step("slow", ("-c", SLEEPS), 4)], tmp_path, limit=100)
    finally:
        signal.signal(signal.SIGINT, before)
    assert outcome == {"slow": "stopped after 4 s"} and time.monotonic() - begin < 4 + gpu.GRACE
    assert (tmp_path / "slow.log").read_text().splitlines() == ["begun", "kept"]


def test_nothing_starts_when_the_time_of_all_is_over(tmp_path: Path) -> None:
    assert gpu.run([Step("one", ("-c", ""), 30)], tmp_path, limit=gpu.GRACE) == {"one": "not started: no time was left"}


def test_a_step_runs_beside_others_until_it_is_needed(tmp_path: Path) -> None:
    wait = "import pathlib, time\nwhile not pathlib.Path(r'{}').exists(): time.sleep(0.05)"
    todo = [
        Step("beside", ("-c", wait.format(tmp_path / "first")), 30, background="last"),
        Step("first", ("-c", f"open(r'{tmp_path / 'first'}', 'w')"), 30),
        Step("last", ("-c", ""), 30),
        Step("for ever", ("-c", SLEEPS), 30, background="nothing"),
    ]
    outcome = gpu.run(todo, tmp_path, limit=100)
    assert outcome.pop("for ever").startswith("stopped after")
    assert outcome == {"beside": "ok", "first": "ok", "last": "ok"}
    lines = [line.split()[2] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert lines == ["beside:", "first:", "beside:", "last:", "for", "for"]


def test_a_step_whose_tool_is_not_there_is_left_out(tmp_path: Path) -> None:
    outcome = gpu.run([Step("one", ("-c", ""), 30, tool=("no-such-tool", "--flag"))], tmp_path)
    assert outcome == {"one": "left out: no-such-tool is not here"}


def test_the_steps_stand_in_order_within_the_limit(tmp_path: Path) -> None:
    found = gpu.steps(tmp_path)
    assert [step.name for step in found] == [
        "probe", "flex", "tests", "verify", "sanitizer", "tiles", "ncu", "headline", "explain-8b", "long", "pointwise",
        "memory",
    ]  # fmt: skip
    # Every step in the foreground may use all of its time.
    assert sum(step.seconds for step in found if not step.background) + gpu.GRACE <= gpu.LIMIT == 460
    for step in found:
        assert step.command[0] == "-m"
        assert step.background or any(str(tmp_path) in part for part in (*step.command, *step.tool))


#: A tool that runs what it is given to run, after its own arguments.
TOOL = '#!/bin/sh\nwhile [ $# -gt 0 ]; do case $1 in *python*) exec "$@";; esac; shift; done\n'


@pytest.mark.slow
@NO_GPU
def test_every_step_runs_at_the_smallest_sizes_in_the_interpreter(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("compute-sanitizer", "ncu"):
        (tools / name).write_text(TOOL)
        (tools / name).chmod(0o755)
    variables = {**os.environ, "TRITON_INTERPRET": "1", "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    out = tmp_path / "out"
    out.mkdir()
    todo = [dataclasses.replace(step, seconds=600.0) for step in gpu.steps(out, tiny=True)]
    outcome = gpu.run(todo, out, limit=1e5, variables={**variables, **gpu.environment(out), "PATH": variables["PATH"]})
    logs = {name: (out / f"{name}.log").read_text() for name in outcome}
    assert set(outcome.values()) == {"ok"}, [f"{name}: {outcome[name]}\n{log}" for name, log in logs.items()]
    probe = json.loads((out / "probe.json").read_text())
    assert probe["complete"] and [row["columns"] for row in probe["rows"]] == [32, 64, 128]
    assert all(row["right"] for row in probe["rows"])
    assert "tests" in (out / "tests.xml").read_text()
    (verified,) = json.loads((out / "verified.json").read_text())
    assert len(verified["variants"]) == 2
    assert "Attend" in logs["sanitizer"] and "Attend" in logs["ncu"]
    (row,) = json.loads((out / "tiles.json").read_text())["rows"]
    # Another tile than the interpreter's own rounds in other places.
    assert row["difference"] < torch.finfo(torch.float16).eps and row["programs"] > 0
    assert {row["system"] for row in json.loads((out / "headline.json").read_text())["rows"]} >= {
        OURS, OURS_COMPOSED, COMPOSED,
    }  # fmt: skip
    for name in ("explain-8b", "long", "pointwise", "memory"):
        assert any("median_ms" in row for row in json.loads((out / f"{name}.json").read_text())["rows"]), name


# --------------------------------------------------------------------------------------- kernels built ahead of time


def test_a_cache_that_moves_finds_its_files(tmp_path: Path) -> None:
    """Copied to another folder, triton's own reader finds what was built; what nobody reads is gone."""
    from triton.runtime.cache import FileCacheManager

    built = tmp_path / "built"
    with mock.patch.object(FileCacheManager, "__init__", lambda self: None):
        manager = FileCacheManager()
    manager.key, manager.cache_dir, manager.lock_path = "KEY", str(built / "KEY"), str(built / "KEY" / "lock")
    (built / "KEY").mkdir(parents=True)
    group = {name: manager.put("{}", name, binary=False) for name in ("k.json", "k.cubin", "k.ttir")}
    manager.put_group("k.json", group)
    assert gpu_cache.prune(built) == sum(path.stat().st_size for path in (built / "KEY").iterdir())
    assert sorted(path.name for path in (built / "KEY").iterdir()) == ["__grp__k.json", "k.cubin", "k.json"]
    assert gpu_cache.install(built, tmp_path / "moved") == 1
    shutil.rmtree(built)
    manager.cache_dir = str(tmp_path / "moved" / "KEY")
    there = {name: str(tmp_path / "moved" / "KEY" / name) for name in ("k.json", "k.cubin")}
    assert manager.get_group("k.json") == there
    assert gpu_cache.install(tmp_path / "nothing", tmp_path / "moved") == 0


@pytest.mark.slow
@NO_GPU
def test_a_kernel_is_built_under_the_key_that_a_launch_looks_for(tmp_path: Path) -> None:
    """The smallest kernel, compiled without a GPU, is where triton's launch on an H100 would take it from."""
    code = """
import sys
from pathlib import Path
from benchmarks import gpu_cache
import triton
folder = Path(sys.argv[1])
with gpu_cache.asked() as found:
    for call in gpu_cache.calls()[:1]:
        call()
source, options = min(found, key=lambda one: len(one[0].fn.src))
kernel = triton.compile(source, target=gpu_cache.Driver().get_current_target(), options=options.__dict__)
assert (folder / gpu_cache.key_of(source, options)).is_dir(), "another key"
size = gpu_cache.prune(folder)
again = triton.compile(source, target=gpu_cache.Driver().get_current_target(), options=options.__dict__)
assert again.asm["cubin"] == kernel.asm["cubin"] and "ttir" not in again.asm, "compiled again"
print(size)
"""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True, text=True, check=False, env=variables, cwd=gpu.ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout.split()[-1]) < 200_000


@NO_GPU
def test_make_gpu_without_a_gpu_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([str(tmp_path / "out")]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert gpu.main([]) == 2
    assert "make gpu OUT=dir" in capsys.readouterr().err


@NO_GPU
def test_timing_tiles_without_a_gpu_says_so(tmp_path: Path) -> None:
    import typer

    app = typer.Typer()
    app.command()(time_tiles.main)
    shown = CliRunner().invoke(app, ["--json", str(tmp_path / "a.json")])
    assert shown.exit_code == 2 and "torch finds none here" in shown.output


def test_a_tile_is_replaced_for_one_kind_of_work_only_and_put_back() -> None:
    own = tiles.attention_tile("forward", "cuda:90", 128, torch.bfloat16)
    other = Tile(16, 16, 1, 1)
    with time_tiles.Job("forward", 128, "bfloat16", other).in_place():
        assert tiles.attention_tile("forward", "cuda:90", 128, torch.bfloat16) is other
        assert tiles.attention_tile("grad_key", "cuda:90", 128, torch.bfloat16) is not other
    assert tiles.attention_tile("forward", "cuda:90", 128, torch.bfloat16) == own


def test_the_launchers_take_the_replaced_tile_and_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without a GPU through triton's interpreter."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = [torch.randn(1, 2, 48, 16, device=device) for _ in range(3)]
    launched: list[tuple[int, int]] = []
    original = tiles.Variant.launch

    def launch(self: tiles.Variant, programs: int, **arguments: Any) -> None:
        launched.append((self.constants["BLOCK_T"], self.constants["BLOCK_S"]))
        original(self, programs, **arguments)

    monkeypatch.setattr(tiles.Variant, "launch", launch)
    for tile in (Tile(16, 32, 4, 1), Tile(32, 16, 4, 1)):
        with time_tiles.Job("forward", 16, "float32", tile).in_place():
            found = gim_kernels.attention(*inputs, causal=True, engine="triton")
    assert launched == [(16, 32), (32, 16)]
    truth, plain = (
        reference.attention(*(x.to(dtype) for x in inputs), causal=True) for dtype in (torch.float64, torch.float32)
    )
    assert_within_budget(found, truth, plain, "another tile")


def test_near_tiles_come_first() -> None:
    own = Tile(128, 64, 8, 3)
    others = [Tile(16, 16, 4, 2), Tile(128, 64, 4, 3), Tile(64, 64, 4, 2), Tile(128, 64, 8, 3)]
    assert time_tiles.near(own, others) == [others[3], others[1], others[2], others[0]]


def test_jobs_take_every_kind_of_work_in_turn_the_tables_own_tile_first() -> None:
    found = time_tiles.jobs("cuda:90", [128, 64], "bfloat16")
    columns = 2 * len(time_tiles.RULES)
    assert all(job.is_own for job in found[:columns]) and not any(job.is_own for job in found[columns:])
    for job in found[:columns]:
        assert job.tile == tiles.attention_tile(job.work, "cuda:90", job.head_size, torch.bfloat16, described=True)
    assert not any(job.described for job in found[columns : 2 * columns])
    assert all(job.by_heads for job in found[2 * columns : 3 * columns])
    assert len(set(found)) == len(found) == columns * time_tiles.CANDIDATES
    # sm_80 splits the gradient of the query at 128: there is no tile to replace.
    split = time_tiles.jobs("cuda:80", [256], "bfloat16")
    assert all(not job.tile.split for job in split) and {job.work for job in split} < set(time_tiles.RULES)


@pytest.mark.slow
@NO_GPU
def test_a_tile_that_cannot_be_compiled_says_why() -> None:
    job = time_tiles.jobs("cuda:90", [64], "bfloat16")[0]
    assert time_tiles.compile_all([job], 1, 60.0) == {job: time_tiles.compile_job(job)}
    assert time_tiles.compile_job(job) is not None


# ------------------------------------------------------------------------------------------------------- gim bench


@pytest.mark.slow
def test_gim_bench_runs_the_source_trees_benchmarks(capfd: pytest.CaptureFixture[str]) -> None:
    shown = CliRunner().invoke(cli.app, ["bench", "speed"])
    assert shown.exit_code == 2 and "no suite is called 'speed'" in capfd.readouterr().err


@pytest.mark.slow
def test_gim_bench_hands_its_options_on(capfd: pytest.CaptureFixture[str]) -> None:
    shown = CliRunner().invoke(cli.app, ["bench", "cases", "quick", "--device", "cpu"])
    assert shown.exit_code == 0 and "GFLOP" in capfd.readouterr().out


def test_gim_bench_without_a_source_tree_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.bench, "__file__", str(tmp_path / "site-packages" / "gim" / "cli" / "bench.py"))
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(cli.app, ["bench", "quick"])
    assert shown.exit_code == 2 and "go to a checkout's folder and run gim bench there" in " ".join(
        shown.output.split()
    )


def test_the_python_of_gim_bench_is_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 130)

    monkeypatch.setattr(subprocess, "run", run)
    shown = CliRunner().invoke(cli.app, ["bench", "memory", "--json", "a b.json"])
    assert shown.exit_code == 130
    assert asked[0][0] == sys.executable and asked[0][-3:] == ["memory", "--json", "a b.json"]
