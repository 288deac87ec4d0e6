"""Everything that needs a GPU in one command and nine minutes: ``make gpu OUT=dir``.

Tests first, then the suites, then the search over tiles. Each is a process of its own with a share of the time; what it
has written when its time is over stays. Nothing is installed and nothing is downloaded.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: Seconds in all: with the start of Python, inside nine minutes.
LIMIT = 515.0
#: Seconds that an interrupted step gets to write what it has.
GRACE = 12.0


@dataclass(frozen=True)
class Step:
    """A process.

    Args:
        name: of its log.
        command: after the interpreter.
        seconds: it is interrupted after these, or when the limit of all is reached.
    """

    name: str
    command: tuple[str, ...]
    seconds: float


def steps(out: Path) -> list[Step]:
    """What runs, in order of importance."""

    def suite(name: str, budget: int, *options: str) -> Step:
        written = ("--json", str(out / f"{name}.json"), "--plot", str(out / f"{name}.png"))
        command = ("-m", "benchmarks", name, "--device", "cuda", "--budget", str(budget), *written, *options)
        return Step(name, command, budget + 25)

    # A test file that cannot be collected there is an error of its own, and keeps no other from running.
    tests = ("-m", "pytest", "tests", "-m", "gpu", "--maxfail=50", "--continue-on-collection-errors", "-ra")
    return [
        Step("tests", (*tests, f"--junitxml={out / 'tests.xml'}"), 140),
        suite("attention", 120, "--seconds", "2"),
        suite("explain", 75, "--seconds", "4"),
        suite("pointwise", 15, "--seconds", "1"),
        suite("memory", 35),
        Step("tiles", ("-m", "benchmarks.time_tiles", "--json", str(out / "tiles.json"), "--budget", "100"), 115),
    ]


def run(todo: Sequence[Step], out: Path, limit: float = LIMIT) -> dict[str, str]:
    """Run the steps one after the other and write, after each, ``summary.json`` beside their logs.

    Args:
        todo: the steps.
        out: an existing folder.
        limit: seconds in all.

    Returns:
        For each step ``"ok"``, ``"exit code N"``, ``"stopped after N s"`` or ``"not started"``.
    """
    begin = time.monotonic()
    outcome = dict.fromkeys((step.name for step in todo), "not started: no time was left")
    for step in todo:
        left = limit - (time.monotonic() - begin) - GRACE
        if left > 5:
            outcome[step.name] = _run(step, min(step.seconds, left), out / f"{step.name}.log")
        line = f"{time.monotonic() - begin:6.1f} s  {step.name}: {outcome[step.name]}\n"
        sys.stdout.write(line)
        sys.stdout.flush()
        with (out / "log.txt").open("a", encoding="utf-8") as log:
            log.write(line)
        (out / "summary.json").write_text(json.dumps(outcome, indent=1) + "\n", encoding="utf-8")
    return outcome


def _run(step: Step, seconds: float, log: Path) -> str:
    """One step; its output goes to ``log`` as it comes."""
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, "-u", *step.command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            # As Ctrl-C: the suites then write what they have.
            process.send_signal(signal.SIGINT)
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            return f"stopped after {seconds:.0f} s"
        except BaseException:
            process.kill()
            process.wait()
            raise
    return "ok" if code == 0 else f"exit code {code}"


def main(arguments: Sequence[str]) -> int:
    """Run all steps into a folder; the exit code is 0 where each did what it should."""
    if len(arguments) != 1:
        sys.stderr.write("error: want one folder for the results: make gpu OUT=dir\n")
        return 2
    import torch

    if not torch.cuda.is_available():
        sys.stderr.write("error: make gpu needs an NVIDIA GPU, and torch finds none here\n")
        return 2
    out = Path(arguments[0]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    outcome = run(steps(out), out)
    return 0 if all(result == "ok" for result in outcome.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
