"""Which plan an attribution runs under, and what happens when memory runs out all the same."""

from __future__ import annotations

import dataclasses
import gc
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from gim import checkpoint, scoring
from gim.context import check_engine
from gim.estimate import EstimateError, MemoryEstimate, Twin, estimate_memory
from gim.parts import anatomy
from gim.plan import CHECKPOINTS, PLANS, MemoryPlan
from gim.rules import GIM as PAPER_RULES
from gim.rules import Rules
from gim.scoring import Progress, Request, Result, Terms
from gim.targets import Per
from gim_kernels.types import Engine

__all__ = [
    "CHECKPOINTS",
    "PLANS",
    "EstimateError",
    "MemoryEstimate",
    "MemoryPlan",
    "OutOfMemoryError",
    "PlanRow",
    "choose",
    "estimate_memory",
    "free_bytes",
    "plan_rows",
    "run",
    "size",
]

#: Share of the free memory that ``"auto"`` plans for: allocators round up, and kernels load code as they start.
AUTO_SHARE = 0.9
#: Where this many times what a prompt's activations take by the config's numbers is free, nothing need be estimated.
PLENTY = 6
#: Gradients of one forward that are taken together: as many as give these tokens, within bounds. Measured on two cores
#: with a model of 135M parameters: at 256 tokens 0.57 of single calls' time one by one, 0.49 by 4, 0.48 by 8; at 2,048,
#: where attention's weights are most of what they share, 15 seconds each by 4 against 18.
TOKENS_AT_ONCE, LEAST_AT_ONCE, MOST_AT_ONCE = 8192, 2, 16
#: What a further gradient takes, in terms of what one layer keeps: an MLP's three are alive at once; a quarter more was
#: measured on Llama's shape.
LAYERS_A_GRADIENT = 1.5


class OutOfMemoryError(torch.OutOfMemoryError):
    """No plan fits, or the device ran out under the plan that should have; says what would.

    Args:
        message: the text.
        plan: the plan that was tried last.
        estimate: what it was estimated to take; None where that cannot be told.
        longest: the longest prompt that would fit under the leanest plan, in tokens; None where it cannot be told.
    """

    def __init__(self, message: str, plan: MemoryPlan, estimate: MemoryEstimate | None, longest: int | None) -> None:
        super().__init__(message)
        self.plan = plan
        self.estimate = estimate
        self.longest = longest


def size(count: float) -> str:
    """Bytes for a person: ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device, in bytes; None where it cannot be told."""
    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reusable
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return None
    for line in meminfo.read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def activation_bytes(model: nn.Module, tokens: int) -> int | None:
    """Bytes that the activations of all layers take when none is checkpointed, weights and norms frozen; roughly.

    A layer keeps its queries, keys and values, attention's output and log-sum-exp, and the two branches of its MLP.
    None where the config does not tell the sizes.
    """
    parts = anatomy.of(model)
    config = parts.config
    if config is None:
        return None
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    hidden = getattr(config, "hidden_size", None)
    heads = getattr(config, "num_attention_heads", None)
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(hidden, int) or not isinstance(heads, int) or not isinstance(layers, int):
        return None
    head_size = getattr(config, "head_dim", None) or hidden // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    inner = getattr(config, "intermediate_size", None)
    numbers = 2 * heads * head_size + 2 * kv_heads * head_size + 2 * (inner if isinstance(inner, int) else 4 * hidden)
    return tokens * layers * (numbers * parts.dtype.itemsize + 4 * heads)


def gradient_bytes(model: nn.Module, tokens: int) -> float | None:
    """Bytes that each gradient takes at most which is taken together with another, roughly; None as above."""
    kept, layers = activation_bytes(model, tokens), len(anatomy.of(model).layers)
    return None if kept is None or not layers else LAYERS_A_GRADIENT * kept / layers


_twins: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Rules, Engine, Per | None], Twin | EstimateError]] = (
    weakref.WeakKeyDictionary()
)


class _Adviser:
    """What memory a request would take on a model, under any plan; made of a twin that is kept with the model."""

    def __init__(self, model: nn.Module, request: Request, rules: Rules, engine: Engine = "auto") -> None:
        check_engine(engine, model)  # before a plan is looked for
        self._engine = engine
        self._model = model
        self._request = request
        self._rules = rules
        self.parts = anatomy.of(model)
        self.device = request.rows.ids.device
        self.batch, self.tokens = request.rows.ids.shape
        self.free = free_bytes(self.device)
        # Offloading to the memory that the model is in itself wins nothing.
        plans = (plan for plan in PLANS if plan.offload == "none" or self.device.type == "cuda")
        self.plans = [checkpoint.suited(plan, model) for plan in plans]
        if any(
            getattr(layer, "gradient_checkpointing", False) and layer.training for layer in self.parts.modules.values()
        ):
            # The user has asked for checkpoints: keeping more than those would not respect that.
            self.plans = [plan for plan in self.plans if plan.checkpoint == "layer"]

    @property
    def has_plenty(self) -> bool:
        """Whether memory is no question at all."""
        needed = activation_bytes(self._model, self.batch * self.tokens)
        if self.free is None or needed is None or self._engine == "reference":  # whose scores are T x S
            return False
        # A model that does not know which positions matter computes logits at all of them.
        vocabulary = getattr(self.parts.config, "vocab_size", None) or 0
        return PLENTY * (needed + 4 * self.batch * self.tokens * vocabulary) <= self.free

    @property
    def twin(self) -> Twin:
        """The model's twin.

        Raises:
            EstimateError: there is none.
        """
        twins = _twins.setdefault(self._model, {})
        key = (self._rules, self._engine, self._request.per)
        if key not in twins:
            try:
                twins[key] = Twin(self._model, self._rules, engine=self._engine, per=self._request.per)
            except EstimateError as error:
                # Without its traceback, which would keep the model alive that the twin is filed under.
                twins[key] = EstimateError(str(error))
        found = twins[key]
        if isinstance(found, EstimateError):
            raise EstimateError(str(found))
        return found

    def estimate(self, plan: MemoryPlan) -> MemoryEstimate:
        """What a plan would take.

        Raises:
            EstimateError: it cannot be told.
        """
        plan = checkpoint.suited(plan, self._model)
        return self.twin.estimate(plan, self.tokens, batch=self.batch, explained=len(self._request.kept.positions))

    def at_once(self, plan: MemoryPlan) -> int:
        """How many gradients of one forward are taken together under a plan.

        Enough to keep matrix products busy; the same part of the work is done once for all of them.
        """
        wanted = min(self._request.numbers, max(LEAST_AT_ONCE, min(MOST_AT_ONCE, TOKENS_AT_ONCE // self.tokens)))
        if wanted == 1 or self.has_plenty or self.free is None:
            return wanted
        found, each = self.try_estimate(plan), gradient_bytes(self._model, self.tokens)
        if found is None or each is None:
            return 1
        room = AUTO_SHARE * self.free - found.activations
        return max(1, min(wanted, 1 + int(room / each)))

    def try_estimate(self, plan: MemoryPlan) -> MemoryEstimate | None:
        """What a plan would take, or None where it cannot be told."""
        try:
            return self.estimate(plan)
        except EstimateError:
            return None

    def choose(self) -> MemoryPlan:
        """The fastest plan that fits.

        Raises:
            OutOfMemoryError: none does.
        """
        checkpointable = bool(self.parts.layers)
        if self.has_plenty and self.plans[0].checkpoint == "none":
            return self.plans[0]
        if self.free is None or not checkpointable:
            return checkpoint.suited(MemoryPlan("layer" if checkpointable else "none"), self._model)
        found: list[MemoryEstimate] = []
        for plan in self.plans:
            estimate = self.try_estimate(plan)
            if estimate is not None:
                found.append(estimate)
                if plan.checkpoint == "none" and estimate.activations <= AUTO_SHARE * self.free:
                    return plan  # nothing is faster
        if not found:
            # Nothing can be told of this model: as little as any model can do with.
            return checkpoint.suited(MemoryPlan("layer"), self._model)
        best = fastest([one for one in found if one.activations <= AUTO_SHARE * self.free])
        if best is not None:
            return best.plan
        leanest = min(found, key=lambda one: one.activations)
        raise self.error("no memory plan fits this prompt", leanest.plan, leanest, AUTO_SHARE)

    def check(self, plan: MemoryPlan) -> None:
        """Refuse a plan that cannot fit.

        Raises:
            OutOfMemoryError: it cannot.
        """
        if self.free is None or self.has_plenty:
            return
        found = self.try_estimate(plan)
        if found is not None and found.activations > self.free:
            raise self.error(f"memory={plan.name!r} cannot fit this prompt", plan, found, 1.0)

    def leaner(self, plan: MemoryPlan) -> MemoryPlan | None:
        """The fastest plan that takes less than one that has run out; None where there is none."""
        failed = self.try_estimate(plan)
        rank = {name: place for place, name in enumerate(CHECKPOINTS)}
        for other in self.plans:
            found = self.try_estimate(other) if failed is not None else None
            if found is not None and failed is not None:
                if found.activations < failed.activations:
                    return other
            elif failed is None and rank[other.checkpoint] > rank[plan.checkpoint] and not other.mlp_tile:
                return other
        return None

    def error(
        self, what: str, plan: MemoryPlan, estimate: MemoryEstimate | None, share: float = 1.0
    ) -> OutOfMemoryError:
        """An error that says what was tried, what it takes, and what would fit."""
        parts = [f"{what}: {self.tokens:,} tokens" + (f" times {self.batch}" if self.batch > 1 else "")]
        longest = None
        if estimate is not None:
            parts.append(f"plan {plan.name} is estimated to take {size(estimate.activations)} beyond the weights")
        else:
            parts.append(f"plan {plan.name} was tried last, and its memory cannot be told")
        if self.free is not None:
            parts.append(f"{size(self.free)} are free on {self.device.type}")
            try:
                known = [(e.activations, p) for p in self.plans if (e := self.try_estimate(p)) is not None]
                if known:
                    leanest = min(known, key=lambda pair: pair[0])[1]
                    budget = self.twin.weights + int(share * self.free)
                    longest = self.twin.longest(leanest, budget, batch=self.batch, near=self.tokens)
                    parts.append(
                        f"the longest prompt that would fit has about {longest:,} tokens (plan {leanest.name})"
                    )
            except EstimateError:
                longest = None
        return OutOfMemoryError("; ".join(parts), plan, estimate, longest)


def choose(model: nn.Module, ids: torch.Tensor, rules: Rules = PAPER_RULES, *, free: int | None = None) -> MemoryPlan:
    """The plan that ``"auto"`` means for a batch ``[B, T]``, its last position explained.

    Args:
        model: a Hugging Face model.
        ids: the batch.
        rules: of the attribution.
        free: bytes that are free; None for those that are free on the device now.

    Raises:
        OutOfMemoryError: none fits.
    """
    last = torch.full((ids.shape[0], 1), ids.shape[1] - 1, device="cpu")
    scored = Terms(last, torch.zeros_like(last), torch.ones_like(last), "logit")
    adviser = _Adviser(model, Request.of(ids, None, scored), rules)
    if free is not None:
        adviser.free = free
    return adviser.choose()


def fastest(estimates: Sequence[MemoryEstimate]) -> MemoryEstimate | None:
    """The one of least work; one that offloads only where no other is left, for it moves bytes besides."""
    return min(estimates, key=lambda one: (one.plan.offload != "none", one.relative_cost), default=None)


@dataclass(frozen=True)
class PlanRow:
    """One plan for one prompt.

    Args:
        plan: the plan.
        estimate: what it takes; None where that cannot be told, for the ``reason``.
        reason: empty where there is an estimate.
        longest: the longest prompt that fits, in tokens; None where the memory is not known.
        fits, chosen: whether this prompt fits, and whether ``"auto"`` would take this plan.
    """

    plan: MemoryPlan
    estimate: MemoryEstimate | None
    reason: str
    longest: int | None
    fits: bool
    chosen: bool


def plan_rows(twin: Twin, tokens: int, memory: int | None, *, explained: int = 1) -> list[PlanRow]:
    """Every plan that makes sense on a twin's device, for ``memory`` bytes there, weights and all."""
    budget = None if memory is None else twin.weights + int(AUTO_SHARE * (memory - twin.weights))
    rows: list[PlanRow] = []
    fitting: list[MemoryEstimate] = []
    for plan in PLANS:
        if plan.offload != "none" and twin.device != "cuda":
            continue
        try:
            found = twin.estimate(plan, tokens, explained=explained)
            longest = None if budget is None else twin.longest(plan, budget, explained=explained, near=tokens)
        except EstimateError as error:
            rows.append(PlanRow(plan, None, str(error), None, False, False))
            continue
        fits = budget is None or found.peak <= budget
        if fits:
            fitting.append(found)
        rows.append(PlanRow(plan, found, "", longest, fits, False))
    best = fastest(fitting)
    return [dataclasses.replace(row, chosen=best is not None and row.estimate is best) for row in rows]


def run(
    model: nn.Module,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    scored: Terms,
    baseline_id: int,
    rules: Rules,
    memory: MemoryPlan | str,
    progress: Progress | None,
    position_ids: torch.Tensor | None = None,
    *,
    strict: bool = True,
    engine: Engine = "auto",
    per: Per | None = None,
    packed: bool = False,
) -> Result:
    """One forward and one backward over a checked batch, under the plan that ``memory`` means; ``packed`` in one row.

    ``"auto"`` is the fastest of :data:`gim.plan.PLANS` that fits the device's free memory. Where memory runs out all
    the same, the next leaner plan is tried once, with a warning.

    Raises:
        OutOfMemoryError: the plan, or none, fits; or memory ran out twice.
        ValueError: neither a plan nor the name of one, or a plan that does not apply to the model.
        Others: as :func:`gim.scoring.run`.
    """
    if not isinstance(memory, MemoryPlan | str):
        raise ValueError(f"memory must be a MemoryPlan, 'auto' or one of {CHECKPOINTS}, got {memory!r}")
    chosen = MemoryPlan.parse(memory) if isinstance(memory, str) and memory != "auto" else memory
    request = Request.of(ids, mask, scored, position_ids, anatomy.of(model).pad_token_id, per, packed)
    adviser = _Adviser(model, request, rules, engine)
    if isinstance(chosen, MemoryPlan):
        plan = checkpoint.suited(chosen, model)
        adviser.check(plan)
    else:
        plan = adviser.choose()

    def attempt(plan: MemoryPlan, at_once: int) -> Result | str:
        """The result, or the message with which memory ran out; the exception would hold all that was allocated."""
        try:
            return scoring.run(model, request, baseline_id, rules, plan, progress, strict, engine, at_once)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"

    result = attempt(plan, adviser.at_once(plan))
    if isinstance(result, str):
        _release(ids.device)
        leaner = adviser.leaner(plan)
        if leaner is None:
            raise adviser.error(f"out of memory ({result})", plan, adviser.try_estimate(plan))
        warnings.warn(f"out of memory under plan {plan.name}; trying plan {leaner.name}", stacklevel=3)
        result = attempt(leaner, 1)
        if isinstance(result, str):
            _release(ids.device)
            raise adviser.error(f"out of memory twice ({result})", leaner, adviser.try_estimate(leaner))
    words = result.plan.describe(pinned=ids.device.type == "cuda") + (", chosen by auto" if memory == "auto" else "")
    return dataclasses.replace(result, memory=words)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out; on a CPU torch says so in words only."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return "DefaultCPUAllocator" in text and ("can't allocate memory" in text or "not enough memory" in text)


def _release(device: torch.device) -> None:
    """Give freed memory back, so that the next attempt starts from what was free before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
