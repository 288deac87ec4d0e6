"""Rivals that live in another environment, since their package has our package's name.

``--outside PYTHON`` names its interpreter, of an environment made with ``pip install -c constraints.txt
gim-explain==0.1.4 transformer-lens``; :mod:`benchmarks.outside_worker` runs there, one process for each rival and
case, driven over a pipe, so that repetitions interleave with ours. Each is labelled with the rules that it really
applies: its scores are held against every combination of the rules in float64.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import itertools
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import decoder
from benchmarks.cases import ExplainCase
from benchmarks.systems import BASELINE, TARGET, Run, System, UnavailableError
from gim_kernels.budget import relative_error
from tests.eager import EagerRules
from tests.oracle import assert_within_budget

WORKER = Path(__file__).with_name("outside_worker.py")
#: Name in results, and what the worker calls it.
RIVALS = {
    "gim-explain, Hugging Face": "hugging_face",
    "gim-explain, TransformerLens bridge": "bridge",
    "gim-explain, TransformerLens HookedTransformer": "hooked_transformer",
}

_PAPER, _PLAIN = EagerRules(), EagerRules(None, False, False, (1, 1, 1), (1, 1))


def combinations() -> dict[str, EagerRules]:
    """Every combination of the paper's four rules, by the names of those that are applied."""
    parts = {"temperature": "softmax", "freeze_norm": "norm", "qkv": "q/k/v", "gate_up": "gate/up"}
    found = {}
    for switches in itertools.product((True, False), repeat=len(parts)):
        values = {field: getattr(_PAPER if on else _PLAIN, field) for field, on in zip(parts, switches, strict=True)}
        names = [word for word, on in zip(parts.values(), switches, strict=True) if on]
        found[", ".join(names) or "none"] = dataclasses.replace(_PLAIN, **values)
    return found


class Pipe:
    """A worker process.

    Raises:
        UnavailableError: it could not be started, ended, or answered with an error.
    """

    def __init__(self, python: Path) -> None:
        try:
            self.process = subprocess.Popen(
                [str(python), "-E", str(WORKER)],  # without PYTHONPATH, which may lead to our package gim
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        except OSError as error:
            raise UnavailableError(f"cannot start {python}: {error.strerror or error}") from error
        atexit.register(self.close)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """One command and its answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise UnavailableError(f"its process ended with code {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UnavailableError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        atexit.unregister(self.close)


class OutsideRun:
    """A prepared rival: a call that runs it once, with its own measure of memory."""

    def __init__(self, pipe: Pipe) -> None:
        self.pipe = pipe

    def __call__(self) -> tuple[torch.Tensor, ...]:
        return (torch.tensor(self.pipe.ask("run", target=TARGET, baseline=BASELINE)["scores"]),)

    def peak_bytes(self) -> int:
        """Memory that one run adds in its process, in bytes."""
        return int(self.pipe.ask("peak", target=TARGET, baseline=BASELINE)["bytes"])

    def close(self) -> None:
        """End its process."""
        self.pipe.close()


def _start(python: Path, rival: str, model: Any, ids: torch.Tensor, device: torch.device) -> tuple[Pipe, str]:
    """A process with the model and the prompt in it, and the versions that run there."""
    pipe = Pipe(python)
    folder = tempfile.mkdtemp(prefix="gim-bench-")
    try:
        model.save_pretrained(folder)
        answer = pipe.ask(
            "load",
            system=rival,
            folder=folder,
            device=device.type,
            threads=torch.get_num_threads(),
            tokens=ids.shape[1],
        )
        pipe.ask("set_ids", ids=ids[0].tolist())
    except BaseException:
        pipe.close()
        raise
    finally:
        shutil.rmtree(folder)
    return pipe, str(answer["versions"])


def rules_applied(scores: torch.Tensor, model: Any, ids: torch.Tensor) -> str:
    """Which of the rules a rival really applied, found by holding its scores against every combination.

    Args:
        scores: ``[T]``, what it returned for the model and the ids ``[1, T]``.
        model: in float32.
        ids: the prompt.
    """
    best, least = "", float("inf")
    double = model.double()
    truths = {
        name: decoder.attribution(double, ids, rules, target=TARGET, baseline=BASELINE)
        for name, rules in combinations().items()
    }
    model.float()
    for name, truth in truths.items():
        error = relative_error(scores, truth)
        if error < least:
            best, least = name, error
    yardstick = decoder.attribution(model, ids, combinations()[best], target=TARGET, baseline=BASELINE)
    try:
        assert_within_budget(scores, truths[best], yardstick, best)
    except AssertionError:
        if least > 0.01:
            return f"rules really applied: no combination fits (nearest: {best}, {least:.0%} off)"
        return f"rules really applied: {best} (within {least:.0e})"
    return f"rules really applied: {best}"


class Outside:
    """The rivals of an environment, each identified once for each configuration."""

    def __init__(self, python: Path) -> None:
        self.python = python
        self._labels: dict[tuple[str, str], str] = {}

    def systems(self, case: ExplainCase, device: torch.device) -> tuple[System, ...]:
        """The rivals, labelled; one that does not run there at all is labelled with what it said."""
        found = []
        for name, rival in RIVALS.items():
            key = (name, case.config)
            if key not in self._labels:
                self._labels[key] = self._identify(rival, case, device)
            found.append(
                System(
                    name,
                    "outside",
                    functools.partial(self._prepare, rival),
                    backend=self._labels[key],
                    bytes_needed=ExplainCase.eager_bytes if rival != "hugging_face" else lambda case: 0,
                )
            )
        return tuple(found)

    def _prepare(self, rival: str, case: ExplainCase, inputs: tuple[Any, ...], device: torch.device) -> Run:
        model, ids = inputs
        pipe, _ = _start(self.python, rival, model, ids, device)
        return OutsideRun(pipe)

    def _identify(self, rival: str, case: ExplainCase, device: torch.device) -> str:
        small = dataclasses.replace(case.small(), dtype="float32")
        model, ids = small.build(device)
        versions = ""
        try:
            pipe, versions = _start(self.python, rival, model, ids, device)
            try:
                scores = OutsideRun(pipe)()[0].to(device)
            finally:
                pipe.close()
        except UnavailableError as error:
            return "; ".join(filter(None, (versions, f"does not run: {error}")))
        return f"{versions}; {rules_applied(scores, model, ids)}"
