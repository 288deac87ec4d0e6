"""The check of the table of tiles: which kernels it compiles, and what it calls bad."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from benchmarks import search_tiles
from benchmarks.search_tiles import Cost
from gim_kernels.triton.tiles import Variant

ROOT = Path(__file__).parents[2]


def costs(shared: int = 1024, loop_stores: tuple[int, ...] = (0, 0), passes: int = 1) -> Cost:
    code: dict[str, Any] = {"registers": 255, "stack": 8, "spills": 2, "matrix": {"HGMMA": 8}, "exponentials": 4}
    return Cost(shared, passes, {**code, "loop_stores": list(loop_stores)})


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Variant]:
    """The variants that would be compiled, all of them good."""
    asked: list[Variant] = []

    def note(subject: Variant, architecture: str) -> Cost:
        asked.append(subject)
        return costs()

    monkeypatch.setattr(search_tiles, "compiled", note)
    return asked


def reads_by_descriptor(subject: Variant) -> bool:
    return subject.signature["key_ptr"].startswith("tensordesc")


def test_the_check_knows_the_tiles_of_pointers_and_of_descriptors(
    compiled: list[Variant], capsys: pytest.CaptureFixture[str]
) -> None:
    """The tiles are those of gim_kernels/triton/tiles.py, written out: 32 keys by pointers, 64 by descriptors."""
    assert search_tiles.check("cuda:90", ["grad_query"], [128], ["bfloat16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(compiled) == 2 * 3 * 4  # causal or not, three rules, each with and without all options
    for line, subject in zip(lines, compiled, strict=True):
        described = reads_by_descriptor(subject)
        assert f"described={described:d}" in line
        assert (subject.constants["BLOCK_T"], subject.constants["BLOCK_S"]) == (128, 64 if described else 32)
        assert f" 128x{64 if described else 32} " in line
    with_window = [reads_by_descriptor(one) for one in compiled if one.signature["window"] == "i32"]
    assert with_window.count(True) == with_window.count(False) == 6
    # What the launchers never read through descriptors is not compiled so.
    absent = {
        one.signature[name] for one in compiled if reads_by_descriptor(one) for name in ("inner", "key_range_ptr")
    }
    assert absent == {"constexpr"}


@pytest.mark.parametrize(("architecture", "dtype"), [("cuda:80", "bfloat16"), ("cuda:90", "float32")])
def test_without_descriptors_pointers_alone_are_checked(architecture: str, dtype: str, compiled: list[Variant]) -> None:
    search_tiles.check(architecture, ["forward", "grad_value"], [64], [dtype])
    assert len(compiled) == 2 * 2 * 2 and not any(map(reads_by_descriptor, compiled))


def test_a_store_is_bad_in_a_loop_over_whole_tiles_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = 227 * 1024
    assert costs(loop_stores=(0, 3)).verdict(memory) == "ok"
    assert costs(loop_stores=(0, 3, 0, 3, 0, 3), passes=3).verdict(memory) == "ok"
    assert costs(loop_stores=(1, 0)).verdict(memory) == "SPILLS"
    assert costs(loop_stores=(0, 1, 0), passes=3).verdict(memory) == "SPILLS"
    assert costs(loop_stores=(0, 0, 1, 0), passes=2).verdict(memory) == "SPILLS"
    assert costs(shared=memory + 1).verdict(memory) == "SHARED"

    def bad_by_descriptors(subject: Variant, architecture: str) -> Cost | str:
        if not reads_by_descriptor(subject):
            return costs()
        return costs(loop_stores=(1, 0)) if subject.signature["window"] == "i32" else "out of resources"

    monkeypatch.setattr(search_tiles, "compiled", bad_by_descriptors)
    assert search_tiles.check("cuda:90", ["forward"], [128], ["bfloat16"]) == 4


@pytest.mark.parametrize("architecture", ["cuda:80", "cuda:90"])
def test_descriptors_are_refused_where_there_are_none(
    architecture: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dtype = "float32" if architecture == "cuda:90" else "bfloat16"
    monkeypatch.setattr(sys, "argv", ["search_tiles", "--architecture", architecture, "--dtype", dtype, "--described"])
    with pytest.raises(SystemExit):
        search_tiles.main()
    assert f"{dtype} is not read through descriptors on {architecture}" in capsys.readouterr().err


@pytest.mark.slow
def test_the_rows_of_the_forward_compile_without_spills() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [
        sys.executable, "-m", "benchmarks.search_tiles", "--check", "--architecture", "cuda:90", "--work", "forward",
        "--head-size", "128",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 8 and all(line.endswith("ok") for line in lines)
    # Every product of the two loops, or the one without a mask and the last tile, is Hopper's.
    assert all(re.search(r"\b[1-9]\d* HGMMA", line) for line in lines)
