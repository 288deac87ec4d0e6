"""What is the attention kernels' own: head sizes, tiles, launches, offsets, and what they refuse."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import gim_kernels
from gim_kernels import reference
from gim_kernels.budget import relative_error
from tests.gim_kernels import test_attention as contract
from tests.gim_kernels.test_attention import AT_ONCE, LATER, ON_GPU, PAPERS_RULES, differentiate
from tests.oracle import assert_within_budget

pytest.importorskip("triton")

from triton.tools.tensor_descriptor import TensorDescriptor

from gim_kernels.triton import attention_backward, attention_forward, device, launch, tiles
from gim_kernels.triton.attention_grad_key_value import grad_key_value_variant
from gim_kernels.triton.attention_grad_query import grad_query_variant
from gim_kernels.triton.attention_out import forward_variant
from gim_kernels.triton.launch import described
from gim_kernels.triton.tiles import Tile
from gim_kernels.types import Options

DEVICE = contract.device_of("triton")
TWO_BYTES = [pytest.param(torch.float16, id="fp16"), pytest.param(torch.bfloat16, id="bf16", marks=AT_ONCE)]

pytestmark = [
    # exp2 may overflow where a softcap saturates or a key is masked: NumPy, which the interpreter is, says so.
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]
nan_filled = pytest.mark.usefixtures("fresh_memory_is_nan")


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    return contract.inputs("triton", *shape, dtype=dtype)


def run(tensors: tuple[torch.Tensor, ...], **options: Any) -> dict[str, torch.Tensor]:
    return contract.run("triton", tensors, **options)


# ---- head sizes and tiles


def head_sizes() -> Iterator[Any]:
    """Every size in every dtype; at once some in float32, and two in bfloat16, which models run in."""
    for size in (16, 20, 33, 64, 80, 96, 128, 192, 256):
        yield pytest.param(size, torch.float32, id=f"{size}-fp32", marks=[] if size in (33, 256) else LATER)
        yield pytest.param(size, torch.float16, id=f"{size}-fp16", marks=pytest.mark.slow)
        yield pytest.param(size, torch.bfloat16, id=f"{size}-bf16", marks=AT_ONCE if size in (80, 128) else LATER)


@nan_filled
@pytest.mark.parametrize(("size", "dtype"), list(head_sizes()))
def test_head_sizes(size: int, dtype: torch.dtype) -> None:
    tensors = inputs(1, 2, 1, 40, 40, size, dtype=dtype)
    contract.hold("triton", tensors, causal=True, softmax_backward="temperature")


@nan_filled
@pytest.mark.parametrize(
    ("tile", "temperature"),
    [
        (Tile(16, 64, 4, 2), 2.0),
        pytest.param(Tile(64, 16, 4, 2), 3.0, marks=pytest.mark.slow),
        pytest.param(Tile(32, 32, 4, 2), 1.0, marks=pytest.mark.slow),
        pytest.param(Tile(32, 32, 4, 2, split=True), 2.0, marks=pytest.mark.slow),
        (Tile(128, 64, 4, 1, split=True), 0.4),
    ],
    ids=["16x64-square", "64x16-warm", "32x32-exact", "32x32-split-square", "128x64-split-sharp"],
)
def test_any_tile_gives_the_same(tile: Tile, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def only(work: str, *_: Any) -> Tile:
        return dataclasses.replace(tile, split=tile.split and work in ("grad_query", "grad_key_value"))

    variants = (forward_variant, grad_query_variant, grad_key_value_variant)
    monkeypatch.setattr(tiles, "attention_tile", only)
    for variant in variants:
        variant.cache_clear()
    key_range = torch.tensor([[10, 90]], dtype=torch.int32, device=DEVICE)
    try:
        contract.hold(
            "triton",
            inputs(1, 2, 1, 70, 100, 16),
            causal=True,
            window=50,
            softcap=2.0,
            sinks=torch.tensor([0.3, -1.0], device=DEVICE),
            key_range=key_range,
            softmax_backward="temperature",
            temperature=temperature,
        )
    finally:
        for variant in variants:
            variant.cache_clear()


# ---- numerics


def grad_query_directly(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grad_out: torch.Tensor) -> Any:
    """``scale P_T (dP - delta) K`` at T = 2 with delta known beforehand, rounded where a kernel rounds."""
    q, k, v, g = (x.float() for x in (query, key, value, grad_out))
    scale = 1 / math.sqrt(q.shape[-1])
    p_t = torch.softmax(q @ k.mT * scale / 2.0, -1)
    grad_p = g @ v.mT
    grad_s = p_t * (grad_p - (p_t * grad_p).sum(-1, keepdim=True))
    return scale * (grad_s.to(query.dtype).float() @ k)


@pytest.mark.parametrize("dtype", TWO_BYTES)
@pytest.mark.parametrize("mean", [0.0, 5.0, 10.0])
@pytest.mark.slow
def test_a_mean_of_the_values_costs_no_accuracy(mean: float, dtype: torch.dtype) -> None:
    query, key, value, grad_out = inputs(1, 2, 2, 128, 128, 32, dtype=torch.float64)
    tensors = tuple(x.to(dtype) for x in (query, key, value + mean, grad_out))
    truth = differentiate(reference.attention, *(x.double() for x in tensors), softmax_backward="temperature")
    ours = relative_error(run(tensors, softmax_backward="temperature")["query"], truth["query"])
    direct = relative_error(grad_query_directly(*tensors).to(dtype), truth["query"])
    assert ours <= 1.5 * direct


@nan_filled
@pytest.mark.parametrize(("rule", "temperature"), PAPERS_RULES)
def test_only_the_gradients_asked_for_are_computed(
    rule: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[str] = []
    original = tiles.Variant.launch

    def spy(self: tiles.Variant, programs: int, **arguments: Any) -> None:
        launched.append(self.kernel.__name__)
        for name, value in arguments.items():  # an argument is None exactly where the variant says so
            assert (value is None) == (name in self.constants), name
        original(self, programs, **arguments)

    query, key, value, grad_out = inputs(1, 2, 1, 20, 20, 16)
    tensors = {"query": query, "key": key, "value": value, "sinks": torch.tensor([0.5, -0.5], device=DEVICE)}
    options: dict[str, Any] = {"softmax_backward": rule, "temperature": temperature, "engine": "triton"}
    monkeypatch.setattr(tiles.Variant, "launch", spy)
    complete: dict[str, torch.Tensor] = {}
    every = list(tensors)
    for names in (every, *([name] for name in every), ["query", "key"], ["key", "value"], ["query", "sinks"]):
        leaves = {name: x.detach().requires_grad_(name in names) for name, x in tensors.items()}
        out = gim_kernels.attention(**leaves, causal=True, **options)
        launched.clear()
        grads = torch.autograd.grad(out, [leaves[name] for name in names], grad_out)
        complete = complete or dict(zip(names, grads, strict=True))
        for name, grad in zip(names, grads, strict=True):
            assert_within_budget(grad, complete[name].double(), complete[name], f"{name} of {names}")
        through_scores = rule != "constant" and names != ["value"]
        want_launches = ["grad_query_kernel"] * through_scores
        key_kernel = "value" in names or (rule != "constant" and "key" in names)
        assert launched == want_launches + ["grad_key_value_kernel"] * key_kernel, names


# ---- parts of a group


@nan_filled
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("members", [2, 1])
@pytest.mark.parametrize(("rule", "temperature"), PAPERS_RULES)
def test_the_query_heads_of_a_group_in_parts(
    members: int, rule: str, temperature: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    contract.in_parts(monkeypatch, members)
    contract.hold(
        "triton",
        inputs(2, 4, 1, 34, 40, 16, dtype=dtype),
        causal=True,
        window=30,
        softcap=2.0,
        sinks=torch.linspace(-1, 1, 4, device=DEVICE, dtype=dtype),
        key_range=torch.tensor([[5, 36], [0, 40]], dtype=torch.int32, device=DEVICE),
        grad_scale=(0.25, 0.3, 0.5),
        softmax_backward=rule,
        temperature=temperature,
    )


@nan_filled
@pytest.mark.parametrize("size", [16, pytest.param(160, marks=pytest.mark.slow)])
def test_parts_are_added_one_after_another(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum of what each query head gives alone, to the last bit: whatever ran first, and wherever the sum lies."""
    query, key, value, grad_out = inputs(1, 2, 1, 20, 36, size) if size == 16 else inputs(1, 6, 2, 20, 36, size)
    group = query.shape[1] // key.shape[1]
    contract.in_parts(monkeypatch, 1)
    options: dict[str, Any] = {"causal": True, "softmax_backward": "temperature", "grad_scale": (0.25, 0.3, 0.7)}
    got = run((query, key, value, grad_out), **options)
    for kv_head in range(key.shape[1]):
        shared = slice(kv_head, kv_head + 1)
        for name in ("key", "value"):
            want = torch.zeros_like(key[:, shared])
            for head in range(group * kv_head, group * kv_head + group):
                one = slice(head, head + 1)
                want = want + run((query[:, one], key[:, shared], value[:, shared], grad_out[:, one]), **options)[name]
            assert torch.equal(got[name][:, shared], want), name
    packed = key.contiguous(), value.mT.contiguous().mT
    for name, x in run((query, *packed, grad_out), **options).items():
        assert torch.equal(x, got[name]), name


def test_few_programs_share_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without help from the test: eight query heads for the only key tile."""
    launched: list[dict[str, Any]] = []
    original = tiles.Variant.launch

    def spy(self: tiles.Variant, programs: int, **arguments: Any) -> None:
        launched.append({"kernel": self.kernel.__name__, "programs": programs, **arguments})
        original(self, programs, **arguments)

    monkeypatch.setattr(tiles.Variant, "launch", spy)
    run(inputs(1, 8, 1, 70, 20, 16), softmax_backward="temperature")
    fold = "fold_parts_kernel"
    assert [launch["kernel"] for launch in launched][-3:] == ["grad_key_value_kernel", fold, fold]
    last, architecture = launched[-3], tiles.architecture_of(torch.empty(0, device=DEVICE))
    block_s = tiles.attention_tile("grad_key_value", architecture, 16, torch.float32).block_s
    parts = 8 // last["members"]
    assert parts > 1 and last["programs"] == -(-20 // block_s) * parts
    assert last["partial_ptr"].dtype == torch.float32 and last["partial_ptr"].shape == (2, parts, 1, 1, 20, 16)


# ---- descriptors and pointers


@nan_filled
@pytest.mark.parametrize(
    ("size", "options"),
    [
        (16, {"causal": True, "softmax_backward": "temperature"}),
        pytest.param(24, {"causal": True, "window": 20, "softmax_backward": "exact"}, marks=pytest.mark.slow),
        pytest.param(80, {"softmax_backward": "temperature", "temperature": 3.0}, marks=pytest.mark.slow),
        pytest.param(160, {"softmax_backward": "temperature", "temperature": 0.5}, marks=pytest.mark.slow),
        pytest.param(64, {"window": 20, "softmax_backward": "constant"}, marks=pytest.mark.slow),
    ],
    ids=["causal-square", "window-exact", "full-warm", "split-sharp", "constant"],
)
def test_descriptors_give_what_pointers_give(
    size: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = inputs(1, 2, 1, 40, 70, size, dtype=torch.float16)
    read: set[type] = set()
    original = tiles.Variant.launch

    def spy(self: tiles.Variant, programs: int, **arguments: Any) -> None:
        names = ("query_ptr", "key_ptr", "value_ptr", "grad_out_ptr")
        read.update(type(arguments[name]) for name in names if name in arguments)
        original(self, programs, **arguments)

    monkeypatch.setattr(tiles.Variant, "launch", spy)
    by_descriptor = run(tensors, **options)
    if tiles.architecture_of(tensors[0]) in tiles.DESCRIBED:
        assert read == {TensorDescriptor}
    read.clear()
    monkeypatch.setattr(tiles, "DESCRIBED", ())
    for name, x in run(tensors, **options).items():
        if ON_GPU:  # where the tiles are others
            assert relative_error(x, by_descriptor[name]) < 1e-2, name
        else:
            assert torch.equal(x, by_descriptor[name]), name
    assert read == {torch.Tensor}


def test_what_is_read_through_descriptors() -> None:
    x = torch.zeros(2, 3, 8, 32, dtype=torch.float16)
    flat = torch.zeros(4096, dtype=torch.float16)
    assert x.data_ptr() % 16 == flat.data_ptr() % 16 == 0
    yes = {
        "contiguous": x,
        "heads after tokens": x.transpose(1, 2),
        "a slice of each row": x[..., 8:24],
        "bfloat16": x.bfloat16(),
        "one row, whose stride is any": flat.as_strided((1, 3, 1, 32), (7, 64, 5, 1)),
        "expanded to one": x[:1, :1].expand(1, 1, 8, 32),
    }
    no = {
        "float32": x.float(),
        "an address between": x[..., 1:17],
        "rows of 20": torch.zeros(2, 3, 8, 20, dtype=torch.float16),
        "a stride of 36": flat.as_strided((2, 3, 8, 32), (864, 288, 36, 1)),
        "a stride of 0": x[:, :1].expand(2, 3, 8, 32),
        "columns apart": x.mT,
        "nothing": x[:, :, :0],
    }
    for name, tensor in yes.items():
        assert described("cuda:90", None, None, x, tensor), name
        descriptor = launch._box(tensor, 64, 32).around(tensor)
        assert all(stride > 0 and stride % 8 == 0 for stride in descriptor.strides[:-1]), name
        assert descriptor.shape == list(tensor.shape) and descriptor.block_shape == [1, 1, 64, 32]
    for name, tensor in no.items():
        assert not described("cuda:90", None, None, x, tensor), name
    for architecture in ("cuda:80", "cuda:89", "cuda:100", "hip:gfx942"):
        assert not described(architecture, None, None, x)
    assert not described("cuda:90", 30.0, None, x)
    assert not described("cuda:90", None, torch.tensor([[0, 8]] * 2, dtype=torch.int32), x)


# ---- memory


def test_offsets_past_two_to_the_31st() -> None:
    step = 2**31 + 8
    memory = torch.empty(step + 64 * 1024, dtype=torch.float16, device=DEVICE)  # only what is written costs memory

    def far(x: torch.Tensor, start: int) -> torch.Tensor:
        view = memory.as_strided(x.shape, (step, *x.stride()[1:]), start)
        view.copy_(x)
        return view

    near = inputs(2, 2, 1, 20, 20, 16, dtype=torch.float16)
    spread = tuple(far(x, 8192 * i) for i, x in enumerate(near))
    want = run(near, causal=True, softmax_backward="temperature")
    for name, x in run(spread, causal=True, softmax_backward="temperature").items():
        assert torch.equal(x, want[name]), name


def test_results_past_two_to_the_31st(monkeypatch: pytest.MonkeyPatch) -> None:
    step = 2**31 + 8
    memory = torch.empty(step + 64 * 1024, dtype=torch.float16, device=DEVICE)
    query, key, value, grad_out = inputs(2, 2, 1, 20, 20, 16, dtype=torch.float16)
    options = Options(0.25, causal=True)
    rule: dict[str, Any] = {"softmax_backward": "temperature", "temperature": 2.0, "grad_scale": (1.0, 1.0, 1.0)}
    rule["needs"] = (True, True, True, False)

    def both_ways() -> tuple[torch.Tensor, ...]:
        out, lse = attention_forward(query, key, value, None, None, options)
        grads = attention_backward(grad_out, query, key, value, None, None, out, lse, options, **rule)
        return (out, *(x for x in grads if x is not None))

    want = both_ways()
    taken: list[torch.Tensor] = []

    def place(_: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
        taken.append(memory.as_strided(shape, strides, 8192 * len(taken)))
        return taken[-1]

    def far(like: torch.Tensor, shape: tuple[int, ...] = (), **named: Any) -> torch.Tensor:
        """The rows of the batch lie 2^31 elements apart in what the launchers allocate for results."""
        shape = shape or tuple(like.shape)
        dense = torch.empty(shape, device="meta").stride()
        if len(shape) < 4:  # numbers of rows
            return torch.zeros(shape, dtype=named.get("dtype", like.dtype), device=like.device)
        if named.get("device"):  # nothing is written there
            return memory.as_strided(shape, (step, *dense[1:]), 0)
        return place(like, shape, (step, *dense[1:]))

    monkeypatch.setattr(torch, "empty_like", far)
    monkeypatch.setattr(torch.Tensor, "new_empty", far)
    monkeypatch.setattr(torch.Tensor, "new_empty_strided", place)
    got = both_ways()
    assert len(taken) == 4 and all(x.stride(0) == step for x in got)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_rows_far_apart_are_copied_first() -> None:
    near = inputs(1, 1, 1, 20, 20, 16, dtype=torch.float16)
    memory = torch.zeros(20 * 2**23, dtype=torch.float16, device=DEVICE)
    query = memory.as_strided(near[0].shape, (0, 0, 2**23, 1), 0)
    query.copy_(near[0])
    want = run(near, causal=True)
    for name, x in run((query, *near[1:]), causal=True).items():
        assert torch.equal(x, want[name]), name


def test_results_lie_in_memory_as_the_compiler_was_told() -> None:
    query, key, value, grad_out = inputs(2, 4, 2, 20, 30, 16)
    common = (query, key, value, None, None, 0.25, True, None, None, "temperature", 2.0, [1.0, 1.0, 1.0], "triton")
    real = torch.ops.gim_kernels.attention(*common)
    real_grads = torch.ops.gim_kernels.attention_backward(grad_out, *common, *real, [True, True, True, False])
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake_common = tuple(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in common)
        fake = torch.ops.gim_kernels.attention(*fake_common)
        fake_grads = torch.ops.gim_kernels.attention_backward(
            mode.from_tensor(grad_out), *fake_common, *fake, [True, True, True, False]
        )
    for a, b in zip((*real, *real_grads), (*fake, *fake_grads), strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_a_cuda_graph_replays_forward_and_backward() -> None:
    tensors = inputs(2, 4, 2, 100, 100, 64, dtype=torch.bfloat16)
    key_range = torch.tensor([[0, 100], [10, 90]], dtype=torch.int32, device=DEVICE)
    options: dict[str, Any] = {"causal": True, "key_range": key_range, "softmax_backward": "temperature"}
    want = run(tensors, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(tensors, **options)
    for x in got.values():
        x.zero_()
    graph.replay()
    for name, x in got.items():
        assert torch.equal(x, want[name]), name


# ---- bad input

GOOD = inputs(1, 2, 1, 6, 6, 8)


def test_float64_is_refused_by_name() -> None:
    with pytest.raises(
        TypeError, match=r"query must be float32, float16 or bfloat16 for the triton engine.*float64.*engine="
    ):
        gim_kernels.attention(*(x.double() for x in GOOD[:3]), engine="triton")


def test_heads_too_wide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"query must have a head size of at most 256 for the triton engine, got 257"):
        gim_kernels.attention(*inputs(1, 2, 1, 6, 6, 257)[:3], engine="triton")


def test_too_many_rows_are_refused() -> None:
    huge = torch.empty(1, device=DEVICE, dtype=torch.float16).expand(1, 1, 2**30, 16)
    with pytest.raises(ValueError, match=r"query is too large for the triton engine: \(1, 1, 1073741824, 16\)"):
        attention_forward(huge, huge, huge, None, None, Options(1.0))


def test_cpu_tensors_outside_the_interpreter_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "interpreted", lambda: False)
    with pytest.raises(RuntimeError, match=r'engine="triton" needs tensors on a GPU, got query on cpu: choose engine='):
        gim_kernels.attention(*(x.cpu() for x in GOOD[:3]), engine="triton")


def test_a_rule_that_does_not_fit_the_key_kernel_is_refused() -> None:
    for rule, grad_key in (("constant", True), ("exact", False)):
        with pytest.raises(ValueError, match=f"rule {rule!r} does not fit grad_key={grad_key}"):
            grad_key_value_variant("cuda:90", torch.float16, 64, rule, True, grad_key=grad_key)
