"""Clocks, memory and the description of the machine."""

from __future__ import annotations

import ctypes
import datetime
import gc
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

MIB = 1024 * 1024


@dataclass(frozen=True)
class Times:
    """Repetitions of one system, in seconds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median."""
        return statistics.median(self.seconds)

    def to_dict(self) -> dict[str, float | int]:
        """Median, extremes and count, in milliseconds."""
        return {
            "median_ms": round(1000 * self.median, 2),
            "min_ms": round(1000 * min(self.seconds), 2),
            "max_ms": round(1000 * max(self.seconds), 2),
            "repeats": len(self.seconds),
        }


def interleaved(systems: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Times]:
    """Time systems that have run before in turn, A B C A B C ..., so that drift of the machine hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(repeats):
        for name, run in systems.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: Times(tuple(values)) for name, values in seconds.items()}


def _status(field: str) -> int:
    """A field of the process's status, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: memory is measured on Linux only")


def peak_bytes(run: Callable[[], Any]) -> int:
    """Resident memory that a call adds at its peak to what the process held before (weights and inputs), in bytes.

    The kernel's own high-water mark is reset, then read: nothing that the call allocates can hide from it.
    """
    gc.collect()
    # Freed memory that the allocator keeps would count as held before, and hide what the call takes from it.
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    run()
    return _status("VmHWM") - before


def available_bytes() -> int:
    """Memory that is available on the machine, in bytes."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    root = Path(__file__).parents[1]
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def environment() -> dict[str, Any]:
    """Device, versions, commit and date of a run."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{_processor()}, {torch.get_num_threads()} threads"
    packages = ("torch", "triton", "transformers", "gim-kernels")
    return {
        "device": device,
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: version(name) for name in packages},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
