"""Documents are true: their code runs, their figures come from committed results."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

from benchmarks import documents

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", documents.DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_generated_parts_are_current(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert documents.current(text) == text, "run: python -m benchmarks.documents"


def test_a_stale_part_is_noticed() -> None:
    stale = "<!-- generated: recall -->\n| tokens |\n<!-- end -->"
    assert documents.current(stale) != stale
    with pytest.raises(KeyError):
        documents.current("<!-- generated: nothing -->\n<!-- end -->")


@pytest.mark.slow
def test_the_readmes_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 11
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "attribution.html").stat().st_size > 10_000
    assert "gated MLPs" in capsys.readouterr().out


def test_the_readme_says_what_make_and_gim_know() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?make (\w+)`?", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    from gim.rules import PRESETS

    for preset in PRESETS:
        assert f"`{preset}`" in README


@pytest.mark.parametrize(
    "name",
    [
        "gim.context",
        "gim.request",
        "gim.attribution",
        "gim.estimate",
        "gim.plan",
        "gim.evaluation.run",
        "gim.circuits.run",
        "gim_kernels.attention",
        "gim_kernels.norm",
    ],
)
def test_docstring_examples_run(name: str) -> None:
    outcome = doctest.testmod(importlib.import_module(name), raise_on_error=False)
    assert outcome.failed == 0
    if name in ("gim.context", "gim.request", "gim.estimate", "gim.plan", "gim.evaluation.run"):
        assert outcome.attempted > 0


def test_every_public_function_documents_itself() -> None:
    import gim
    import gim_kernels

    for module in (gim_kernels, gim):
        for name in module.__all__:
            thing = getattr(module, name)
            if callable(thing) and name not in ("AppliedReport", "EstimateError", "UnsupportedModelError"):
                doc = thing.__doc__ or ""
                assert "Args:" in doc, f"{module.__name__}.{name}"
    for name in gim_kernels.__all__:
        doc = getattr(gim_kernels, name).__doc__ or ""
        assert all(part in doc for part in ("Args:", "Returns:", "Raises:", "Source:")), name
