"""The kernels of ``make gpu`` built on a machine without a GPU: ``make gpu-cache PYTHON=...``.

The launchers run here with a driver that knows an H100 by name and runs nothing; what triton would compile there is
noted, compiled for sm_90 by many processes, and kept under the keys that triton will look for. The keys depend on the
version of triton: run it with the Python of an environment that has the version of the machine with the GPU.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

#: Where it lies in the source tree, and what it may hold.
FOLDER, MOST_BYTES = "gpu-cache", 40 * 2**20
#: What triton needs of a compiled kernel: the rest of what it writes is for people.
KEPT = (".cubin", ".json")
CAPABILITY = 90


class Driver:
    """An H100 that runs nothing."""

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0

    def get_current_target(self) -> Any:
        """What is compiled for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", CAPABILITY, 32)


class _Nothing:
    """In place of a compiled kernel."""

    packed_metadata, function = None, 0

    def launch_metadata(self, *_: Any) -> None:
        """None."""

    def run(self, *_: Any) -> None:
        """Nothing."""


@contextmanager
def asked() -> Iterator[list[tuple[Any, Any]]]:
    """Inside, tensors on a CPU are launched as if on an H100; what triton was asked to compile: sources and options."""
    import torch
    from triton.compiler import ASTSource
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from gim_kernels.triton import selfcheck, tiles

    found: list[tuple[Any, Any]] = []

    def note(kernel: Any, key: str, signature: Any, device: int, constants: Any, options: Any, *rest: Any) -> Any:
        found.append((ASTSource(kernel, signature, constants, rest[0]), options))
        kernel.device_caches[device][0][key] = nothing = _Nothing()
        return nothing

    driver.set_active(Driver())
    with ExitStack() as patches:
        checking = (importlib.import_module(f"gim_kernels.triton.{name}") for name in ("launch", "norm", "gated"))
        for target, name, value in (
            (JITFunction, "_do_compile", note),
            (tiles, "architecture_of", lambda _: f"cuda:{CAPABILITY}"),
            (torch.cuda, "is_current_stream_capturing", lambda: False),
            (selfcheck, "first_use", lambda *_: None),
            *((module, "check", lambda **_: None) for module in checking),
        ):
            patches.enter_context(mock.patch.object(target, name, value))
        yield found


def calls() -> list[Callable[[], None]]:
    """What is launched: the suites' kernels, then the tiles that ``make gpu`` times."""
    import torch

    from benchmarks import once, time_tiles

    cpu = torch.device("cpu")

    def timed(job: time_tiles.Job) -> None:
        with job.in_place():
            run, given, _ = time_tiles.kernel_of(job, 512, time_tiles.HEADS[0], cpu)
            run(*given)

    jobs = time_tiles.jobs(f"cuda:{CAPABILITY}", (128, 64), "bfloat16")
    return [*(lambda one=one: one(cpu) for one in once.built()), *(lambda job=job: timed(job) for job in jobs)]


def key_of(source: Any, options: Any) -> str:
    """The name of the folder in which triton looks for a compiled kernel."""
    from triton.compiler.compiler import make_backend
    from triton.runtime.cache import _base32

    compiler = importlib.import_module("triton.compiler.compiler")
    backend = make_backend(Driver().get_current_target())
    key = compiler.get_cache_key(source, backend, options, env_vars=compiler.get_cache_invalidating_env_vars())
    return str(_base32(hashlib.sha256(key.encode()).hexdigest()))


def _compile(numbers: Sequence[int], folder: str) -> list[str]:
    """Compile what stands at these places among what is asked for; what went wrong."""
    os.environ["TRITON_CACHE_DIR"] = folder
    import triton

    with asked() as found:
        for call in calls():
            call()
    problems = []
    for number in numbers:
        source, options = found[number]
        try:
            triton.compile(source, target=Driver().get_current_target(), options=options.__dict__)
        except Exception as failure:  # the compiler's exceptions share no base class
            last = (str(failure).strip().splitlines() or [""])[-1]
            problems.append(f"{source.fn.__name__}: {type(failure).__name__}: {last.strip()}"[:200])
    return problems


def prune(folder: Path) -> int:
    """Remove what triton does not read again; the bytes that are left."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file() and path.suffix not in KEPT:
            path.unlink()
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def install(source: Path, target: Path) -> int:
    """Copy a cache, whose files name one another by their whole paths; how many kernels there are now.

    Args:
        source: a folder that this program made; need not exist.
        target: triton's cache.
    """
    target.mkdir(parents=True, exist_ok=True)
    if not source.is_dir():
        return 0
    shutil.copytree(source, target, dirs_exist_ok=True)
    groups = list(target.glob("*/__grp__*.json"))
    for group in groups:
        names = json.loads(group.read_text())["child_paths"]
        group.write_text(json.dumps({"child_paths": {name: str(group.parent / name) for name in names}}))
    return len(groups)


def main(arguments: Sequence[str]) -> int:
    """Build the cache into a folder; a second argument is the number of processes."""
    folder = Path(arguments[0]).resolve()
    import triton

    begin = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with asked() as found:
        for call in calls():
            call()
    count = min(int(arguments[1]) if len(arguments) > 1 else os.cpu_count() or 1, len(found))
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        shares = [range(first, len(found), count) for first in range(count)]
        problems = sum(pool.map(_compile, shares, [str(folder)] * count), start=list[str]())
    size = prune(folder)
    built = sum(any((folder / key_of(*one)).glob("*.cubin")) for one in found)
    sys.stdout.write(
        f"triton {triton.__version__}: {built} of {len(found)} kernels, {size / 2**20:.1f} MiB, "
        f"{time.monotonic() - begin:.0f} s\n" + "".join(f"  not built: {problem}\n" for problem in problems)
    )
    if size > MOST_BYTES:
        sys.stderr.write(f"error: {folder} holds {size / 2**20:.1f} MiB, more than {MOST_BYTES / 2**20:.0f}\n")
        return 1
    # A tile that is only tried may not fit.
    return 0 if built > len(found) // 2 else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
