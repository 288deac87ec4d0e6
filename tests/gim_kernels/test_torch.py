"""The operators under torch's own machinery: transforms, compiling, exporting, checkpoints, checks of the library."""

from __future__ import annotations

import importlib
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import gim_kernels
from gim_kernels import engines, reference, types
from gim_kernels.blockwise import backward
from tests.first import first

ROOT = Path(__file__).parents[2]
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
try:
    from gim_kernels.triton import device, tiles
except ModuleNotFoundError:  # there is no triton for this system
    ENGINES = ["blockwise"]
else:
    ENGINES = ["blockwise", "triton"] if ON_GPU or device.interpreted() else ["blockwise"]

Inputs = dict[str, torch.Tensor]
Operator = tuple[Callable[..., torch.Tensor], Inputs]


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    key_range = torch.tensor([[0, 9], [2, 7]], dtype=torch.int32, device=query.device)
    return gim_kernels.attention(
        query, key, value, sinks=sinks, causal=True, window=5, softcap=3.0, key_range=key_range,
        softmax_backward="temperature", grad_scale=(0.25, 0.25, 0.5),
    )  # fmt: skip


#: Every public operator as a function of its differentiable inputs, of which each one has a gradient.
OPERATORS: dict[str, Operator] = {
    "attention": (
        attend,
        {
            "query": numbers(2, 4, 7, 16, seed=0),
            "key": numbers(2, 2, 9, 16, seed=1),
            "value": numbers(2, 2, 9, 16, seed=2),
            "sinks": numbers(4, seed=3),
        },
    ),
    "rms_norm": (
        lambda x, weight: gim_kernels.rms_norm(x, weight, 1e-5, weight_offset=1.0, frozen=True),
        {"x": numbers(3, 24, seed=4), "weight": numbers(24, seed=5)},
    ),
    "layer_norm": (
        lambda x, weight, bias: gim_kernels.layer_norm(x, weight, bias, 1e-5),
        {"x": numbers(3, 24, seed=6), "weight": numbers(24, seed=7), "bias": numbers(24, seed=8)},
    ),
    "gated": (
        lambda gate, up: gim_kernels.gated(gate, up, "silu", grad_scale=(0.5, 0.5), activation_backward="ratio"),
        {"gate": numbers(3, 24, seed=9), "up": numbers(3, 24, seed=10)},
    ),
}
every_operator = pytest.mark.parametrize("name", OPERATORS)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The engine that ``"auto"`` stands for inside the test."""
    chosen: str = request.param
    monkeypatch.setattr(engines, "choose", lambda *_: chosen)
    torch.compiler.reset()  # a function compiled for another engine must not be found again
    return chosen


def differentiate(function: Callable[..., torch.Tensor], inputs: Inputs) -> list[torch.Tensor]:
    """The output and the gradient of every input, for an upstream gradient that tells all entries apart."""
    leaves = [x.detach().clone().requires_grad_(True) for x in inputs.values()]
    out = function(*leaves)
    upstream = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def assert_same(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


# ---- compiling and exporting


@pytest.mark.slow
@every_operator
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_to_one_graph(name: str, backend: str, engine: str) -> None:
    function, inputs = OPERATORS[name]
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    assert_same(differentiate(compiled, inputs), differentiate(function, inputs))


@pytest.mark.slow
@every_operator
def test_compiles_for_any_length(name: str, engine: str) -> None:
    function, inputs = OPERATORS[name]
    row = 2 if name == "attention" else 0

    def halves(count: int) -> Inputs:
        return {key: x.narrow(row, 0, x.shape[row] - count) if x.dim() > 1 else x for key, x in inputs.items()}

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (0, 1):
        assert_same(differentiate(compiled, halves(count)), differentiate(function, halves(count)))


@pytest.mark.parametrize(
    ("name", "strict"),
    first(itertools.product(OPERATORS, (False, True)), lambda name, strict: not strict or name == "attention"),
)
def test_exports(name: str, strict: bool, engine: str) -> None:
    function, inputs = OPERATORS[name]

    class Module(torch.nn.Module):
        def forward(self, *given: torch.Tensor) -> torch.Tensor:
            return function(*given)

    exported = torch.export.export(Module(), tuple(inputs.values()), strict=strict)
    called = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert f"gim_kernels.{name}.default" in called
    assert torch.equal(exported.module()(*inputs.values()), function(*inputs.values()))


# ---- torch.library


def direct_calls(engine: str) -> dict[str, tuple[Any, ...]]:
    """Arguments of every registered operator."""
    query, key, value, sinks = OPERATORS["attention"][1].values()
    key_range = torch.tensor([[0, 9], [2, 7]], dtype=torch.int32, device=DEVICE)
    options = (0.3, True, 5, 3.0, "temperature", 3.0, [0.25, 0.25, 0.5], engine)
    attention = (query, key, value, sinks, key_range, *options)
    ops = torch.ops.gim_kernels
    out, lse = ops.attention(*attention)
    x, weight = OPERATORS["rms_norm"][1].values()
    bias = OPERATORS["layer_norm"][1]["bias"]
    gate, up = OPERATORS["gated"][1].values()
    _, inverse = ops.rms_norm(x, weight, 1e-5, 1.0, True, engine)
    _, mean, inverse_std = ops.layer_norm(x, weight, bias, 1e-5, False, engine)
    activation = ("silu", [0.5, 0.5], "exact", engine)
    return {
        "attention": attention,
        "attention_backward": (out.clone(), *attention, out, lse, [True, True, True, True]),
        "attention_backward, value alone": (out.clone(), *attention, out, lse, [False, False, True, False]),
        "rms_norm": (x, weight, 1e-5, 1.0, True, engine),
        "layer_norm": (x, weight, bias, 1e-5, False, engine),
        "norm_backward": (x.clone(), x, weight, mean, inverse_std, 0.0, False, engine, [True, True, True]),
        "norm_backward, frozen": (x.clone(), None, weight, None, inverse, 1.0, True, engine, [True, False, False]),
        "gated": (gate, up, *activation),
        "gated_backward": (gate.clone(), gate, up, *activation, [True, True]),
        "gated_backward, up alone": (gate.clone(), gate, up, *activation, [False, True]),
    }


@pytest.mark.parametrize(
    "engine", [pytest.param(one, marks=pytest.mark.slow if one == "triton" else []) for one in ENGINES]
)
@pytest.mark.parametrize("name", direct_calls(ENGINES[0]))
def test_every_operator_passes_torchs_own_checks(name: str, engine: str) -> None:
    operator = name.split(",")[0]
    arguments = direct_calls(engine)[name]
    if not operator.endswith("_backward"):  # of which there is no gradient
        arguments = tuple(
            x.clone().requires_grad_(x.is_floating_point()) if isinstance(x, torch.Tensor) else x for x in arguments
        )
    torch.library.opcheck(getattr(torch.ops.gim_kernels, operator).default, arguments)


def test_no_operator_is_forgotten() -> None:
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "gim_kernels::" in name}
    assert registered == {name.split(",")[0] for name in direct_calls(ENGINES[0])}


# ---- autograd


@every_operator
def test_a_checkpoint_gives_the_same_gradients(name: str, engine: str) -> None:
    function, inputs = OPERATORS[name]

    def again(*leaves: torch.Tensor) -> torch.Tensor:
        return checkpoint(function, *leaves, use_reentrant=False)

    assert_same(differentiate(again, inputs), differentiate(function, inputs))


@every_operator
def test_a_graph_that_is_kept_gives_the_same_again(name: str, engine: str) -> None:
    function, inputs = OPERATORS[name]
    leaves = [x.clone().requires_grad_(True) for x in inputs.values()]
    out = function(*leaves).square().sum()
    first = torch.autograd.grad(out, leaves, retain_graph=True)
    assert_same(list(torch.autograd.grad(out, leaves)), list(first))


@every_operator
def test_a_gradient_of_the_gradient_is_refused(name: str, engine: str) -> None:
    function, inputs = OPERATORS[name]
    leaves = [x.clone().requires_grad_(True) for x in inputs.values()]
    (grad, *_) = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(grad.sum(), leaves)


# ---- torch.func


@every_operator
def test_vmap_is_one_call_after_the_other(name: str, engine: str) -> None:
    function, inputs = OPERATORS[name]
    stacked = [torch.stack([x, x + 1, x * 2]) for x in inputs.values()]
    want = torch.stack([function(*(x[i] for x in stacked)) for i in range(3)])
    assert torch.equal(torch.vmap(function)(*stacked), want)


BATCHED: dict[str, Callable[..., tuple[torch.Tensor, ...]]] = {
    "torch.func.vmap": lambda y, inputs, grads: torch.func.vmap(
        lambda grad: torch.autograd.grad(y, inputs, grad, retain_graph=True)
    )(grads),
    "is_grads_batched": lambda y, inputs, grads: torch.autograd.grad(
        y, inputs, grads, retain_graph=True, is_grads_batched=True
    ),
}


@every_operator
@pytest.mark.parametrize(
    ("way", "parameters_too"),
    first(itertools.product(BATCHED, (False, True)), {("torch.func.vmap", True), ("is_grads_batched", False)}),
)
def test_several_gradients_at_once_are_those_one_after_the_other(
    name: str, way: str, parameters_too: bool, engine: str
) -> None:
    function, inputs = OPERATORS[name]
    parameters = ("weight", "bias", "sinks")
    given = {key: x.clone().requires_grad_(parameters_too or key not in parameters) for key, x in inputs.items()}
    wanted = tuple(x for x in given.values() if x.requires_grad)
    y = function(*given.values())
    grads = torch.stack([numbers(*y.shape, seed=seed) for seed in range(3)])
    want = [torch.autograd.grad(y, wanted, grad, retain_graph=True) for grad in grads]
    for mine, theirs in zip(BATCHED[way](y, wanted, grads), zip(*want, strict=True), strict=True):
        torch.testing.assert_close(mine, torch.stack(theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rule", ["exact", "temperature", "constant"])
@pytest.mark.parametrize("temperature", [2.0, 3.0])
def test_several_gradients_share_the_weights_of_attention(
    dtype: torch.dtype, rule: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = [(1, 4, 300, 16), (1, 2, 300, 16), (1, 2, 300, 16)]
    inputs = [numbers(*shape, seed=seed).to(dtype).requires_grad_() for seed, shape in enumerate(shapes)]
    y = gim_kernels.attention(
        *inputs, causal=True, softmax_backward=rule, temperature=temperature, engine="blockwise"
    )  # fmt: skip
    grads = torch.stack([numbers(*y.shape, seed=seed).to(dtype) for seed in range(3)])
    counts: list[int] = []
    weights = backward._weights

    def counted(*given: Any) -> Any:
        counts.append(1)
        return weights(*given)

    monkeypatch.setattr(backward, "_weights", counted)
    want = [torch.autograd.grad(y, inputs, grad, retain_graph=True) for grad in grads]
    alone = len(counts)
    found = BATCHED["torch.func.vmap"](y, inputs, grads)
    assert alone == 3 * (len(counts) - alone)
    for mine, theirs in zip(found, zip(*want, strict=True), strict=True):
        assert torch.equal(mine, torch.stack(theirs))


@every_operator
def test_derivatives_that_would_be_wrong_are_refused(name: str, engine: str) -> None:
    function, inputs = OPERATORS[name]
    values = tuple(inputs.values())

    def total(*given: torch.Tensor) -> torch.Tensor:
        return function(*given).sum()

    stacked = tuple(x[None] for x in values)
    for transformed in (
        lambda: torch.func.grad(total)(*values),
        lambda: torch.func.vjp(total, *values),
        lambda: torch.func.vmap(torch.func.grad(total))(*stacked),
        lambda: torch.func.grad(lambda *given: torch.func.vmap(total)(*given).sum())(*stacked),
        lambda: torch.func.hessian(total)(*values),
    ):
        with pytest.raises(RuntimeError, match=rf"gim_kernels\.{name} has a backward of its own, which .*cannot use"):
            transformed()
    with pytest.raises(RuntimeError, match=rf"gim_kernels\.{name} .*forward-mode.* or gim_kernels\.reference\.{name}"):
        torch.func.jvp(total, values, values)
    with forward_ad.dual_level():
        for index, x in enumerate(values):  # a tangent on any one input
            given = [*values[:index], forward_ad.make_dual(x, x), *values[index + 1 :]]
            with pytest.raises(RuntimeError, match=f"{name} .*forward-mode"):
                total(*given)


def test_the_reference_works_under_torch_func() -> None:
    query, key, value, _ = OPERATORS["attention"][1].values()

    def total(q: torch.Tensor) -> torch.Tensor:
        return reference.attention(q, key, value, causal=True, softmax_backward="temperature").square().sum()

    leaf = query.clone().requires_grad_(True)
    (want,) = torch.autograd.grad(total(leaf), leaf)
    assert torch.equal(torch.func.grad(total)(query), want)


# ---- launches


@pytest.mark.skipif("triton" not in ENGINES, reason="needs triton")
@every_operator
def test_a_launcher_never_looks_at_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without values go through every launcher: it reads none, and sizes nothing by one (CUDA graphs)."""
    launched: list[tuple[int, dict[str, Any]]] = []

    def record(self: Any, programs: int, **arguments: Any) -> None:
        launched.append((programs, arguments))

    monkeypatch.setattr(tiles.Variant, "launch", record)
    monkeypatch.setattr(device, "interpreted", lambda: True)
    functions = importlib.import_module("gim_kernels.triton")  # below the operators, which have fake implementations
    if name == "attention":
        query, key, value, sinks = (x.to("meta") for x in OPERATORS[name][1].values())
        key_range = torch.empty(2, 2, dtype=torch.int32, device="meta")
        for options in (types.Options(0.3, True), types.Options(-0.3, True, 5, None), types.Options(1.0)):
            out, lse = functions.attention_forward(query, key, value, sinks, key_range, options)
            for rule in ("exact", "temperature", "constant"):
                functions.attention_backward(
                    out, query, key, value, sinks, key_range, out, lse, options, softmax_backward=rule,
                    temperature=2.0, grad_scale=(1.0, 1.0, 1.0), needs=(True, True, True, True),
                )  # fmt: skip
    elif name == "gated":
        gate, up = (x.to("meta") for x in OPERATORS[name][1].values())
        y = functions.gated_forward(gate, up, "silu")
        functions.gated_backward(
            y, gate, up, "silu", grad_scale=(0.5, 0.5), activation_backward="exact", needs=(True, True)
        )
    else:
        x, weight = (OPERATORS["rms_norm"][1][part].to("meta") for part in ("x", "weight"))
        if name == "rms_norm":
            (y, inverse), mean = functions.rms_norm_forward(x, weight, 1e-5, 1.0), None
        else:
            y, mean, inverse = functions.layer_norm_forward(x, weight, weight, 1e-5)
        for frozen in (False, True):
            functions.norm_backward(
                y, x, weight, mean, inverse, 0.0, frozen=frozen, needs=(True, True, name == "layer_norm")
            )
    assert len(launched) >= 2
    for programs, arguments in launched:
        assert isinstance(programs, int)
        assert all(x.is_meta for x in arguments.values() if isinstance(x, torch.Tensor))


# ---- without a GPU, without triton


def test_auto_is_triton_on_a_gpu_and_nothing_else() -> None:
    with torch._subclasses.FakeTensorMode():  # a tensor on a GPU, without a GPU
        on_gpu, on_cpu = torch.empty(4, device="cuda"), torch.empty(4)
    assert engines.choose("auto", on_gpu) == "triton"
    assert engines.choose("auto", on_cpu) == engines.choose("auto", torch.empty(4)) == "blockwise"
    for named in ("triton", "composed", "blockwise", "reference"):  # what is asked for by name stays
        assert engines.choose(named, on_gpu) == engines.choose(named, on_cpu) == named


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_importing_starts_neither_cuda_nor_triton() -> None:
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import gim_kernels, gim\n"
        "mine = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        "print(torch.cuda.is_initialized(), any(m.startswith('gim_kernels.triton') for m in sys.modules))\n"
    )
    assert run_python(code) == "False False"


@pytest.mark.slow
def test_without_triton_the_other_engines_run() -> None:
    code = """
import importlib.abc, importlib.util, sys

class Nothing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

original = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else original(name, package)
sys.meta_path.insert(0, Nothing())
import torch, gim, gim_kernels
assert "triton" not in sys.modules
x = torch.ones(1, 2, 3, 8, requires_grad=True)
for engine in ("auto", "blockwise", "reference"):
    gim_kernels.attention(x, x, x, engine=engine, softmax_backward="temperature").sum().backward()
w = torch.ones(8)
norms = gim_kernels.rms_norm(x, w, 1e-5) + gim_kernels.layer_norm(x, w, w, 1e-5)
(norms + gim_kernels.gated(x, x, "silu")).sum().backward()
try:
    gim_kernels.attention(x, x, x, engine="triton")
except RuntimeError as error:
    print(error)
"""
    assert run_python(code) == (
        'engine="triton" needs the package triton, which is not installed here (it exists for Linux): '
        'choose engine="blockwise" or "reference"'
    )
