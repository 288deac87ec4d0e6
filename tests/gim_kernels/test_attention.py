"""The contract of attention(), engine by engine: against formulas written here, and against torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st

import gim_kernels
from gim_kernels import reference
from tests.gim_kernels.attention_terms import terms
from tests.oracle import assert_close64, assert_within_budget, assert_within_terms

ON_GPU = torch.cuda.is_available()
GPU = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")]
#: Of what runs on a GPU where there is one and in triton's interpreter elsewhere: what that gets at once, and what is
#: part of the whole suite alone.
AT_ONCE: Any = pytest.mark.gpu if ON_GPU else []
LATER = pytest.mark.gpu if ON_GPU else pytest.mark.slow
pytestmark = [
    # exp2 may overflow where a softcap saturates or a key is masked: NumPy, which triton's interpreter is, says so.
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]
nan_filled = pytest.mark.usefixtures("fresh_memory_is_nan")

#: Each engine and the dtypes that it is held to. The kernels run in triton's interpreter where there is no GPU.
DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "reference": (torch.float64,),
    "blockwise": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "composed": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.float16, torch.bfloat16),
}
by_engine = pytest.mark.parametrize("engine", DTYPES)
by_fast_engine = pytest.mark.parametrize("engine", ["blockwise", "composed", "triton"])

RULES = [("exact", 2.0), ("temperature", 2.0), ("temperature", 3.3), ("temperature", 0.7), ("constant", 2.0)]
RULE_IDS = [f"{rule}-{temperature:g}" for rule, temperature in RULES]
#: The same where the interpreter makes each a matter of seconds: temperatures without code of their own are slow, and
#: so is the ordinary gradient, which is held against torch's own.
SOON = [("temperature", 2.0), ("constant", 2.0)]
PAPERS_RULES = [
    pytest.param(*rule, id=case, marks=[] if rule in SOON else pytest.mark.slow)
    for rule, case in zip(RULES, RULE_IDS, strict=True)
]


def by_loops(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grad_out: torch.Tensor,
    *,
    rule: str,
    temperature: float,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    key_range: torch.Tensor | None = None,
    grad_scale: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> dict[str, torch.Tensor]:
    """The forward and the four gradients, one query row at a time, straight from the definition."""
    batch, heads, queries, _ = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    out = torch.zeros_like(query)
    grads = {name: torch.zeros_like(x) for name, x in (("query", query), ("key", key), ("value", value))}
    grads["sinks"] = torch.zeros(heads, dtype=query.dtype)
    for b in range(batch):
        first, end = (0, keys) if key_range is None else key_range[b].tolist()
        for h in range(heads):
            g = h // (heads // kv_heads)
            for i in range(queries):
                position = i + keys - queries
                seen = [
                    j
                    for j in range(first, end)
                    if (not causal or j <= position) and (window is None or j > position - window)
                ]
                if not seen:
                    continue
                raw = scale * (key[b, g, seen] @ query[b, h, i])
                capped = raw if softcap is None else softcap * torch.tanh(raw / softcap)
                sink = None if sinks is None else sinks[h : h + 1]
                full = capped if sink is None else torch.cat([capped, sink])
                weights = torch.softmax(full, -1)
                values = value[b, g, seen]
                out[b, h, i] = weights[: len(seen)] @ values
                upstream = grad_out[b, h, i]
                grads["value"][b, g, seen] += grad_scale[2] * weights[: len(seen), None] * upstream
                if rule == "constant":
                    continue
                softened = torch.softmax(full / (temperature if rule == "temperature" else 1.0), -1)
                grad_weights = values @ upstream
                if sink is not None:
                    grad_weights = torch.cat([grad_weights, torch.zeros(1, dtype=query.dtype)])
                grad_full = softened * (grad_weights - softened @ grad_weights)
                if sink is not None:
                    grads["sinks"][h] += grad_full[-1]
                grad_raw = grad_full[: len(seen)]
                if softcap is not None:
                    grad_raw = grad_raw * (1 - (capped / softcap) ** 2)
                grads["query"][b, h, i] += grad_scale[0] * scale * grad_raw @ key[b, g, seen]
                grads["key"][b, g, seen] += grad_scale[1] * scale * grad_raw[:, None] * query[b, h, i]
    return {"out": out, **grads}


def differentiate(
    function: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grad_out: torch.Tensor,
    sinks: torch.Tensor | None = None,
    **options: Any,
) -> dict[str, torch.Tensor]:
    """The output and every gradient of an attention function, by autograd."""
    inputs = {"query": query, "key": key, "value": value}
    if sinks is not None:
        inputs["sinks"] = sinks
    leaves = {name: x.detach().requires_grad_(True) for name, x in inputs.items()}
    out = function(**leaves, **options)
    grads = torch.autograd.grad(out, list(leaves.values()), grad_out, allow_unused=True, materialize_grads=True)
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def make(
    batch: int,
    heads: int,
    kv_heads: int,
    queries: int,
    keys: int,
    size: int,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key, value as the strided [B, H, T, D] views that models make, and an upstream gradient."""
    generator = torch.Generator().manual_seed(seed)

    def view(length: int, count: int) -> torch.Tensor:
        flat = torch.randn(batch, length, count, size, generator=generator, dtype=torch.float64)
        return flat.to(dtype).transpose(1, 2)

    return view(queries, heads), view(keys, kv_heads), view(keys, kv_heads), view(queries, heads)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 3},
    "window-not-causal": {"window": 2},
    "softcap": {"causal": True, "softcap": 0.8},
    "padded-left": {"causal": True, "key_range": [[4, 9], [0, 9]]},
    "padded-right": {"causal": True, "key_range": [[0, 9], [0, 5]]},
    "no-key": {"key_range": [[3, 3], [0, 9]]},
}


def device_of(engine: str) -> str:
    return "cuda" if engine == "triton" and ON_GPU else "cpu"


def inputs(engine: str, *shape: int, dtype: torch.dtype | None = None, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Query, key, value and upstream gradient as strided views where an engine wants them, in its first dtype."""
    # .to() keeps the strides of a dense view
    return tuple(x.to(device_of(engine)) for x in make(*shape, dtype=dtype or DTYPES[engine][0], seed=seed))


def run(engine: str, tensors: tuple[torch.Tensor, ...], **options: Any) -> dict[str, torch.Tensor]:
    """Output and gradients of an engine."""
    return differentiate(gim_kernels.attention, *tensors, engine=engine, **options)


def in_parts(monkeypatch: pytest.MonkeyPatch, members: int) -> None:
    """Programs of the key kernel each sum over ``members`` query heads of a group, as they do where few would run."""
    from gim_kernels.triton import attention_grad

    monkeypatch.setattr(attention_grad, "members_of", lambda *_: members)


def hold(
    engine: str, tensors: tuple[torch.Tensor, ...], function: Any = reference.attention, **options: Any
) -> dict[str, torch.Tensor]:
    """An engine's output and gradients, after they were held against the reference, or another function."""
    sinks = options.pop("sinks", None)
    got = run(engine, tensors, sinks=sinks, **options)
    wide = None if sinks is None else sinks.double()
    truth = differentiate(function, *(x.double() for x in tensors), sinks=wide, **options)
    double = tensors[0].dtype == torch.float64
    yardstick = truth if double else differentiate(function, *tensors, sinks=sinks, **options)
    for name, x in got.items():
        if double:
            assert_close64(x, truth[name], f"{engine} {name}")
        else:
            assert_within_budget(x, truth[name], yardstick[name], f"{engine} {name}")
    return got


# ---- every rule, option and shape


def definitions() -> Iterator[Any]:
    """Every engine with every rule under every option, with and without sinks; the interpreter, for which each is a
    matter of a second, with one of the two, the paper's rule, and the constant one under two options. In the kernels,
    the query heads of a group are summed by one program under every other option, else by one each."""
    for engine, (option, (rule, temperature)) in itertools.product(DTYPES, itertools.product(OPTIONS, RULES)):
        if engine == "composed" and "softcap" in OPTIONS[option]:
            continue  # tests/gim_kernels/test_composed.py has what it refuses
        place = list(OPTIONS).index(option) + RULES.index((rule, temperature))
        for sinks in (False,) if engine == "composed" else (False, True):
            parts = engine == "triton" and place // 2 % 2 == 0
            case = f"{engine}-{option}{'-sinks' if sinks else ''}{'-parts' if parts else ''}-{rule}-{temperature:g}"
            chosen = SOON if option in ("softcap", "padded-left") else SOON[:1]
            often = engine != "triton" or (sinks == (place % 2 == 0) and (rule, temperature) in chosen)
            marks: Any = [] if often else pytest.mark.slow
            yield pytest.param(engine, option, sinks, parts, rule, temperature, id=case, marks=marks)


@nan_filled
@pytest.mark.parametrize(("engine", "option", "sinks", "parts", "rule", "temperature"), list(definitions()))
def test_every_rule_is_its_definition(
    engine: str,
    option: str,
    sinks: bool,
    parts: bool,
    rule: str,
    temperature: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if parts:
        in_parts(monkeypatch, 1)
    options = dict(OPTIONS[option])
    if "key_range" in options:
        options["key_range"] = torch.tensor(options["key_range"], dtype=torch.int32)
    tensors = make(2, 4, 2, 7, 9, 5)
    sink = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) if sinks else None
    factors = (0.25, 0.3, 0.5)
    truth = by_loops(
        *tensors, rule=rule, temperature=temperature, scale=0.37, sinks=sink, grad_scale=factors, **options
    )

    def given_to(function: Any, dtype: torch.dtype, **named: Any) -> dict[str, torch.Tensor]:
        device = device_of(engine)
        named |= {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        named |= {"sinks": None if sink is None else sink.to(device, dtype), "scale": 0.37, "grad_scale": factors}
        named |= {"softmax_backward": rule, "temperature": temperature}
        return differentiate(function, *(x.to(device, dtype) for x in tensors), **named)

    dtype = DTYPES[engine][0]
    got = given_to(gim_kernels.attention, dtype, engine=engine)
    yardstick = given_to(reference.attention, dtype)
    for name, x in got.items():
        if dtype == torch.float64:
            assert_close64(x, truth[name], f"{engine} {name}")
        else:
            assert_within_budget(x.cpu(), truth[name], yardstick[name].cpu(), f"{engine} {name}")


#: One query, tiles cut short, whole tiles, several tiles; more queries than keys and the other way round.
LARGE = (2, 8, 2, 1000, 1500, 128)
SHAPES = [
    (1, 2, 2, 1, 1, 16),
    (2, 4, 1, 63, 63, 24),
    (1, 3, 1, 111, 111, 40),
    (1, 2, 1, 128, 128, 64),
    (2, 1, 1, 1, 129, 16),
    (1, 2, 1, 64, 150, 16),
    (1, 2, 2, 150, 64, 16),
    (1, 1, 1, 300, 300, 8),
    LARGE,
]
#: What the interpreter, or the composed engine, gets at once of all shapes, rules and dtypes. The rest is slow, or too
#: large for it.
EVERY_RULE = [(1, 3, 1, 111, 111, 40)]
TWO_BYTES = [(1, 2, 1, 128, 128, 64), (2, 4, 1, 63, 63, 24)]
#: What the interpreter gets later all the same: others have as many heads, tiles or cuts.
AGAIN = [
    *((torch.float32, shape) for shape in ((1, 1, 1, 300, 300, 8), (1, 2, 2, 1, 1, 16), (1, 2, 1, 64, 150, 16))),
    *((dtype, (2, 4, 1, 63, 63, 24)) for dtype in (torch.float16, torch.bfloat16)),
]


def cases() -> Iterator[Any]:
    for engine, shape, (rule, temperature) in itertools.product(("blockwise", "composed", "triton"), SHAPES, RULES):
        for dtype in DTYPES[engine]:
            square = (rule, temperature) == ("temperature", 2.0)
            at_once = shape in EVERY_RULE or square if dtype == torch.float32 else square and shape in TWO_BYTES
            marks: Any = {"triton": LATER, "composed": [] if at_once and square else pytest.mark.slow}.get(engine, [])
            if engine == "triton" and at_once and square and (dtype, shape) not in AGAIN:
                marks = AT_ONCE if dtype == torch.bfloat16 else []
            if shape == LARGE:
                marks = GPU
            if dtype != torch.float64:
                name = str(dtype).removeprefix("torch.")
                case = f"{engine}-{name}-{rule}-{temperature:g}-" + "B{}-H{}-K{}-T{}-S{}-D{}".format(*shape)
                yield pytest.param(engine, shape, rule, temperature, dtype, id=case, marks=marks)


@nan_filled
@pytest.mark.parametrize(("engine", "shape", "rule", "temperature", "dtype"), list(cases()))
def test_within_the_error_budget(
    engine: str, shape: tuple[int, ...], rule: str, temperature: float, dtype: torch.dtype
) -> None:
    tensors = inputs(engine, *shape, dtype=dtype)
    hold(engine, tensors, causal=True, softmax_backward=rule, temperature=temperature)


def hold_any(draw: Any, engine: str, longest: int) -> None:
    """One call of an engine with a shape and options that hypothesis draws."""
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    batch, queries, keys = draw(st.integers(1, 2)), draw(st.integers(1, longest)), draw(st.integers(1, longest))
    dtypes = DTYPES[engine][:1] if engine == "blockwise" else DTYPES[engine]
    tensors = inputs(
        engine,
        *(batch, kv_heads * group, kv_heads, queries, keys, draw(st.integers(1, 33))),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 9)),
    )
    options: dict[str, Any] = {
        "causal": draw(st.booleans()),
        "window": draw(st.none() | st.integers(1, longest + 10)),
        "softcap": draw(st.none() | st.floats(0.3, 30.0)),
        "scale": draw(st.none() | st.floats(-1.0, 1.0)),
        "softmax_backward": draw(st.sampled_from(["exact", "temperature", "constant"])),
        "temperature": draw(st.sampled_from([2.0, 0.5, 1.0]) | st.floats(0.25, 8.0)),
        "grad_scale": (0.25, 0.25, 0.5),
    }
    device = device_of(engine)
    if draw(st.booleans()):
        ends = [sorted((draw(st.integers(0, keys)), draw(st.integers(0, keys)))) for _ in range(batch)]
        options["key_range"] = torch.tensor(ends, dtype=torch.int32, device=device)
    sinks = torch.linspace(-2, 2, kv_heads * group, device=device).to(tensors[0].dtype) if draw(st.booleans()) else None
    got = run(engine, tensors, sinks=sinks, **options)
    yardstick = differentiate(reference.attention, *tensors, sinks=sinks, **options)
    wide = None if sinks is None else sinks.double()
    truth = differentiate(reference.attention, *(x.double() for x in tensors), sinks=wide, **options)
    named = dict(zip(("query", "key", "value", "grad_out"), tensors, strict=True))
    sizes = terms(named if sinks is None else {**named, "sinks": sinks}, **options)
    for name, x in got.items():
        assert_within_terms(x.cpu(), truth[name].cpu(), yardstick[name].cpu(), sizes[name], f"{engine} {name}")


#: Shrinking a failure takes the interpreter minutes.
PHASES = tuple(Phase) if ON_GPU else (Phase.explicit, Phase.generate)


@settings(max_examples=40)
@given(data=st.data())
def test_blockwise_for_any_shape_and_option(data: st.DataObject) -> None:
    hold_any(data.draw, "blockwise", 160)


@pytest.mark.slow
@seed(1)
@settings(max_examples=120)
@given(data=st.data())
def test_blockwise_for_many_shapes_and_options(data: st.DataObject) -> None:
    hold_any(data.draw, "blockwise", 160)


@nan_filled
@settings(max_examples=200 if ON_GPU else 3, phases=PHASES)
@given(data=st.data())
def test_triton_for_any_shape_and_option(data: st.DataObject) -> None:
    hold_any(data.draw, "triton", 110)


@nan_filled
@pytest.mark.slow
@seed(1)
@settings(max_examples=25, phases=PHASES)
@given(data=st.data())
def test_triton_for_many_shapes_and_options(data: st.DataObject) -> None:
    hold_any(data.draw, "triton", 110)


# ---- numerics


@by_fast_engine
@pytest.mark.parametrize("temperature", [0.01, 0.05, 50.0, 1e4])
def test_extreme_temperatures_neither_overflow_nor_vanish(engine: str, temperature: float) -> None:
    tensors = inputs(engine, 1, 2, 1, 40, 40, 16, dtype=torch.float32)
    got = hold(engine, tensors, causal=True, softmax_backward="temperature", temperature=temperature)
    assert got["query"].abs().max() > 0


@by_engine
@pytest.mark.parametrize("scale", [0.0, -0.5, 1.0])
def test_any_finite_scale(engine: str, scale: float) -> None:
    hold(engine, inputs(engine, 1, 2, 1, 40, 40, 16), causal=True, scale=scale, softmax_backward="temperature")


@nan_filled
@by_engine
@pytest.mark.parametrize(("rule", "temperature"), PAPERS_RULES)
def test_rows_without_a_key_are_zero(engine: str, rule: str, temperature: float) -> None:
    tensors = inputs(
        engine, 2, 2, 1, 40, 20, 16
    )  # causal: queries 0..19 see nothing; row 1 of the batch sees nothing at all
    key_range = torch.tensor([[5, 20], [7, 7]], dtype=torch.int32, device=device_of(engine))
    sinks = torch.full((2,), -math.inf, device=device_of(engine))
    for sink in (None, sinks) if engine != "composed" else (None,):
        got = run(
            engine, tensors, causal=True, key_range=key_range, sinks=sink, softmax_backward=rule,
            temperature=temperature,
        )  # fmt: skip
        for name in ("out", "query"):
            assert torch.equal(got[name][:, :, :20], torch.zeros_like(got[name][:, :, :20])), name
            assert torch.equal(got[name][1], torch.zeros_like(got[name][1])), name
        for name in ("key", "value"):
            assert torch.equal(got[name][:, :, :5], torch.zeros_like(got[name][:, :, :5])), name
            assert torch.equal(got[name][1], torch.zeros_like(got[name][1])), name
        assert all(bool(x.isfinite().all()) for x in got.values())


@by_fast_engine
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_keys_that_do_not_exist_are_never_used(engine: str) -> None:
    query, key, value, grad_out = inputs(engine, 1, 2, 1, 50, 50, 16)
    key_range = torch.tensor([[7, 33]], dtype=torch.int32, device=device_of(engine))
    options: dict[str, Any] = {"key_range": key_range, "softmax_backward": "temperature"}
    want = run(engine, (query, key, value, grad_out), **options)
    key, value = key.clone(), value.clone()
    for x in (key, value):
        x[:, :, :7], x[:, :, 33:] = math.nan, math.inf
    for name, x in run(engine, (query, key, value, grad_out), **options).items():
        assert torch.equal(x, want[name]), name


# ---- the forward, repetition, what is computed


@pytest.mark.parametrize(
    ("engine", "dtype"),
    [
        ("blockwise", torch.float64),
        ("blockwise", torch.float32),
        ("blockwise", torch.bfloat16),
        ("triton", torch.float16),
    ],
)
def test_the_forward_does_not_depend_on_the_rule(engine: str, dtype: torch.dtype) -> None:
    query, key, value, _ = inputs(engine, 1, 4, 2, 70, 70, 16, dtype=dtype)
    plain = gim_kernels.attention(query, key, value, causal=True, engine=engine)
    for rule, temperature in RULES:
        out = gim_kernels.attention(
            query, key, value, causal=True, engine=engine, softmax_backward=rule, temperature=temperature,
            grad_scale=(0.1, 0.2, 0.3),
        )  # fmt: skip
        assert torch.equal(out, plain), rule


@by_fast_engine
def test_a_window_that_hides_nothing_is_none(engine: str) -> None:
    tensors = inputs(engine, 1, 2, 1, 50, 60, 16)
    want = run(engine, tensors, causal=True)
    for name, x in run(engine, tensors, causal=True, window=10**12).items():
        assert torch.equal(x, want[name]), name


@by_engine
def test_plain_settings_equal_torch(engine: str) -> None:
    def torchs(query: Any, key: Any, value: Any, causal: bool) -> Any:
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)

    hold(engine, inputs(engine, 2, 4, 2, 50, 50, 16), torchs, causal=True)


@nan_filled
@pytest.mark.parametrize(
    ("engine", "dtype"),
    [
        ("blockwise", torch.float32),
        pytest.param("triton", torch.float32, marks=pytest.mark.slow),
        pytest.param("triton", torch.float16, marks=pytest.mark.slow),
        pytest.param("triton", torch.bfloat16, marks=AT_ONCE),
    ],
)
@pytest.mark.parametrize(("rule", "temperature"), PAPERS_RULES)
def test_deterministic_and_a_second_backward_is_the_same(
    engine: str, dtype: torch.dtype, rule: str, temperature: float
) -> None:
    query, key, value, grad_out = inputs(engine, 1, 2, 1, 70, 70, 16, dtype=dtype)
    want: tuple[torch.Tensor, ...] = ()
    for _ in range(1000 if device_of(engine) == "cuda" else 2):
        leaves = [x.detach().clone().requires_grad_(True) for x in (query, key, value)]
        out = gim_kernels.attention(*leaves, causal=True, softmax_backward=rule, temperature=temperature, engine=engine)
        first = torch.autograd.grad(out, leaves, grad_out, retain_graph=True)
        second = torch.autograd.grad(out, leaves, grad_out)
        got = (out.detach(), *first)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(got, want or got, strict=True))
        want = got


@nan_filled
@by_fast_engine
def test_views_of_any_stride(engine: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device_of(engine))

    packed = normal(2, 50, 4 + 2 + 2, 16)  # fused projection: heads of q, k and v side by side
    query, key, value = (x.transpose(1, 2) for x in packed.split((4, 2, 2), 2))
    grad_out = normal(2, 4, 50, 16)
    want = hold(engine, (query, key, value, grad_out), causal=True, softmax_backward="temperature")
    columns = tuple(x.transpose(2, 3).contiguous().transpose(2, 3) for x in (query, key, value, grad_out))
    assert all(x.stride(-1) != 1 for x in columns)
    for name, x in run(engine, columns, causal=True, softmax_backward="temperature").items():
        assert torch.equal(x, want[name]), name
    shared = normal(1, 1, 50, 16).expand(2, 2, 50, 16)  # stride 0 over batch and heads
    ones = torch.ones((), device=device_of(engine)).expand(2, 4, 50, 16)  # what .sum().backward() hands over
    hold(engine, (query, shared, shared, ones), softmax_backward="temperature")


@nan_filled
@pytest.mark.parametrize(
    "shape", [(0, 2, 1, 4, 4, 16), (1, 2, 1, 0, 4, 16), (1, 2, 1, 4, 0, 16)], ids=["batch", "queries", "keys"]
)
@pytest.mark.parametrize("rule", ["exact", "temperature", "constant"])
@by_engine
def test_nothing_at_all(engine: str, shape: tuple[int, ...], rule: str) -> None:
    tensors = inputs(engine, *shape)
    sinks = None if engine == "composed" else torch.zeros(2, device=device_of(engine), dtype=tensors[0].dtype)
    for name, x in run(engine, tensors, sinks=sinks, softmax_backward=rule).items():
        assert torch.equal(x, torch.zeros_like(x)), name
