"""Set-up of every test process."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Generator, Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # Triton's interpreter runs the kernels on a CPU; it must be chosen before triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # One process for each core already: more threads would only wait for each other.
    torch.set_num_threads(1)
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may download anything

from hypothesis import settings
from hypothesis.internal.conjecture.providers import HypothesisProvider
from hypothesis.internal.constants_ast import Constants

#: What hypothesis draws from where the command line names no other --hypothesis-seed.
SEED = "0"
# It would draw numbers from the source of whatever module is loaded too: tests/test_draws.py.
HypothesisProvider._local_constants = Constants()  # type: ignore[assignment]
# Said in full, since hypothesis derandomizes by itself wherever the variable CI is set.
settings.register_profile("by seed", deadline=None, database=None, derandomize=False)
settings.load_profile("by seed")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = SEED


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is loaded now stays to the end: walking it for garbage again and again was a tenth of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture
def fresh_memory_is_nan() -> Iterator[None]:
    """Inside the test, memory that a kernel forgot to write holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    # torch fills new memory with NaN in this mode, by torch.utils.deterministic.fill_uninitialized_memory.
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session", autouse=True)
def interpreter_as_tests_need_it() -> Iterator[None]:
    """Where triton's interpreter runs the kernels, it computes with bfloat16 as a GPU does, and sooner."""
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        yield
        return
    from tests.bfloat16 import as_on_a_gpu
    from tests.interpreter import without_repetition

    with as_on_a_gpu(), without_repetition():
        yield
