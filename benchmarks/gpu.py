"""Everything that needs a GPU in one command and 460 seconds: ``make gpu OUT=dir``.

What decides comes first. Each step is a process of its own with a share of the time; it writes as it goes, so that what
it has written when its time is over stays. Nothing is installed and nothing is downloaded; kernels that
``make gpu-cache`` built elsewhere are not compiled again.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import gpu_cache

ROOT = Path(__file__).parents[1]
#: Seconds in all, with what it takes to end a step.
LIMIT = 460.0
#: Seconds that an interrupted step gets to write what it has.
GRACE = 8.0
#: A step is not started in less.
LEAST = 3.0


@dataclass(frozen=True)
class Step:
    """A process.

    Args:
        name: of its log.
        command: after the interpreter, or after ``tool``.
        seconds: it is interrupted after these, or when the limit of all is reached.
        tool: a program that runs the interpreter, with its own arguments; a step whose tool is not there is left out.
        background: whether it runs beside those that follow, until the step named here begins.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    tool: tuple[str, ...] = ()
    background: str = ""


def steps(out: Path, tiny: bool = False) -> list[Step]:
    """What runs, in order.

    Args:
        out: where each writes.
        tiny: the same programs at the smallest sizes, on a CPU and in triton's interpreter: to try them.
    """
    small = ("--tiny",) if tiny else ()

    def suite(name: str, budget: float, *options: str) -> Step:
        written = ("--json", str(out / f"{name}.json"))
        device = "cpu" if tiny else "cuda"
        settings = ("--budget", f"{budget - 5:g}", "--device", device, *options)
        if tiny:
            settings = (*settings, "--repeats", "1", "--only", "constant" if name == "headline" else "")
        return Step(name, ("-m", "benchmarks", name, *written, *settings), budget)

    xdist = importlib.util.find_spec("xdist") is not None
    workers = ("-n", "2" if tiny else "10") if xdist else ()
    # A test file that cannot be collected there is an error of its own, and keeps no other from running.
    tests = ("-m", "pytest", "tests/gim_kernels" if tiny else "tests", "-m", "gpu", *workers, "--maxfail=50")
    tests = (*tests, "--continue-on-collection-errors", "-ra", f"--junitxml={out / 'tests.xml'}")
    watched = ("tiny",) if tiny else ()
    sanitizer = ("compute-sanitizer", "--error-exitcode", "9", "--log-file", str(out / "sanitizer.txt"))
    profiler = ("ncu", "--csv", "--log-file", str(out / "ncu.csv"), "--kernel-name", "regex:attention|grad_", "-c", "3")
    return [
        Step("probe", ("-m", "benchmarks.probe", "--json", str(out / "probe.json"), *small), 20),
        Step("flex", ("-m", "benchmarks.flex", *small), 200, background="headline"),
        Step("tests", tests, 105),
        Step("verify", ("-m", "benchmarks.verify", "--table", str(out / "verified.json"), *small), 20),
        Step("sanitizer", ("-m", "benchmarks.once", "smallest", *watched), 35, tool=sanitizer),
        Step("tiles", ("-m", "benchmarks.time_tiles", "--json", str(out / "tiles.json"), "--budget", "65", *small), 70),
        Step("ncu", ("-m", "benchmarks.once", "headline", *watched), 20, tool=profiler),
        suite("headline", 75, "--seconds", "0.6"),
        suite("explain-8b", 40, "--seconds", "2"),
        suite("long", 30, "--seconds", "0"),
        suite("pointwise", 12, "--seconds", "0.5"),
        suite("memory", 15),
    ]


def environment(out: Path) -> dict[str, str]:
    """Variables of every step: its own cache of compiled kernels, which holds what was built elsewhere."""
    folder = out / "triton-cache"
    gpu_cache.install(ROOT / gpu_cache.FOLDER, folder)
    return {**os.environ, "TRITON_CACHE_DIR": str(folder)}


class _Running:
    """A step that has been started."""

    def __init__(self, step: Step, log: Path, variables: Mapping[str, str]) -> None:
        self.step, self.begin = step, time.monotonic()
        self._log = log.open("w", encoding="utf-8")
        command = [*step.tool, sys.executable, "-u", *step.command]
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=dict(variables),
            start_new_session=True,
            # What a shell runs in the background ignores interrupts, and so would what that starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def wait(self, seconds: float) -> str:
        """How it ended; it is interrupted after that many more seconds."""
        try:
            code = self._process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            # As Ctrl-C: the programs then write what they have.
            self._signal(signal.SIGINT)
            try:
                self._process.wait(GRACE)
            except subprocess.TimeoutExpired:
                self.kill()
            return f"stopped after {time.monotonic() - self.begin:.0f} s"
        finally:
            self._log.close()
        return "ok" if code == 0 else f"exit code {code}"

    def kill(self) -> None:
        """End it and what it has started."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: int) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)


def run(
    todo: Sequence[Step], out: Path, limit: float = LIMIT, variables: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Run the steps one after the other and write, after each, ``summary.json`` beside their logs.

    Args:
        todo: the steps.
        out: an existing folder.
        limit: seconds in all.
        variables: the environment of each.

    Returns:
        For each step ``"ok"``, ``"exit code N"``, ``"stopped after N s"``, ``"left out: ..."``, ``"not started: ..."``.
    """
    begin = time.monotonic()
    variables = os.environ if variables is None else variables
    outcome = dict.fromkeys((step.name for step in todo), "not started: no time was left")
    beside: list[_Running] = []

    def note(name: str) -> None:
        line = f"{time.monotonic() - begin:6.1f} s  {name}: {outcome[name]}\n"
        sys.stdout.write(line)
        sys.stdout.flush()
        with (out / "log.txt").open("a", encoding="utf-8") as log:
            log.write(line)
        (out / "summary.json").write_text(json.dumps(outcome, indent=1) + "\n", encoding="utf-8")

    try:
        for step in todo:
            for other in [one for one in beside if one.step.background == step.name]:
                outcome[other.step.name] = other.wait(other.step.seconds - (time.monotonic() - other.begin))
                beside.remove(other)
                note(other.step.name)
            left = limit - (time.monotonic() - begin) - GRACE
            if step.tool and shutil.which(step.tool[0], path=variables.get("PATH")) is None:
                outcome[step.name] = f"left out: {step.tool[0]} is not here"
            elif left > LEAST:
                running = _Running(step, out / f"{step.name}.log", variables)
                beside.append(running)
                if step.background:
                    outcome[step.name] = "running"
                else:
                    outcome[step.name] = running.wait(min(step.seconds, left))
                    beside.remove(running)
            note(step.name)
        for other in beside:
            outcome[other.step.name] = other.wait(0.0)
            note(other.step.name)
    except BaseException:
        for other in beside:
            other.kill()
        raise
    return outcome


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
    outcome = run(steps(out), out, variables=environment(out))
    return 0 if all(result == "ok" or result.startswith("left out") for result in outcome.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
