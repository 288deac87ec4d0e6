"""The suite ``quick`` under pytest-benchmark: ``pytest benchmarks``.

``--benchmark-save=NAME`` saves beside the committed results, ``--benchmark-compare=NUMBER`` compares with one of them
and refuses those of another device. Only our own systems run here; what they are worth beside others, ``gim bench``
says.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("pytest_benchmark", reason="pytest benchmarks needs pytest-benchmark: the extra bench")

from benchmarks.cases import Case
from benchmarks.check import wrong
from benchmarks.runner import cases_of, device_of
from benchmarks.systems import System, inputs_of, systems_of

DEVICE = device_of("auto")
OURS = [
    pytest.param(case, system, id=f"{case.name}-{system.name}".replace(" ", "_"))
    for case in cases_of("quick", DEVICE)
    for system in systems_of(case, DEVICE)
    if system.name.startswith("gim-kernels")
]


@pytest.mark.parametrize(("case", "system"), OURS)
def test_speed(benchmark: Any, case: Case, system: System) -> None:
    small = case.small()
    assert wrong(small, system, inputs_of(small, DEVICE), DEVICE) is None
    run = system.prepare(case, inputs_of(case, DEVICE), DEVICE)

    def once() -> None:
        run()
        if DEVICE.type == "cuda":
            import torch

            torch.cuda.synchronize(DEVICE)

    benchmark.group = case.name
    benchmark.extra_info.update(gflop=case.flops() / 1e9, tokens=case.tokens)
    benchmark.pedantic(once, rounds=5, warmup_rounds=1)
