"""How much memory an attribution takes, told before it starts: the same code, run on tensors without data."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gim import checkpoint
from gim.context import GIM
from gim.intercept.session import session_of
from gim.ledger import Ledger, Tag
from gim.loading import auto_class
from gim.offload import IN_FLIGHT, forget_pool
from gim.parts import anatomy
from gim.parts.hidden_states import device_of
from gim.parts.layers import stream
from gim.plan import PLANS, MemoryPlan
from gim.rules import GIM as PAPER_RULES
from gim.rules import Rules
from gim.rules import get as get_rules
from gim.scoring import Request, Terms, looked_at, passes
from gim.targets import Per, counted
from gim_kernels.types import Engine

#: Parts of an estimate, in the order they are shown.
PARTS = ("weights", "embeddings", "checkpoints", "attention", "layer", "head")

#: Prompts longer than this are neither looked for nor estimated: their ids are there as numbers.
LONGEST = 1 << 27
#: Layers of each kind that a twin runs: the second keeps what every further one will.
SHOWN = 2
#: The same under a plan that offloads: the copies under way must have filled up first.
SHOWN_OFFLOADING = IN_FLIGHT + 2
#: The longest prompt is found to within this share of the memory.
LONGEST_WITHIN = 0.004


class EstimateError(RuntimeError):
    """Memory cannot be told for a model: its code cannot be run without data, or a plan does not apply to it."""


@dataclass(frozen=True)
class MemoryEstimate:
    """What one attribution holds at its peak, in bytes.

    Args:
        plan: how memory is spent.
        tokens: length of the prompt; ``batch`` prompts at once.
        batch: prompts at once.
        device: type of the device, such as ``"cuda"``.
        parts: bytes at the peak of ``"weights"``; ``"embeddings"``, their gradient, positions and the like;
            ``"checkpoints"``, what layers keep for the backward; ``"attention"``, its kept outputs; ``"layer"``, the
            working set of the layer that runs; ``"head"``, the last norm and the logits.
        host: bytes of offloaded tensors; on a CPU they are a part of the peak.
        flops: floating-point operations of matrix products, attention's included.
        relative_cost: those over the operations of the plan that keeps everything.
    """

    plan: MemoryPlan
    tokens: int
    batch: int
    device: str
    parts: dict[str, int]
    host: int
    flops: int
    relative_cost: float

    @property
    def peak(self) -> int:
        """Bytes on the device, weights included."""
        return sum(self.parts.values()) + (self.host if self.device == "cpu" else 0)

    @property
    def activations(self) -> int:
        """Bytes on the device beyond the weights."""
        return self.peak - self.parts["weights"]


def estimate_memory(
    model_or_config: Any,
    tokens: int,
    *,
    rules: Rules | str = PAPER_RULES,
    plans: Sequence[MemoryPlan] = PLANS,
    batch: int = 1,
    explained: int = 1,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> list[MemoryEstimate]:
    """What an attribution would take under each plan, by part, from the model's config alone.

    Nothing is loaded: a model is made from the config without memory, and the attribution itself runs on it, forward
    and backward, with every tensor counted from the operation that makes it to its end. One layer of each kind runs
    and stands for the others.

    Args:
        model_or_config: a Hugging Face model, on any device (the meta device will do), or its config.
        tokens: length of the prompt.
        rules: :class:`gim.rules.Rules` or the name of a preset.
        plans: the plans in question.
        batch: prompts at once.
        explained: how many of the last positions are explained.
        device: where the attribution would run; None for the model's own device, CUDA for a config.
        dtype: of the weights; None for the model's own, or the config's.

    Returns:
        One estimate for each plan, in the order given.

    Raises:
        EstimateError: the model's code cannot be run without data, or a plan does not apply to it; says why.
        ValueError: a count that is not positive, a device that torch does not know.
        EstimateError: neither a model nor a config.
        TypeError: plans that are none.

    Numerics: bytes are those that tensors ask for. On a GPU compare them with ``torch.cuda.max_memory_allocated``;
    what an allocator rounds up or a library keeps for itself comes on top.

    Example:
        >>> from transformers import LlamaConfig
        >>> import gim
        >>> small = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
        >>> estimates = gim.estimate_memory(small, 1024, device="cpu")
        >>> estimates[0].plan.name, estimates[0].relative_cost
        ('none', 1.0)
    """
    tokens, batch, explained = (
        counted(name, one) for name, one in (("tokens", tokens), ("batch", batch), ("explained", explained))
    )
    if explained > tokens:
        raise ValueError(f"explained must be at most the {tokens} tokens, got {explained}")
    if not isinstance(model_or_config, nn.Module) and not hasattr(model_or_config, "get_text_config"):
        raise EstimateError(f"model_or_config must be a model or its config, got {type(model_or_config).__name__}")
    if not isinstance(plans, Sequence) or not all(isinstance(plan, MemoryPlan) for plan in plans):
        raise TypeError(f"plans must be a sequence of MemoryPlan, got {plans!r:.80}")
    try:
        torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be one that torch knows or None, got {device!r:.80}") from error
    if isinstance(model_or_config, nn.Module):
        plans = [checkpoint.suited(plan, model_or_config) for plan in plans]
    twin = Twin(model_or_config, get_rules(rules), device=device, dtype=dtype)
    return [twin.estimate(plan, tokens, batch=batch, explained=explained) for plan in plans]


@dataclass(frozen=True)
class _Trace:
    """What one dry run of a twin told."""

    cast: _Cast
    live: Counter[Tag]
    where: Tag
    host: int
    flops: Counter[Tag]
    #: What was alive when each of the twin's layers was entered.
    entered: list[Counter[Tag]]

    def peak(self, device: str) -> int:
        """Bytes on the device beyond the weights; a CPU is its own host."""
        return sum(size for tag, size in self.live.items() if tag != "host") + (self.host if device == "cpu" else 0)


@dataclass(frozen=True)
class _Cast:
    """The layers that run in a dry run, and for each position how many layers it stands for besides itself."""

    layers: list[nn.Module]
    others: dict[int, int]


class Twin:
    """A model without memory that does what a model would do, with a few layers of each kind.

    Args:
        model_or_config, rules, device, dtype: as in :func:`estimate_memory`.
        engine: whose operators are accounted, as in :class:`gim.GIM`.
        per: what is looked at beside the tokens.
    """

    def __init__(
        self,
        model_or_config: Any,
        rules: Rules,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        engine: Engine = "auto",
        per: Per | None = None,
    ) -> None:
        self._per = per
        try:
            self.model = _without_memory(model_or_config, dtype)
        except Exception as error:
            raise EstimateError(f"no model can be made from this config without loading it: {error}") from error
        self.rules = rules
        if device is None:
            held = device_of(model_or_config) if isinstance(model_or_config, nn.Module) else None
            device = "cuda" if held is None or held.type == "meta" else held
        self.device = torch.device(device).type
        self.engine = engine if engine != "auto" else "triton" if self.device == "cuda" else "blockwise"
        weighed = model_or_config if isinstance(model_or_config, nn.Module) else self.model
        self.weights = weight_bytes(weighed)
        #: The plan that others are measured by.
        self._everything = checkpoint.suited(PLANS[0], self.model)
        self._layers = _Few(self.model)
        self._mlps: checkpoint.MLPs = {}
        shrink = _shrink(self.model)
        for attempt in sorted({shrink, 1}, reverse=True):
            try:
                with _stand_in_weights(self.model, attempt), GIM(self.model, rules=rules):
                    self._mlps = checkpoint.mlps_of(self.model, MemoryPlan("mlp"))
            except Exception as error:
                # A module that reshapes by its own numbers cannot be narrower: it is tried at its width.
                if attempt == 1:
                    raise EstimateError(f"{type(self.model).__name__}: {error}") from error
            else:
                if not any(isinstance(found, str) for found in self._mlps.values()):
                    break
        self._flops: dict[tuple[int, int, int], int] = {}

    def estimate(self, plan: MemoryPlan, tokens: int, *, batch: int = 1, explained: int = 1) -> MemoryEstimate:
        """What a plan takes.

        Raises:
            EstimateError: as in :func:`estimate_memory`.
        """
        self._check(plan)
        plan = checkpoint.suited(plan, self.model)
        if batch * tokens > LONGEST:
            raise EstimateError(f"tokens must be at most {LONGEST:,} in all, got {batch * tokens:,}")
        trace = self._trace(plan, tokens, batch, explained)
        parts = dict.fromkeys(PARTS, 0)
        for tag, size in trace.live.items():
            if tag != "host":
                parts[tag if isinstance(tag, str) else "layer" if tag == trace.where else "checkpoints"] += size
        parts["weights"] = self.weights
        flops = self._total_flops(trace)
        everything = self._flops_of_everything(tokens, batch, explained) if plan != self._everything else flops
        return MemoryEstimate(
            plan=plan,
            tokens=tokens,
            batch=batch,
            device=self.device,
            parts=parts,
            host=trace.host,
            flops=flops,
            relative_cost=flops / everything,
        )

    def longest(self, plan: MemoryPlan, memory: int, *, batch: int = 1, explained: int = 1, near: int = 1 << 16) -> int:
        """The most tokens whose attribution under a plan fits in ``memory`` bytes, to within half a percent of it.

        Args:
            plan: the plan.
            memory: in bytes, for weights and all; 0 tokens are the answer where not even one fits.
            batch, explained: as in :func:`estimate_memory`.
            near: a length to look at first.
        """
        self._check(plan)
        plan = checkpoint.suited(plan, self.model)
        aim = LONGEST_WITHIN * memory / 2

        def room(tokens: int) -> int:
            trace = self._trace(plan, tokens, batch, min(explained, tokens), every_tile=False)
            return memory - self.weights - trace.peak(self.device)

        low, high = 0, LONGEST + 1
        at_low = memory - self.weights
        tokens, last = near, (0, at_low)
        limit = anatomy.of(self.model).position_limit
        while high - low > 1:
            try:
                left = room(tokens)
            except EstimateError:
                if limit is None or tokens <= limit:
                    raise
                high, tokens = limit + 1, limit  # a model with a table of positions cannot be run beyond them
                continue
            if left >= 0:
                low, at_low = tokens, left
                if left <= 2 * aim or low == LONGEST:
                    break
            else:
                high = tokens
            # Memory is made of straight pieces in the number of tokens: the line through two lengths finds the end.
            slope = (last[1] - left) / (tokens - last[0]) if tokens != last[0] else 0.0
            guess = tokens + int((left - aim) / slope) if slope > 0 else (low + high) // 2
            last = (tokens, left)
            tokens = min(max(guess, low + 1), high - 1)
        return low

    @contextmanager
    def _following_rules(self) -> Iterator[None]:
        """A context over the twin, no longer than it is needed: an open one sends compiled code of any model back to
        what it was compiled from, and holds in its own thread only."""
        with ExitStack() as stack:
            with _stand_in_weights(self.model, 1):  # a context is for models that have theirs
                stack.enter_context(GIM(self.model, rules=self.rules))
            # A dry run leaves layers out, which is no fault of theirs.
            session = session_of(self.model)
            assert session is not None
            session.strict = session.proves = False
            yield

    def _check(self, plan: MemoryPlan) -> None:
        """Refuse a plan that does not apply to the model."""
        self._layers.take(SHOWN_OFFLOADING)  # those that the MLPs are filed under
        reason = checkpoint.obstacle(plan, self.model, self._mlps)
        if reason is not None:
            raise EstimateError(reason)

    def _flops_of_everything(self, tokens: int, batch: int, explained: int) -> int:
        key = (tokens, batch, explained)
        if key not in self._flops:
            self._flops[key] = self._total_flops(self._run(self._everything, tokens, batch, explained, {}))
        return self._flops[key]

    def _total_flops(self, trace: _Trace) -> int:
        others = trace.cast.others
        return sum(
            count * (1 + (others.get(tag, 0) if isinstance(tag, int) else 0)) for tag, count in trace.flops.items()
        )

    def _trace(self, plan: MemoryPlan, tokens: int, batch: int, explained: int, every_tile: bool = True) -> _Trace:
        """A dry run in which each kind's last layer shown also holds what the layers it stands for would keep."""
        first = self._run(plan, tokens, batch, explained, {}, every_tile=False)
        held: dict[int, Counter[Tag]] = {}
        for at, others in first.cast.others.items():
            before, after = first.entered[at], first.entered[at + 1]
            held[at] = Counter()
            for tag in before.keys() | after.keys():
                kept = "checkpoints" if isinstance(tag, int) or tag == "embeddings" else tag
                held[at][kept] += others * (after[tag] - before[tag])
        return self._run(plan, tokens, batch, explained, held, every_tile) if held or every_tile else first

    def _run(
        self,
        plan: MemoryPlan,
        tokens: int,
        batch: int,
        explained: int,
        held: dict[int, Counter[Tag]],
        every_tile: bool = True,
    ) -> _Trace:
        cast = self._layers.take(SHOWN if plan.offload == "none" else SHOWN_OFFLOADING)
        ids = torch.zeros(batch, tokens, dtype=torch.int64, device="cpu")
        positions = torch.arange(tokens - explained, tokens, device="cpu")[None].expand(batch, -1)
        scored = Terms(positions, torch.zeros_like(positions), torch.ones_like(positions), "logprob")
        ledger = Ledger(self.engine, self.device)
        ledger.exclude(self.model)
        hosts: list[int] = [0]
        forget_pool(self.model)

        def watch(part: str, x: torch.Tensor) -> None:
            ledger.move(x, part)
            hosts[0] = max(hosts[0], ledger.live["host"])

        entered: list[Counter[Tag]] = []
        request = Request.of(ids, None, scored, per=self._per)
        mlps = {name: self._mlps[self._layers.name(layer)] for name, layer in anatomy.of(self.model).layers}
        try:
            with self._following_rules(), ExitStack() as stack:
                taps = looked_at(self.model, request, stack)
                plan_at_work = checkpoint.applied(
                    plan,
                    self.model,
                    request.kept,
                    torch.device("meta"),
                    mlps=mlps,
                    watch=watch,
                    ahead=self.device == "cuda",
                    every_tile=every_tile,
                )
                stack.enter_context(plan_at_work)
                stack.enter_context(_following(cast.layers, ledger, entered, held))
                stack.enter_context(ledger)
                passes(self.model, request, 0, plan, check=False, taps=taps)
        except Exception as error:
            raise EstimateError(
                f"{type(self.model).__name__} cannot be run on tensors without data, so its memory cannot be told: "
                f"{type(error).__name__}: {error}"
            ) from error
        where, live = ledger.at_peak
        return _Trace(cast, live, where, hosts[0], ledger.flops, entered)


@contextmanager
def _following(
    layers: Sequence[nn.Module], ledger: Ledger, entered: list[Counter[Tag]], held: dict[int, Counter[Tag]]
) -> Iterator[None]:
    """Inside, the ledger knows which layer runs, forward and backward, and the held bytes are entered at theirs."""

    def enter(index: int) -> Any:
        def before(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
            entered.append(Counter(ledger.live))
            ledger.where = index
            for tag, size in held.get(index, {}).items():
                ledger.add(tag, size)
            hidden = stream(inputs, named)
            if hidden is None:
                raise EstimateError("a layer is called without hidden states [B, T, width]")

            def leave(_: torch.Tensor) -> None:
                ledger.where = index - 1 if index else "embeddings"
                for tag, size in held.get(index, {}).items():
                    ledger.add(tag, -size)

            hidden.register_hook(leave)
            return inputs, named

        return before

    def after(index: int) -> Any:
        def finish(_: nn.Module, __: Any, output: Any) -> None:
            last = index == len(layers) - 1
            ledger.where = "head" if last else index + 1
            if last:
                entered.append(Counter(ledger.live))
                hidden = output[0] if isinstance(output, tuple) else output
                hidden.register_hook(lambda _: setattr(ledger, "where", index))

        return finish

    with ExitStack() as hooks:
        for index, layer in enumerate(layers):
            hooks.enter_context(layer.register_forward_pre_hook(enter(index), with_kwargs=True))
            hooks.enter_context(layer.register_forward_hook(after(index)))
        yield


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, those that share memory counted once."""
    sizes = {}
    for x in (*model.parameters(), *model.buffers()):
        storage = x.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())


def _without_memory(model_or_config: Any, dtype: torch.dtype | None) -> nn.Module:
    """A model of the config, on the meta device, in evaluation mode, its parameters frozen."""
    is_model = isinstance(model_or_config, nn.Module)
    config = copy.deepcopy(model_or_config.config if is_model else model_or_config)
    if dtype is None and is_model:
        dtype = anatomy.of(model_or_config).dtype
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    config._attn_implementation_internal = None
    with torch.device("meta"):
        model = type(model_or_config)(config) if is_model else auto_class(config).from_config(config)
    for module in anatomy.of(model).modules.values():
        for parameter in module._parameters.values():
            if parameter is not None:
                parameter.requires_grad_(False)
                if parameter.dtype.is_floating_point:
                    parameter.data = parameter.data.to(dtype)
    return model.eval()


class _Few:
    """Makes a model run a few of its layers: some of each kind, and the last."""

    def __init__(self, model: nn.Module) -> None:
        found = anatomy.of(model).layers
        self._list: Any = model.get_submodule(found[0][0].rpartition(".")[0]) if found else None
        self._kinds: list[Any] = []
        for _, layer in found[:-1]:
            self._kinds.append(
                (type(layer), tuple((name, tuple(p.shape), p.dtype) for name, p in layer.named_parameters()))
            )
        self._found = [layer for _, layer in found]
        #: The layers that any dry run will use, by the names they have while all of those are there.
        self._names = {}
        if found:
            everything = self.take(SHOWN_OFFLOADING)
            prefix = found[0][0].rpartition(".")[0]
            self._names = {id(layer): f"{prefix}.{index}" for index, layer in enumerate(everything.layers)}

    def name(self, layer: nn.Module) -> str:
        """The name that a layer had when the model was patched."""
        return self._names[id(layer)]

    def take(self, shown: int) -> _Cast:
        """Leave the model ``shown`` layers of each kind, in their order, and its last."""
        if not self._found:
            return _Cast([], {})
        layers: list[nn.Module] = []
        others: dict[int, int] = {}
        last_of: dict[Any, int] = {}
        count: Counter[Any] = Counter()
        for kind, layer in zip(self._kinds, self._found[:-1], strict=True):
            count[kind] += 1
            if count[kind] <= shown:
                last_of[kind] = len(layers)
                layers.append(layer)
            else:
                others[last_of[kind]] = others.get(last_of[kind], 0) + 1
        layers.append(self._found[-1])
        self._list._modules = {str(index): layer for index, layer in enumerate(layers)}
        return _Cast(layers, others)


@contextmanager
def _stand_in_weights(model: nn.Module, shrink: int) -> Iterator[None]:
    """Inside, parameters hold numbers, so that modules can be recognised by what they compute.

    A matrix is a window that slides over a vector of random numbers: it takes the memory of the vector. Dimensions
    wider than the hidden states, which are those inside MLPs, are ``shrink`` times narrower, to be quick.
    """
    generator = torch.Generator().manual_seed(0)
    before: list[tuple[nn.Module, str, nn.Parameter]] = []
    width = anatomy.of(model).hidden_size or 0
    for module in anatomy.of(model).modules.values():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            before.append((module, name, parameter))
            shape = [size // shrink if size > width and size % shrink == 0 else size for size in parameter.shape]
            numbers = torch.randn(1 + sum(size - 1 for size in shape), generator=generator, device="cpu")
            numbers = numbers * (shape[-1] ** -0.5) if len(shape) > 1 else 1.0 + 0.3 * numbers
            values = numbers.to(parameter.dtype).as_strided(shape, [1] * len(shape))
            module._parameters[name] = nn.Parameter(values, requires_grad=False)
    try:
        yield
    finally:
        for module, name, parameter in before:
            module._parameters[name] = parameter


def _shrink(model: nn.Module) -> int:
    """By how much the insides of MLPs can be narrower, all alike, and still be 16 wide or more."""
    parts = anatomy.of(model)
    width = parts.hidden_size or 0
    inside = {size for _, layer in parts.layers for p in layer.parameters() for size in p.shape if size > width}
    found = 1
    while inside and all(size % (2 * found) == 0 and size // (2 * found) >= 16 for size in inside):
        found *= 2
    return found
