"""What may import what, and what the packages may not do."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "gim_kernels").rglob("*.py"), *(ROOT / "gim").rglob("*.py")])


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


IMPORTS = {module_name(path): imports(path) for path in FILES}


def reaches(name: str, packages: tuple[str, ...]) -> set[str]:
    return {one for one in IMPORTS[name] if any(one == p or one.startswith(f"{p}.") for p in packages)}


@pytest.mark.parametrize("name", [name for name in IMPORTS if name.split(".")[0] == "gim_kernels"])
def test_the_mechanism_knows_neither_policy_nor_models(name: str) -> None:
    assert not reaches(name, ("gim", "transformers", "tests", "benchmarks"))


@pytest.mark.parametrize("name", [name for name in IMPORTS if name.split(".")[0] == "gim"])
def test_packages_never_import_tests_or_benchmarks(name: str) -> None:
    assert not reaches(name, ("tests", "benchmarks"))


def test_the_engines_do_not_know_each_other() -> None:
    engines = ("gim_kernels.blockwise", "gim_kernels.pointwise", "gim_kernels.triton")
    for name in IMPORTS:
        for own in engines:
            if name == own or name.startswith(f"{own}."):
                others = tuple(other for other in engines if other != own)
                # What every engine is called with is no engine: it may be shared.
                found = {
                    one for one in reaches(name, others) if not one.endswith((".Options", "gim_kernels.blockwise"))
                }
                assert not found, f"{name} imports {found}"


def test_leaves_of_the_policy_import_nothing_of_ours_above_themselves() -> None:
    assert not reaches("gim.rules", ("gim", "gim_kernels"))
    assert not reaches("gim.applied", ("gim", "gim_kernels"))
    assert not reaches("gim.targets", ("gim", "gim_kernels"))
    above = ("gim.context", "gim.explain", "gim.scoring", "gim.cli", "gim.intercept", "gim.memory", "gim_kernels")
    assert not reaches("gim.attribution", above)
    for name in IMPORTS:
        if name.startswith("gim.parts"):
            assert not reaches(name, (*above, "gim.checkpoint", "gim.inputs", "gim.tokenwise"))
        if name.startswith("gim.parts.adapters"):
            # Of ours, an adapter knows other adapters alone.
            ours = {one for one in reaches(name, ("gim",)) if not one.startswith("gim.parts")}
            upper = ("gim.parts.anatomy", "gim.parts.calling", "gim.parts.placement")
            assert not ours and not reaches(name, upper)
        if name.startswith("gim.intercept"):
            assert not reaches(name, ("gim.context", "gim.explain", "gim.scoring", "gim.memory", "gim.cli", "tests"))


#: What walks a model or asks it for its embedding; and what tells a front end by a model's class.
WALKS = ("modules", "named_modules", "get_input_embeddings")


def searches(path: Path) -> set[str]:
    """What of a model a file looks for by itself, and how."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr in (*WALKS[1:], "is_one"):
            found.add(node.attr)
        if isinstance(node, ast.FunctionDef) and node.name == "is_one":
            found.add(node.name)
        if not isinstance(node, ast.Call):
            continue
        called, given = node.func, [ast.unparse(argument) for argument in node.args]
        if isinstance(called, ast.Attribute) and called.attr == "modules":
            found.add(called.attr)
        if isinstance(called, ast.Name) and called.id == "getattr":
            found |= {name for name in WALKS if repr(name) in given}
        if isinstance(called, ast.Name) and called.id in ("isinstance", "issubclass") and "PreTrainedModel" in given[1]:
            found.add("PreTrainedModel")
    return found


def test_a_models_parts_are_looked_for_in_one_place() -> None:
    examples = sorted((ROOT / "examples").rglob("*.py"))
    for path in (*(ROOT / "gim").rglob("*.py"), *examples):
        name = path.relative_to(ROOT).as_posix()
        if name.startswith("gim/parts/adapters/"):
            continue
        found = searches(path)
        if name.startswith("gim/parts/"):
            found -= set(WALKS)
        assert not found, f"{name} looks for {sorted(found)}: gim.parts.anatomy has found them"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("for one in model.modules(): pass", {"modules"}),
        ("dict(model.named_modules())", {"named_modules"}),
        ("getattr(model, 'named_modules')()", {"named_modules"}),
        ("walk = model.named_modules", {"named_modules"}),
        ("model.get_input_embeddings().weight", {"get_input_embeddings"}),
        ("getattr(model, 'get_input_embeddings', None)", {"get_input_embeddings"}),
        ("isinstance(model, PreTrainedModel)", {"PreTrainedModel"}),
        ("isinstance(model, (hf.PreTrainedModel, dict))", {"PreTrainedModel"}),
        ("transformer_lens.is_one(model)", {"is_one"}),
        ("def is_one(model): return True", {"is_one"}),
        ("parts.modules.values()", set()),
        ("def explain(model: PreTrainedModel) -> None: pass", set()),
    ],
)
def test_a_search_of_ones_own_is_seen(tmp_path: Path, code: str, found: set[str]) -> None:
    path = tmp_path / "planted.py"
    path.write_text(code)
    assert searches(path) == found


def test_no_file_reads_the_environment_or_prints() -> None:
    for path in FILES:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("environ", "getenv"), f"{path} reads the environment"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", f"{path} prints"


def test_importing_gim_loads_no_optional_package() -> None:
    code = (
        "import sys, gim; print([m for m in ('matplotlib', 'jinja2', 'typer', 'pytest', 'triton') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = out.stdout.strip()
    # torch itself may load jinja2 and triton; what matters is that gim's own imports do not.
    assert "matplotlib" not in loaded and "typer" not in loaded and "pytest" not in loaded
