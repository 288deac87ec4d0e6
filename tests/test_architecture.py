"""What may import what, and what the packages may not do."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "gim_kernels").rglob("*.py"), *(ROOT / "gim").rglob("*.py")])


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


#: Functions that import what a string names.
BY_STRING = ("import_module", "__import__", "find_spec")


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, by a string too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in BY_STRING:
            found |= {str(one.value) for one in node.args[:1] if isinstance(one, ast.Constant)}
    return found


@functools.cache
def every_import() -> dict[str, set[str]]:
    """What each file imports, read when a test asks: every process loads this file."""
    return {module_name(path): imports(path) for path in FILES}


#: What attributes and explains, and how memory is spent: nothing that finds parts or applies rules knows of it.
ABOVE = (
    "gim.context", "gim.request", "gim.scoring", "gim.cli", "gim.memory", "gim.estimate", "gim.checkpoint",
    "gim.inputs", "gim.tokenwise", "gim.evaluation", "gim.circuits",
)  # fmt: skip
ENGINES = ("triton", "composed", "blockwise", "pointwise", "reference_engine")
#: Who, by the start of its name, may not import whom.
FORBIDDEN: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("gim_kernels", ("gim", "transformers", "tests", "benchmarks")),
    ("gim", ("tests", "benchmarks")),
    ("gim.rules", ("gim", "gim_kernels")),
    ("gim.applied", ("gim", "gim_kernels")),
    ("gim.targets", ("gim", "gim_kernels")),
    ("gim.attribution", (*ABOVE, "gim.intercept", "gim_kernels")),
    ("gim.parts", (*ABOVE, "gim.intercept", "gim_kernels")),
    ("gim.parts.adapters", tuple(f"gim.{one}" for one in (
        "parts.anatomy", "parts.calling", "parts.placement", "rules", "applied",
    ))),
    ("gim.intercept", ABOVE),
    # Whose code runs is asked twice, so that one fault does not blind both handlers and the watch.
    *((f"gim.intercept.{one}", ("gim.intercept.callers",)) for one in ("hooks", "gates", "mode", "session", "frames")),
    # Engines never import one another, nor what chooses among them.
    *(
        (f"gim_kernels.{one}", tuple(f"gim_kernels.{other}" for other in (*ENGINES, "engines") if other != one))
        for one in ENGINES
    ),
    ("gim_kernels.triton", ("gim_kernels.aot",)),
    ("gim_kernels.types", ("gim_kernels",)),
    ("gim_kernels.told", ("gim_kernels",)),
    *((f"gim.{one}", ("gim.cli",)) for one in ("scoring", "memory", "request", "report", "context")),
    # An evaluation asks for attributions and for forwards; how rules get in is none of its business, nor who shows it.
    ("gim.evaluation", (
        "gim.cli", "gim.report", "gim.attribution", "gim.intercept", "gim.context", "gim.memory",
        "gim.scoring", "gim.circuits", "gim_kernels", "typer", "rich",
    )),
    # Circuits run forwards of their own inside a context; they attribute no tokens and show nothing.
    ("gim.circuits", ("gim.cli", "gim.report", "gim.attribution", "gim.request", "typer", "rich")),
    *((f"gim.circuits.{one}", ("gim.circuits.run", "gim.circuits.result", "gim.circuits.export", "gim.circuits.page"))
      for one in (
        "graph", "wiring", "probe", "streams", "scores", "patching", "metrics", "pairs", "curve", "paths", "drawing",
    )),
    ("gim.evaluation.tasks", tuple(f"gim.{one}" for one in ("request", "parts", "rules", "inputs"))),
    *((f"gim.evaluation.{one}", ("gim.evaluation.run", "gim.evaluation.result", "gim.request")) for one in (
        "perturbation", "measures", "statistics", "store", "extras", "case", "captum_methods", "data",
    )),
    *((f"gim.{one}", ("gim.evaluation", "gim.circuits")) for one in (
        "applied", "attribution", "checkpoint", "context", "demo", "estimate", "files", "inputs", "ledger",
        "loading", "memory", "nonfinite", "offload", "plan", "prompts", "report", "request", "rules", "saved",
        "scoring", "segments", "targets", "tokenwise",
    )),
    # Commands share what stands beside them, which knows none of them.
    *((f"gim.cli.{one}", tuple(f"gim.cli.{other}" for other in (
        "bench", "check", "circuit", "demo", "evaluate", "explain", "plan", "show", "tasks",
    ))) for one in ("options", "errors", "models", "attributions", "progress")),
)  # fmt: skip


#: The watch shares nothing with what applies rules but what tells it: these know one another, and what findings are of.
WATCH = tuple(f"gim.intercept.{one}" for one in ("callers", "operators", "places", "sites", "values", "watch"))


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def wrong_arrows(imported: dict[str, set[str]]) -> set[str]:
    """Every arrow that may not be, as ``importer -> imported``."""
    return {
        f"{name} -> {one}"
        for name, ones in imported.items()
        for who, whom in FORBIDDEN
        if inside(name, who)
        for one in ones
        if any(inside(one, package) for package in whom)
    } | {
        f"{name} -> {one}"
        for name in WATCH
        for one in imported[name]
        if inside(one, "gim") and not any(inside(one, other) for other in (*WATCH, "gim.applied"))
    }


def test_no_arrow_points_where_it_may_not() -> None:
    assert not wrong_arrows(every_import())


@pytest.mark.parametrize(
    ("who", "code"),
    [
        ("gim_kernels.norm", "import transformers"),
        ("gim_kernels.engines", "from gim.rules import Rules"),
        ("gim_kernels.triton.launch", "def late():\n    from gim_kernels.blockwise import forward_workspace"),
        ("gim_kernels.pointwise", "import importlib\nimportlib.import_module('gim_kernels.triton.norm')"),
        ("gim_kernels.triton.tiles", "from gim_kernels.aot.variants import shipped"),
        ("gim_kernels.composed", "from gim_kernels.blockwise.tiles import blocks"),
        ("gim_kernels.reference_engine", "from gim_kernels import engines"),
        ("gim.rules", "from gim_kernels import engines"),
        ("gim.parts.anatomy", "from gim.intercept.session import Session"),
        ("gim.parts.adapters.hugging_face", "def late():\n    from gim.parts import anatomy"),
        ("gim.intercept.watch", "from gim.intercept.flow import origin"),
        ("gim.intercept.places", "def late():\n    from gim.intercept.hooks import hooked"),
        ("gim.intercept.products", "from importlib import import_module\nimport_module('gim.scoring')"),
        ("gim.scoring", "import gim.cli"),
        ("gim.context", "__import__('tests.eager')"),
        ("gim.attribution", "from gim import request"),
        ("gim.request", "def late():\n    from gim.evaluation import measures"),
        ("gim.evaluation.tasks", "def late():\n    from gim.circuits import Pair"),
        ("gim.circuits.scores", "from gim.circuits.run import attribute"),
        ("gim.evaluation.measures", "from gim.intercept.session import Session"),
        ("gim.cli.models", "from gim.cli.explain import command"),
    ],
)
def test_a_planted_arrow_is_seen(tmp_path: Path, who: str, code: str) -> None:
    path = tmp_path / "planted.py"
    path.write_text(code)
    assert wrong_arrows({**every_import(), who: every_import()[who] | imports(path)})


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


def sets_forward(path: Path) -> bool:
    """Whether a file gives an instance another ``forward``."""
    for node in ast.walk(ast.parse(path.read_text())):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if isinstance(target, ast.Attribute) and target.attr == "forward":
                return True
            if isinstance(target, ast.Subscript) and ast.unparse(target.slice) == "'forward'":
                return True
        if isinstance(node, ast.Call) and ast.unparse(node.func).strip("_").endswith("setattr"):
            named = [ast.unparse(one) for one in node.args[1:2]]
            if named == ["'forward'"]:
                return True
    return False


def test_a_forward_is_set_in_one_place() -> None:
    setting = {path.relative_to(ROOT).as_posix() for path in (ROOT / "gim").rglob("*.py") if sets_forward(path)}
    # The second gives one to a copy of its own.
    assert setting == {"gim/intercept/session.py", "gim/tokenwise.py"}


@pytest.mark.parametrize(
    "code", ["m.forward = f", "m.__dict__['forward'] = f", "setattr(m, 'forward', f)", "m.forward: object = f"]
)
def test_a_forward_that_is_set_elsewhere_is_seen(tmp_path: Path, code: str) -> None:
    path = tmp_path / "planted.py"
    path.write_text(code)
    assert sets_forward(path)


def test_no_file_reads_the_environment_or_prints() -> None:
    for path in FILES:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("environ", "getenv"), f"{path} reads the environment"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", f"{path} prints"


#: What torch makes where ``torch.set_default_device`` says, which is the caller's and need not be the model's.
MAKERS = frozenset(
    f"torch.{name}"
    for name in ("arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn",
                 "randperm", "tensor", "zeros")
)  # fmt: skip


def test_every_tensor_is_made_on_a_device_that_is_named() -> None:
    for path in [*(ROOT / "gim").rglob("*.py"), *(ROOT / "gim_kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in MAKERS:
                named = any(one.arg == "device" for one in node.keywords)
                assert named, f"{path}:{node.lineno} makes a tensor on torch's default device"


def test_importing_gim_loads_no_optional_package() -> None:
    names = ("matplotlib", "typer", "pytest", "captum")
    code = f"import sys, gim; print([m for m in {names} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = out.stdout.strip()
    # torch itself may load jinja2 and triton; what matters is that gim's own imports do not.
    assert loaded == "[]"
