"""Clocks, memory, what the machine can do, and its description."""

from __future__ import annotations

import ctypes
import datetime
import gc
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

MIB = 1024 * 1024

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Times:
    """Repetitions of one system, in seconds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median."""
        return statistics.median(self.seconds)

    def to_dict(self) -> dict[str, float | int]:
        """Median, quartiles, extremes and count, in milliseconds."""
        first, _, third = (
            statistics.quantiles(self.seconds, method="inclusive") if len(self.seconds) > 1 else (self.seconds * 3)
        )
        numbers = {
            "median_ms": self.median,
            "min_ms": min(self.seconds),
            "q1_ms": first,
            "q3_ms": third,
            "max_ms": max(self.seconds),
        }
        return {**{name: round(1000 * value, 4) for name, value in numbers.items()}, "repeats": len(self.seconds)}


#: Clock cycles for which a GPU waits before what is timed: about 3 ms, in which the host launches all of it, so that
#: the time between two events is the kernels' and not the host's.
HEAD_START = 5_000_000


class Stopwatch:
    """Times one call on a device: the wall clock on a CPU, events on a GPU whose L2 cache was just overwritten.

    What the host does is part of the time only where it takes longer than the head start that it gets.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush: torch.Tensor | None = None
        if device.type == "cuda":
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(2 * cache, dtype=torch.uint8, device=device)

    def __call__(self, run: Callable[[], Any]) -> float:
        """Seconds that ``run()`` takes."""
        if self._flush is None:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        self._flush.zero_()
        torch.cuda.synchronize(self.device)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(HEAD_START)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize(self.device)
        return begin.elapsed_time(end) / 1000


def interleaved(
    systems: Mapping[str, Callable[[], Any]],
    watch: Callable[[Callable[[], Any]], float],
    repeats: int,
    least: int = 3,
    seconds: float = float("inf"),
) -> dict[str, Times]:
    """Time systems that have run before in turn, A B C A B C ..., so that drift of the machine hits all alike.

    Args:
        systems: each a call that runs the system once.
        watch: how many seconds a call takes.
        repeats: rounds at most.
        least: rounds at least.
        seconds: no round after ``least`` begins when this many have passed.
    """
    measured: dict[str, list[float]] = {name: [] for name in systems}
    start = time.perf_counter()
    for turn in range(repeats):
        if turn >= least and time.perf_counter() - start > seconds:
            break
        for name, run in systems.items():
            measured[name].append(watch(run))
    return {name: Times(tuple(values)) for name, values in measured.items() if values}


# --------------------------------------------------------------------------------------------------------- memory


def _status(field: str) -> int:
    """A field of the process's status, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: memory is measured on Linux only")


def peak_bytes(run: Callable[[], Any], device: torch.device | None = None) -> int:
    """Memory that a call adds at its peak to what was held before (weights and inputs), in bytes.

    On a CPU it is resident memory: the kernel's own high-water mark is reset, then read, so nothing that the call
    allocates can hide from it. On a GPU it is what torch's allocator handed out.
    """
    gc.collect()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - held
    # Freed memory that the allocator keeps would count as held before, and hide what the call takes from it.
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    run()
    return _status("VmHWM") - before


def available_bytes(device: torch.device | None = None) -> int:
    """Memory that is free on the device, in bytes."""
    if device is not None and device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reusable
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")


# ------------------------------------------------------------------------------------------ what the machine can do


def _least_seconds(device: torch.device, run: Callable[[], Any], seconds: float = 1.5) -> float:
    """Of repetitions of a call for that long, and of seven at least: a machine is seldom undisturbed at once."""
    watch = Stopwatch(device)
    run()
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 7 or time.perf_counter() - start < seconds:
        times.append(watch(run))
    return min(times)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy, read and written, the best of several."""
    elements = (1 << 28) if device.type == "cuda" else (1 << 25)
    source = torch.ones(elements, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _least_seconds(device, lambda: target.copy_(source))


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large square matrix product, the best of several."""
    size = {"cuda": 8192, "cpu": 1536}.get(device.type, 1536)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _least_seconds(device, lambda: torch.mm(a, b))


# --------------------------------------------------------------------------------------- description of the machine


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    root = Path(__file__).parents[1]
    if shutil.which("git") is None:
        return ""
    found = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else ""


def commit() -> str:
    """The commit that runs, with ``+`` where tracked files have been changed since; unknown outside git."""
    short = _git("rev-parse", "--short", "HEAD")
    if not short:
        return "unknown"
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", "gim", "gim_kernels", "benchmarks")
    return short + ("+" if changed else "")


def clocks(device: torch.device) -> dict[str, Any]:
    """Clocks now: on a GPU those of the multiprocessors and the memory in MHz, with temperature and power."""
    if device.type != "cuda":
        return {"load_1min": round(os.getloadavg()[0], 2)}
    fields = ("clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw", "driver_version")
    if shutil.which("nvidia-smi") is None:
        return {}
    found = subprocess.run(
        [
            "nvidia-smi",
            f"--query-gpu={','.join(fields)}",
            "--format=csv,noheader,nounits",
            "-i",
            str(device.index or 0),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    values = [one.strip() for one in found.stdout.strip().split(",")]
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}


def device_name(device: torch.device) -> str:
    """What figures are compared by: a GPU's name, or the processor and how many threads torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Device, versions, commit and date of a run."""
    device = device or torch.device("cpu")
    # What a build of torch is for stands in its own version only.
    versions = {"torch": str(torch.__version__), **{name: _version(name) for name in ("triton", "transformers")}}
    versions["gim-kernels"] = _version("gim-kernels")
    if device.type == "cuda":
        versions["CUDA"] = str(torch.version.cuda)
        versions["driver"] = str(clocks(device).get("driver_version", "unknown"))
    return {
        "device": device_name(device),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": versions,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def busy_share(seconds: float = 0.5) -> float:
    """Share of all cores that others use while this process sleeps, from 0 to 1."""

    def now() -> tuple[int, int]:
        fields = [int(one) for one in Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:]]
        return sum(fields[:8]), fields[3] + fields[4]  # all time; idle, and waiting for a disk

    total, idle = now()
    time.sleep(seconds)
    later_total, later_idle = now()
    return 1 - (later_idle - idle) / max(1, later_total - total)


def machine(device: torch.device, dtypes: list[str]) -> dict[str, Any]:
    """What the machine reaches in the simplest programs, measured now: the roofline of every row.

    Returns:
        ``copy_gb_per_s``, ``matrix_gflops`` for each dtype, ``busy_share`` of the cores before that, and the clocks.
    """
    busy = round(busy_share(), 2)
    return {
        "busy_share": busy,
        "copy_gb_per_s": round(copy_bandwidth(device) / 1e9, 2),
        "matrix_gflops": {name: round(matrix_rate(device, DTYPES[name]) / 1e9, 1) for name in dtypes},
        "clocks": clocks(device),
    }


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Inside, torch uses that many threads; None leaves it alone."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
