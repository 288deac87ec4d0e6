"""What the launchers do around a launch, on a machine without a GPU: triton's own JIT with a driver that runs nothing.

In a process of its own, since triton chooses between its JIT and its interpreter when a kernel is defined. What is
seen goes to standard output as one JSON object::

    python -m tests.gim_kernels.launches
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import gim_kernels
from gim_kernels.aot.variants import shipped
from gim_kernels.triton import attention_out, dispatch, selfcheck, tiles
from gim_kernels.types import Options

#: Rounds of a measurement, of which the fastest counts, and calls in each.
ROUNDS, CALLS = 8, 10


class Driver:
    """An H100 that runs nothing."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Compiled:
    """A kernel that triton compiled: it notes its last launch."""

    packed_metadata, function = None, 0

    def __init__(self, attributes: Any) -> None:
        self.attributes = attributes

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *given: Any) -> None:
        launched.append((self, given))


launched: deque[tuple[Compiled, tuple[Any, ...]]] = deque(maxlen=1)
#: What triton was asked to compile otherwise than a variant says: arguments that are absent, or that are not.
otherwise: list[str] = []
_variants: list[tiles.Variant] = []
compilations: list[str] = []
jit_runs: list[str] = []


def compile_nothing(self: Any, key: str, signature: Any, device: int, constants: Any, options: Any, *rest: Any) -> Any:
    """In place of ``JITFunction._do_compile``."""
    compilations.append(self.__name__)
    absent = {name for name, kind in signature.items() if kind == "constexpr"}
    # A stride or a size of 1 is a constant of triton's own.
    ones = {self.arg_names[place[0]] for place, value in constants.items() if value == 1 and len(place) == 1}
    wrong = (absent - ones) ^ (set(_variants[-1].constants) - ones)
    otherwise.extend(f"{_variants[-1].name}: {name}" for name in sorted(wrong))
    kernel = Compiled(rest[0])
    self.device_caches[device][0][key] = kernel
    return kernel


@contextlib.contextmanager
def on_an_h100() -> Iterator[None]:
    """Inside, tensors of the CPU are taken for tensors of a GPU that runs nothing."""
    run, launch = JITFunction.run, tiles.Variant.launch

    def noted(self: tiles.Variant, programs: int, **arguments: Any) -> Any:
        _variants.append(self)
        return launch(self, programs, **arguments)

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        jit_runs.append(self.__name__)
        return run(self, *args, **kwargs)

    driver.set_active(Driver())
    with contextlib.ExitStack() as patches:
        for target, name, value in (
            (JITFunction, "_do_compile", compile_nothing),
            (JITFunction, "run", counted),
            (tiles.Variant, "launch", noted),
            (tiles, "architecture_of", lambda _: "cuda:90"),
            (torch.cuda, "is_current_stream_capturing", lambda: False),
            (selfcheck, "first_use", lambda *_: None),
            *((importlib.import_module(f"gim_kernels.triton.{one}"), "check", lambda **_: None) for one in CHECKING),
        ):
            patches.enter_context(mock.patch.object(target, name, value))
        yield


#: Modules whose tensors must be on a GPU.
CHECKING = ("launch", "norm", "gated")


def numbers(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def leaf(*shape: int) -> torch.Tensor:
    return numbers(*shape).requires_grad_()


def subjects() -> dict[str, Callable[[], Any]]:
    """Forward and step of every operator on tensors so small that nothing but the host's work counts."""
    query, key, value, grad = leaf(1, 4, 16, 64), leaf(1, 2, 16, 64), leaf(1, 2, 16, 64), numbers(1, 4, 16, 64)
    x, other, weight, grad_y = leaf(4, 64), leaf(4, 64), numbers(64), numbers(4, 64)

    def attention() -> torch.Tensor:
        return gim_kernels.attention(
            query,
            key,
            value,
            causal=True,
            softmax_backward="temperature",
            grad_scale=(0.25, 0.25, 0.5),
            engine="triton",
        )

    def norm() -> torch.Tensor:
        return gim_kernels.rms_norm(x, weight, 1e-5, frozen=True, engine="triton")

    def gated() -> torch.Tensor:
        return gim_kernels.gated(x, other, "silu", engine="triton")

    return {
        "attention": attention,
        "attention step": lambda: torch.autograd.grad(attention(), (query, key, value), grad),
        "norm": norm,
        "norm step": lambda: torch.autograd.grad(norm(), x, grad_y),
        "gated": gated,
        "gated step": lambda: torch.autograd.grad(gated(), (x, other), grad_y),
    }


def times() -> dict[str, list[float]]:
    """Microseconds of process time of each subject: as it is, and where nothing is kept from call to call."""
    best: dict[str, list[float]] = {name: [float("inf")] * 2 for name in subjects()}
    for _ in range(ROUNDS):
        for column, kept in enumerate((True, False)):
            with mock.patch.object(dispatch, "interpreted", lambda kept=kept: not kept):
                for name, call in subjects().items():
                    call()
                    begin = time.process_time()
                    for _ in range(CALLS):
                        call()
                    spent = (time.process_time() - begin) / CALLS * 1e6
                    best[name][column] = min(best[name][column], spent)
    return best


def calls() -> dict[str, int]:
    """How many functions, Python's and C's, the package itself calls for each subject where its layout is known."""
    package = str(Path(gim_kernels.__file__).parent)
    found: dict[str, int] = {}

    def note(frame: FrameType, event: str, _: Any) -> None:
        caller = {"call": frame.f_back, "c_call": frame}.get(event)
        if caller is not None and caller.f_code.co_filename.startswith(package):
            found[name] += 1

    with mock.patch.object(dispatch, "interpreted", lambda: False):
        for name, call in subjects().items():
            found[name] = 0
            call()
            sys.setprofile(note)
            try:
                call()
            finally:
                sys.setprofile(None)
    return found


def compilations_by_length() -> dict[str, int]:
    """How many kernels are compiled for eight lengths of one width, one of them 1."""
    found: dict[str, int] = {}
    for name, call in (
        ("norm", lambda t: gim_kernels.rms_norm(numbers(t, 4096), numbers(4096), 1e-5, engine="triton")),
        ("layer norm", lambda t: gim_kernels.layer_norm(numbers(2, t, 768), None, None, 1e-5, engine="triton")),
        ("gated", lambda t: gim_kernels.gated(numbers(t, 4096), numbers(t, 4096), "silu", engine="triton")),
        ("fused gated", lambda t: gim_kernels.gated(*numbers(t, 8192).chunk(2, -1), "silu", engine="triton")),
        (
            "attention",
            lambda t: gim_kernels.attention(*(numbers(1, 2, t, 64) for _ in range(3)), causal=True, engine="triton"),
        ),
    ):
        before = len(compilations)
        for length in (1, 2, 16, 17, 31, 33, 64, 255):
            call(length)
        found[name] = len(compilations) - before
    found["norm step"] = -len(compilations)
    for length in (1, 2, 16, 17, 31, 33, 64, 255):
        x, weight = leaf(length, 256), leaf(256)
        torch.autograd.grad(gim_kernels.rms_norm(x, weight, 1e-5, engine="triton"), (x, weight), numbers(length, 256))
    found["norm step"] += len(compilations)
    return found


def as_handed(given: tuple[Any, ...]) -> list[Any]:
    """What a kernel was handed, with addresses in place of tensors."""

    def plain(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return x.data_ptr()
        return {name: plain(value) for name, value in vars(x).items()} if hasattr(x, "block_shape") else x

    return [plain(x) for x in given[9:]]


def handed_over() -> dict[str, bool]:
    """Whether a kernel gets directly what triton gives it, for aligned tensors and for others."""
    found = {}
    memory = [torch.zeros(5000, dtype=torch.bfloat16) for _ in range(3)]
    for start in (0, 1, 8, 0, 1):
        tensors = [one[start : start + 4096].view(1, 4, 16, 64) for one in memory]
        out, lse = numbers(1, 4, 16, 64), torch.zeros(1, 4, 16)
        plan = attention_out.forward_plans((*tensors, None, None), Options(0.1, True))
        handed = []
        for hook in (None, print):
            launched.clear()
            with mock.patch.object(knobs.runtime, "launch_enter_hook", hook):
                before = len(jit_runs)
                plan.launch(*tensors, None, None, out, lse)
                ran = len(jit_runs) - before
            handed.append((launched[-1][0], as_handed(launched[-1][1])))
            found["a hook is served by triton"] = ran == 1
        found[f"elements from {start}"] = handed[0] == handed[1]
        with mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True):
            before = len(jit_runs)
            plan.launch(*tensors, None, None, out, lse)
            found["a capture is served by triton"] = len(jit_runs) == before + 1
    return found


def checks() -> dict[str, Any]:
    """Which variants of the library are not among what their own check launches."""
    missed = []
    entries = shipped("cuda:90:32", (64, 256))
    variants = {entry.variant.name: entry.variant for entry in entries}
    for variant in variants.values():
        with selfcheck._undisturbed(), dispatch.noted() as names:
            problem = selfcheck._PROBLEMS[variant.kernel.__name__](variant, torch.device("cpu"))
            problem.kernels(*problem.inputs)
        if variant.name not in names:
            missed.append(variant.name)
    return {"checked": len(variants), "missed": missed, "otherwise": otherwise}


def main(arguments: list[str]) -> None:
    """What is asked for: ``checks``, or without arguments the rest."""
    torch.set_num_threads(1)
    with on_an_h100():
        if arguments == ["checks"]:
            json.dump(checks(), sys.stdout)
            return
        seen = {"times": times(), "calls": calls(), "compilations": compilations_by_length()}
        seen["arguments"] = handed_over()
    json.dump({**seen, "otherwise": otherwise}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
