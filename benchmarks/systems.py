"""Who is timed: ours and its rivals for each kind of case, a row of data each.

A system turns a case into a call that runs it once. It says which rule it computes, so that the oracle can hold it to
that, which backend it is pinned to, and what memory it needs at least.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import gim
import gim_kernels
from benchmarks import decoder
from benchmarks.cases import AttentionCase, Case, ExplainCase, PointwiseCase
from benchmarks.measure import DTYPES
from gim_kernels import reference
from gim_kernels.types import Engine

#: Ids of the baseline and of the explained token: fixed, so that every system explains the same logit.
BASELINE, TARGET = 0, 1
#: Queries at a time of the query-chunked eager rivals.
CHUNK = 256

Run = Callable[[], tuple[torch.Tensor, ...]]


class UnavailableError(Exception):
    """A system that cannot run this case here; the message says why."""


@dataclass(frozen=True)
class System:
    """One way to do a case.

    Args:
        name: shown in tables and kept in results.
        rule: what it computes, as the oracle names it; ``"case"`` for the case's own rule.
        prepare: turns a case, its inputs and the device into a call; raises :class:`UnavailableError`.
        backend: which code it is pinned to.
        bytes_needed: memory that it needs beyond the inputs, from below.
        devices: the kinds of device that it exists on.
        where: whether it runs a case at all.
        executed: matrix products that attention executes in a step; None where unknown.
        whole: whether attention executes hidden scores too.
    """

    name: str
    rule: str
    prepare: Callable[[Any, tuple[Any, ...], torch.device], Run]
    backend: str = ""
    bytes_needed: Callable[[Any], int] = lambda case: 0
    devices: tuple[str, ...] = ("cpu", "cuda")
    where: Callable[[Any], bool] = lambda case: True
    executed: int | None = None
    whole: bool = False


def rule_of(system: System, case: Case) -> str:
    """The rule that the oracle holds a system to."""
    if system.rule != "case":
        return system.rule
    return case.rule if isinstance(case, AttentionCase) else "GIM"


# ------------------------------------------------------------------------------------------------------- attention


def _differentiate(out: torch.Tensor, inputs: tuple[torch.Tensor, ...], grad: torch.Tensor) -> tuple[Any, ...]:
    """The output and the gradients of the inputs; zeros for those that nothing reaches."""
    grads = torch.autograd.grad(out, inputs, grad, allow_unused=True)
    return (out.detach(), *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs, strict=True)))


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _step(case: AttentionCase, inputs: tuple[Any, ...], attend: Attend) -> Run:
    query, key, value, grad = inputs
    if case.part == "forward":

        def forward() -> tuple[torch.Tensor, ...]:
            with torch.no_grad():
                return (attend(query, key, value),)

        return forward
    leaves = tuple(x.detach().requires_grad_(True) for x in (query, key, value))
    return lambda: _differentiate(attend(*leaves), leaves, grad)


def _engine(engine: Engine) -> Callable[[AttentionCase, tuple[Any, ...], torch.device], Run]:
    def prepare(case: AttentionCase, inputs: tuple[Any, ...], device: torch.device) -> Run:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return gim_kernels.attention(q, k, v, causal=case.causal, softmax_backward=case.rule, engine=engine)

        return _step(case, inputs, attend)

    return prepare


def _eager(chunk: int | None) -> Callable[[AttentionCase, tuple[Any, ...], torch.device], Run]:
    def prepare(case: AttentionCase, inputs: tuple[Any, ...], device: torch.device) -> Run:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return decoder.attend(q, k, v, rule=case.rule, causal=case.causal, chunk=chunk)

        return _step(case, inputs, attend)

    return prepare


@contextlib.contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """Inside, torch picks deterministic kernels; it does not fill new memory, which would be timed."""
    options: Any = importlib.import_module("torch.utils.deterministic")
    before, fill = torch.are_deterministic_algorithms_enabled(), options.fill_uninitialized_memory
    if wanted:
        options.fill_uninitialized_memory = False
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        options.fill_uninitialized_memory = fill


def _sdpa(backend: SDPBackend, deterministic: bool = False) -> Callable[..., Run]:
    def prepare(case: AttentionCase, inputs: tuple[Any, ...], device: torch.device) -> Run:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            gqa = case.heads != case.kv_heads
            return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=gqa)

        step = _step(case, inputs, attend)

        def run() -> tuple[torch.Tensor, ...]:
            with sdpa_kernel([backend]), _deterministic(deterministic):
                return step()

        return run

    return prepare


def _composed() -> Callable[..., Run]:
    """The rule as its equation in torch's exact attention, whose graph is kept: no call runs twice."""

    def prepare(case: AttentionCase, inputs: tuple[Any, ...], device: torch.device) -> Run:
        temperature = gim.rules.PAPER_TEMPERATURE

        def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, over: float = 1.0) -> torch.Tensor:
            gqa, scale = case.heads != case.kv_heads, q.shape[-1] ** -0.5 / over
            return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal, scale=scale, enable_gqa=gqa)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if case.rule == "exact":
                return exact(q, k, v)
            out = exact(q.detach(), k.detach(), v)
            if case.rule == "constant":
                return out
            softened = exact(q, k, v.detach(), temperature)
            return out + temperature * (softened - softened.detach())

        step = _step(case, inputs, attend)

        def run() -> tuple[torch.Tensor, ...]:
            with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
                return step()

        return run

    return prepare


def _seen(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return query >= key


@functools.cache
def _compiled_flex() -> Any:
    """One for all cases; with fullgraph it raises where it would fall back to whole score matrices."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _flex(case: AttentionCase, inputs: tuple[Any, ...], device: torch.device) -> Run:
    from torch.nn.attention.flex_attention import create_block_mask

    compiled = _compiled_flex()
    block_mask = None
    if case.causal:
        block_mask = create_block_mask(_seen, None, None, case.tokens, case.tokens, device=device.type)
    gqa = case.heads != case.kv_heads

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return compiled(q, k, v, block_mask=block_mask, enable_gqa=gqa)

    return _step(case, inputs, attend)


def _compiles_in_time(case: AttentionCase) -> bool:
    """FlexAttention compiles for up to a minute for each shape: it runs beside the exact step of one length."""
    return case.rule == "exact" and case.part == "step" and case.tokens == 8192


def _attention_eager_bytes(case: AttentionCase) -> int:
    return case.eager_bytes()


def own_case(case: Case, system: System) -> Case:
    """The case with the rule that the system really computes: whose operations its rate counts.

    A rival of another environment is counted as the case is: how it comes by its rules is not known.
    """
    if isinstance(case, ExplainCase) and system.rule in gim.rules.PRESETS:
        return dataclasses.replace(case, rule=gim.rules.get(system.rule).softmax)
    if isinstance(case, AttentionCase) and system.rule != "case":
        return dataclasses.replace(case, rule=system.rule)  # type: ignore[arg-type]
    return case


def _products(case: AttentionCase, system: System, device: torch.device) -> int | None:
    """Matrix products of T x T x D that a step executes; None where unknown."""
    if case.part == "forward":
        return 2
    if system.name == OURS:
        if device.type == "cuda":
            # The gradients of query and of key and value compute the scores and dP each.
            return {"exact": 9, "temperature": 10, "constant": 4}[case.rule]
        return {"exact": 7, "temperature": 7, "constant": 4}[case.rule]
    if system.name == COMPOSED:  # each call's forward and backward, once
        return {"exact": 7, "temperature": 14, "constant": 7}[case.rule]
    if system.name == OURS_COMPOSED:  # an operator keeps no graph: each call's forward is run again for its backward
        return {"exact": 9, "temperature": 16, "constant": 9}[case.rule]
    if system.executed is None or case.rule != "constant":
        return system.executed
    return {6: 3}.get(system.executed, system.executed)  # eager: forward 2, grad_value 1


def executed_flops(case: Case, system: System, device: torch.device) -> float | None:
    """Operations of matrix products that a system executes, tiles on the diagonal not counted twice."""
    if not isinstance(case, AttentionCase):
        return None
    products = _products(case, system, device)
    if products is None:
        return None
    hidden = 2 * case.tokens / (case.tokens + 1) if system.whole and case.causal else 1.0
    return case.flops() / case.products * products * hidden


OURS = "gim-kernels"
OURS_COMPOSED = "gim-kernels, engine composed"
COMPOSED = "composed of torch SDPA"

ATTENTION: tuple[System, ...] = (
    System(OURS, "case", _engine("auto")),
    System(OURS_COMPOSED, "case", _engine("composed"), backend="torch's choice of SDPA"),
    System(COMPOSED, "case", _composed(), backend="FLASH_ATTENTION"),
    System(
        "torch SDPA, exact",
        "exact",
        _sdpa(SDPBackend.FLASH_ATTENTION),
        backend="FLASH_ATTENTION",
        executed=7,
    ),
    System(
        "torch SDPA, exact, deterministic",
        "exact",
        _sdpa(SDPBackend.FLASH_ATTENTION, deterministic=True),
        backend="FLASH_ATTENTION, deterministic",
        devices=("cuda",),
        executed=7,
    ),
    System(
        "cuDNN SDPA, exact",
        "exact",
        _sdpa(SDPBackend.CUDNN_ATTENTION),
        backend="CUDNN_ATTENTION",
        devices=("cuda",),
        executed=7,
    ),
    System(
        "FlexAttention, exact",
        "exact",
        _flex,
        backend="compiled",
        devices=("cuda",),
        where=_compiles_in_time,
        executed=9,
    ),
    System(
        "eager GIM, query-chunked",
        "case",
        _eager(CHUNK),
        backend=f"{CHUNK} queries at a time, recomputed",
    ),
    System(
        "eager GIM",
        "case",
        _eager(None),
        bytes_needed=_attention_eager_bytes,
        executed=6,
        whole=True,
    ),
)

# -------------------------------------------------------------------------------------------- norms and gated MLPs


def _pointwise(module: Any) -> Callable[[PointwiseCase, tuple[Any, ...], torch.device], Run]:
    """The public functions of a module: gim_kernels, or its eager specification."""

    def prepare(case: PointwiseCase, inputs: tuple[Any, ...], device: torch.device) -> Run:
        first, second, grad = inputs
        weight = second[0].abs() + 0.5
        if case.op == "gated":
            pair = (first.detach().requires_grad_(True), second.detach().requires_grad_(True))
            return lambda: _differentiate(module.gated(*pair, "silu", grad_scale=(0.5, 0.5)), pair, grad)
        x = (first.detach().requires_grad_(True),)
        if case.op == "rms_norm":
            return lambda: _differentiate(module.rms_norm(x[0], weight, 1e-6, frozen=case.frozen), x, grad)
        return lambda: _differentiate(module.layer_norm(x[0], weight, None, 1e-6, frozen=case.frozen), x, grad)

    return prepare


def _torch_pointwise(case: PointwiseCase, inputs: tuple[Any, ...], device: torch.device) -> Run:
    """torch's own functions, whose gradient is the exact one: with a frozen statistic they are no rival."""
    first, second, grad = inputs
    weight = second[0].abs() + 0.5
    if case.op == "gated":
        pair = (first.detach().requires_grad_(True), second.detach().requires_grad_(True))
        return lambda: _differentiate(F.silu(pair[0]) * pair[1], pair, grad)
    x = (first.detach().requires_grad_(True),)
    if case.op == "rms_norm":
        return lambda: _differentiate(F.rms_norm(x[0], (case.width,), weight, 1e-6), x, grad)
    return lambda: _differentiate(F.layer_norm(x[0], (case.width,), weight, None, 1e-6), x, grad)


POINTWISE: tuple[System, ...] = (
    System(OURS, "case", _pointwise(gim_kernels)),
    System("torch, exact", "exact", _torch_pointwise),
    System("eager", "case", _pointwise(reference)),
)

# --------------------------------------------------------------------------------------------------------- explain


def _explain(preset: str, memory: str) -> Callable[[ExplainCase, tuple[Any, ...], torch.device], Run]:
    def prepare(case: ExplainCase, inputs: tuple[Any, ...], device: torch.device) -> Run:
        model, ids = inputs

        def run() -> tuple[torch.Tensor, ...]:
            scores = gim.explain(
                model, ids, target_token_id=TARGET, baseline_token_id=BASELINE, rules=preset, memory=memory
            )
            return (scores,)

        return run

    return prepare


def _eager_explain(chunk: int | None) -> Callable[[ExplainCase, tuple[Any, ...], torch.device], Run]:
    def prepare(case: ExplainCase, inputs: tuple[Any, ...], device: torch.device) -> Run:
        model, ids = inputs
        return lambda: (decoder.attribution(model, ids, "GIM", target=TARGET, baseline=BASELINE, chunk=chunk),)

    return prepare


def _explain_eager_bytes(case: ExplainCase) -> int:
    return case.eager_bytes()


def _explain_kept_bytes(case: ExplainCase) -> int:
    """Activations that a backward without checkpoints keeps, from below: q, k, v, the output, gate and up."""
    one = case.sizes
    numbers = 2 * (one.heads + one.kv_heads) * one.head_size + 2 * one.inner
    return case.tokens * one.layers * numbers * DTYPES[case.dtype].itemsize


EXPLAIN: tuple[System, ...] = (
    System("gim-kernels GIM", "GIM", _explain("GIM", "none"), bytes_needed=_explain_kept_bytes),
    System("gim-kernels GIM, checkpoints", "GIM", _explain("GIM", "layer")),
    System(
        "gim-kernels GIM_CONSTANT", "GIM_CONSTANT", _explain("GIM_CONSTANT", "none"), bytes_needed=_explain_kept_bytes
    ),
    System("gim-kernels exact gradient", "GRADIENT", _explain("GRADIENT", "none"), bytes_needed=_explain_kept_bytes),
    System(
        "eager GIM, query-chunked",
        "GIM",
        _eager_explain(CHUNK),
        backend=f"{CHUNK} queries at a time, recomputed",
        bytes_needed=_explain_kept_bytes,
    ),
    System("eager GIM", "GIM", _eager_explain(None), bytes_needed=_explain_eager_bytes),
)

SYSTEMS: dict[str, tuple[System, ...]] = {
    "attention": ATTENTION,
    "rms_norm": POINTWISE,
    "layer_norm": POINTWISE,
    "gated": POINTWISE,
    "explain": EXPLAIN,
}


def systems_of(case: Case, device: torch.device) -> tuple[System, ...]:
    """The systems of a case that exist on a kind of device; ours first."""
    return tuple(one for one in SYSTEMS[case.op] if device.type in one.devices and one.where(case))


def inputs_of(case: Case, device: torch.device) -> tuple[Any, ...]:
    """The case's tensors, or its model and ids."""
    return case.build(device) if isinstance(case, ExplainCase) else case.inputs(device)
