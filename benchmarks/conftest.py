"""pytest-benchmark keeps its files beside the other results, and compares those of one device only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

STORAGE = Path(__file__).parent / "results" / "pytest-benchmark"


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Where no other storage is asked for."""
    if getattr(config.option, "benchmark_storage", None) == "file://./.benchmarks":
        config.option.benchmark_storage = f"file://{STORAGE}"


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """The device that figures are compared by, and what it runs; the machine's own name is nobody's business."""
    from benchmarks.measure import device_name
    from benchmarks.runner import device_of

    kept: dict[str, Any] = {
        name: machine_info[name] for name in ("machine", "system", "python_version") if name in machine_info
    }
    machine_info.clear()
    machine_info.update(kept, device=device_name(device_of("auto")))


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """A case is its name: what else it is parametrised with says nothing outside its process."""
    for row in output_json["benchmarks"]:
        row["params"] = None


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_compare_machine_info(
    config: pytest.Config, benchmarksession: Any, machine_info: dict[str, Any], compared_benchmark: dict[str, Any]
) -> None:
    """Refuse figures of another device."""
    other = compared_benchmark["machine_info"].get("device")
    if other != machine_info["device"]:
        raise pytest.UsageError(
            f"results of different devices cannot be compared: {other!r} and {machine_info['device']!r}"
        )
