"""Runs a suite: checks, warms up, measures memory and time, and hands over each case's rows as soon as it has them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.cases import SUITES, Case, ExplainCase, forget_models
from benchmarks.check import Checks
from benchmarks.measure import MIB, Stopwatch, available_bytes, clocks, environment, interleaved, machine, peak_bytes
from benchmarks.outside import Outside, OutsideRun
from benchmarks.results import SCHEMA, Results, Row
from benchmarks.systems import Run, System, executed_flops, inputs_of, own_case, rule_of, systems_of
from gim_kernels.budget import relative_error

#: Share of the free memory that the least a system needs may be. A GPU that runs out raises, which becomes a row; a
#: CPU that runs out kills the process.
SHARE = {"cpu": 0.6, "cuda": 1.0}


class BenchmarkError(Exception):
    """Something the user can put right, in one line."""


@dataclass(frozen=True)
class Settings:
    """How long to measure.

    Args:
        repeats: rounds at most.
        least: rounds at least.
        case_seconds: after this no further round of a case begins.
        budget_seconds: after this no further case begins; the results name those not reached.
    """

    repeats: int = 15
    least: int = 3
    case_seconds: float = 20.0
    budget_seconds: float = float("inf")


#: What each suite is measured with where nothing else is asked for.
SETTINGS = {
    "quick": Settings(repeats=7, least=3, case_seconds=1.5),
    "memory": Settings(repeats=1, least=1, case_seconds=0.0),
}


def device_of(name: str) -> torch.device:
    """The device of a name; ``auto`` is a GPU where there is one.

    Raises:
        BenchmarkError: it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BenchmarkError(f"--device: {name!r} is not the name of a device") from error
    if device.type not in ("cpu", "cuda"):
        raise BenchmarkError(f"--device: suites exist for cpu and cuda, not for {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError(f"--device: {name!r} is asked for, and torch finds no GPU here")
    if device.type == "cuda" and ":" not in name:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def cases_of(suite: str, device: torch.device, only: str = "", tokens: tuple[int, ...] = ()) -> tuple[Case, ...]:
    """The cases of a suite on a kind of device, those with ``only`` in their name and of these lengths.

    Raises:
        BenchmarkError: no such suite, or nothing left.
    """
    if suite not in SUITES:
        raise BenchmarkError(f"no suite is called {suite!r}: there are {', '.join(SUITES)}")
    found = [case for case in SUITES[suite][device.type] if only in case.name]
    if tokens:
        found = [case for case in found if case.tokens in tokens]
    if not found:
        raise BenchmarkError(f"no case of suite {suite!r} on {device.type} is left by --only {only!r} and --tokens")
    return tuple(found)


def gib(amount: float) -> str:
    """Bytes in GiB, for people."""
    return f"{amount / 2**30:.1f} GiB"


def _too_small(needed: int, device: torch.device) -> Row | None:
    """A row's note where memory does not suffice, with the bytes that it would need."""
    free = available_bytes(device)
    if needed <= SHARE[device.type] * free:
        return None
    return {"note": f"skipped: needs at least {gib(needed)}, {gib(free)} are free", "bytes_needed": needed}


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


@dataclass
class _Prepared:
    """The systems of a case that ran once, how far they are off the first, ours, and notes on those that did not.

    ``differences`` holds those of the same rule alone.
    """

    runs: dict[str, Run] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Row] = field(default_factory=dict)


def _prepare(
    case: Case, systems: tuple[System, ...], problems: dict[str, str], inputs: tuple[Any, ...], device: torch.device
) -> _Prepared:
    found = _Prepared()
    ours: tuple[torch.Tensor, ...] | None = None
    for system in systems:
        if system.name in problems:
            found.notes[system.name] = {"note": problems[system.name]}
            continue
        note = _too_small(system.bytes_needed(case), device)
        if note is not None:
            found.notes[system.name] = note
            continue
        try:
            run = system.prepare(case, inputs, device)
            result = run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except torch.OutOfMemoryError:
            found.notes[system.name] = {"note": "out of memory"}
        except (KeyboardInterrupt, SystemExit):
            raise
        except Exception as error:  # whatever a rival raises is a row that says so
            found.notes[system.name] = {"note": f"refused: {_first_line(error)}"}
        else:
            found.runs[system.name] = run
            if system is systems[0]:
                ours = tuple(one.detach() for one in result)
            elif ours is not None and rule_of(system, case) == rule_of(systems[0], case):
                # In float64, where the results are: a host would take seconds.
                pairs = zip(ours, result, strict=True)
                found.differences[system.name] = max(relative_error(a, b.to(a.device)) for a, b in pairs)
            del result
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def _roofline_seconds(flops: float, moved: float, dtype: str, limits: dict[str, Any]) -> float:
    """The least time that the machine's own rates allow for a case's work."""
    compute = flops / (limits["matrix_gflops"][dtype] * 1e9)
    return max(compute, moved / (limits["copy_gb_per_s"] * 1e9))


def run_case(
    case: Case,
    device: torch.device,
    limits: dict[str, Any],
    checks: Checks,
    settings: Settings,
    systems: tuple[System, ...] | None = None,
) -> list[Row]:
    """Every system of a case, measured or with a note that says why not."""
    chosen = systems or systems_of(case, device)
    base = {"case": case.name, "op": case.op, "config": case.config, "tokens": case.tokens}
    note = _too_small(case.tensor_bytes(), device)
    if note is not None:
        return [{**base, "system": system.name, **note} for system in chosen]
    problems = checks(case, tuple(system for system in chosen if system.rule != "outside"))
    inputs = inputs_of(case, device)
    prepared = _prepare(case, chosen, problems, inputs, device)
    watch = Stopwatch(device)
    peaks, failed = {}, {}
    for name, run in prepared.runs.items():
        try:
            peaks[name] = run.peak_bytes() if isinstance(run, OutsideRun) else peak_bytes(run, device)
        except torch.OutOfMemoryError:
            failed[name] = {"note": "out of memory"}
    timed = {name: run for name, run in prepared.runs.items() if name in peaks}
    before = clocks(device)
    times = interleaved(timed, watch, settings.repeats, settings.least, settings.case_seconds)
    after = clocks(device)
    for run in prepared.runs.values():
        if isinstance(run, OutsideRun):
            run.close()
    rows: list[Row] = []
    for system in chosen:
        row: Row = {**base, "system": system.name}
        if system.backend:
            row["backend"] = system.backend
        if system.name not in times:
            extra = failed.get(system.name) or prepared.notes.get(system.name)
            if extra is not None:
                rows.append({**row, **extra})
            continue
        measured, own = times[system.name], own_case(case, system)
        floor = _roofline_seconds(own.flops(), own.bytes(), case.dtype, limits)
        executed = executed_flops(case, system, device)
        row |= measured.to_dict()
        row["peak_mib"] = round(peaks[system.name] / MIB, 2)
        row["gflops"] = round(own.flops() / measured.median / 1e9, 1)
        if executed is not None:
            row["executed_gflops"] = round(executed / measured.median / 1e9, 1)
        row["gb_per_s"] = round(own.bytes() / measured.median / 1e9, 2)
        row["roofline_ms"] = round(1000 * floor, 4)
        row["roofline_share"] = round(floor / measured.median, 4)
        if system.name in prepared.differences:
            row["difference_to_ours"] = float(f"{prepared.differences[system.name]:.2e}")
        if device.type == "cuda":
            row["sm_mhz"] = [clock.get("clocks.sm", "unknown") for clock in (before, after)]
        rows.append(row)
    return rows


def new_results(suite: str, device: torch.device) -> Results:
    """Results of a suite without any row yet."""
    return {
        "schema": SCHEMA,
        "suite": suite,
        **environment(device),
        "machine": None,
        "complete": False,
        "rows": [],
    }


@dataclass
class Suite:
    """A run of a suite; :meth:`run` fills ``results`` case by case.

    Args:
        name: of the suite.
        device: where.
        cases: in order.
        settings: how long.
        outside: rivals in another environment, for cases of ``explain``.
    """

    name: str
    device: torch.device
    cases: tuple[Case, ...]
    settings: Settings
    outside: Outside | None = None
    results: Results = field(init=False)

    def __post_init__(self) -> None:
        self.results = new_results(self.name, self.device)

    def run(self, started: Callable[[Case], None] = lambda case: None) -> Iterator[tuple[Case, list[Row]]]:
        """Measure the machine, then every case; each case's rows are in ``results`` before they are handed over."""
        begin = time.perf_counter()
        dtypes = list(dict.fromkeys(case.dtype for case in self.cases))
        self.results["machine"] = machine(self.device, dtypes)
        checks = Checks(self.device)
        for index, case in enumerate(self.cases):
            if time.perf_counter() - begin > self.settings.budget_seconds:
                self.results["not_reached"] = [one.name for one in self.cases[index:]]
                return
            started(case)
            if index and self.cases[index - 1].config != case.config:
                forget_models()
            systems = systems_of(case, self.device)
            if self.outside is not None and isinstance(case, ExplainCase):
                systems = (*systems, *self.outside.systems(case, self.device))
            rows = run_case(case, self.device, self.results["machine"], checks, self.settings, systems)
            self.results["rows"] += rows
            yield case, rows
        self.results["complete"] = True
