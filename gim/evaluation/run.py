"""The evaluation: every example, every method, every masked input once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import nn

from gim import targets
from gim.evaluation import data as examples
from gim.evaluation import fingerprint
from gim.evaluation.case import Case
from gim.evaluation.data import Kept
from gim.evaluation.extras import need
from gim.evaluation.measures import MEASURES, MeasureName, Record
from gim.evaluation.methods import Method, MethodLike, parse
from gim.evaluation.perturbation import (
    GRIDS,
    PROTOCOLS,
    Forwards,
    Grid,
    GridName,
    Masked,
    Protocol,
    first,
    last,
    ranking,
)
from gim.evaluation.result import Evaluation
from gim.evaluation.store import Store
from gim.evaluation.tasks import TASKS
from gim.inputs import check_progress, check_token_id, infer_baseline
from gim.parts import anatomy
from gim.targets import TokenLike

#: Called with (examples done, examples in all, seconds left as far as can be told or None).
Progress = Callable[[int, int, float | None], None]


class EvaluationInterrupted(KeyboardInterrupt):
    """Ctrl-C came while examples were evaluated.

    Args:
        evaluation: of the examples that were finished; None where there is none.
    """

    def __init__(self, evaluation: Evaluation | None) -> None:
        super().__init__("the evaluation was interrupted")
        self.evaluation = evaluation


@dataclass(frozen=True)
class _Plan:
    """What is done with each example."""

    model: nn.Module
    forwards: Forwards
    methods: Sequence[Method]
    grid: GridName
    baseline_id: int
    seed: int


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    data: Any,
    *,
    methods: Iterable[MethodLike] | MethodLike = ("GIM", "ATTNLRP", "IG:50", "occlusion", "random"),
    measures: Iterable[MeasureName] | MeasureName = ("logprob", "logit"),
    protocol: Protocol = "aopc",
    grid: GridName = "full",
    baseline: TokenLike | None = None,
    batch_tokens: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    resume: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    forward_dtype: torch.dtype | None = None,
) -> Evaluation:
    """How faithful attributions are: what a model still says where the tokens that they point at are replaced.

    Every method scores every token of a prompt for the logit of what comes next. Tokens are then replaced by the
    baseline token, highest scores first (comprehensiveness: what the model said should go) and lowest first
    (sufficiency: it should stay). The order is that of the signed scores, of equal ones the earlier token first; the
    first and the last token are never replaced. An input that several methods ask for runs once.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: its fast tokenizer.
        data: a task in the box by name (``gim.evaluation.tasks.TASKS``); texts, or pairs (text, target), or triples
            (text, target, foil), or mappings with ``text``, ``target``, ``foil`` and ``id``; a file ``.jsonl`` or
            ``.parquet`` of such, a ``datasets`` Dataset, or a folder that one was saved to. A target or foil is one
            token, as id or text, or a list of such. No code that comes with data is run.
            Kept are examples that the model has right: of the targets and foils together, a target is the most likely;
            without foils, of the vocabulary. Without a target the model's prediction is explained.
        methods: presets of :mod:`gim.rules`, :class:`gim.rules.Rules`; ``gradient_x_input`` (no baseline),
            ``gradient_x_difference``, ``IG:steps``, ``occlusion``, ``KernelSHAP:samples``, ``LIME:samples``,
            ``DeepLIFT`` (all captum's), ``attention``, ``random``; or functions from ids ``[T]`` to scores ``[T]``,
            which ``resume`` tells apart by their code and the plain values they hold, not by what else they read.
        measures: f, the number that is compared: ``logprob``, ``logit``, ``logodds``, ``contrast`` (logit of the target
            minus that of the foil, which is the most likely other token where none is given).
        protocol: ``"aopc"``: the means over k = 1..min(50, T - 2) and over the shares .5, .8, .9, .95, .99.
            ``"paper"``: those of the GIM paper's code, whose mean over k is over 50 always, with zeros for what a
            shorter prompt has not; its own measure is ``logit``.
        grid: ``"coarse"``: k = 1, 2, 4, 8 and the shares .5, .8, .9; cheap, without ``loo_correlation``.
        baseline: the token that stands for "nothing", as id or text; None as in :func:`gim.explain`.
        batch_tokens: tokens of one forward of masked inputs, at most. Results do not depend on it but for rounding.
        seed: of a task's prompts, of what methods draw, and of the bootstrap.
        progress: called with examples done, examples in all and seconds left, None before that can be told.
        resume: a file that keeps each finished example, and that another call of the same goes on from.
        limit: examples that the model has right, at most; None for all, and for 100 of a task.
        forward_dtype: a type for the forwards of masked inputs, such as ``torch.bfloat16``, in a copy of the model.

    Returns:
        The evaluation.

    Raises:
        ValueError: an argument that does not fit, no example that the model has right, an id twice, a row that is not
            whole, a resume file of another model, rules, versions or data; names argument and row.
        ImportError: a package of the extra ``evaluate`` is missing; names it.
        OSError: a file cannot be read or written.
        EvaluationInterrupted: Ctrl-C; what is finished is in its ``evaluation``.

    Numerics: under ``logit`` comprehensiveness and sufficiency are ratios to f(x), as in the paper's code. A constant
        added to all logits, which no softmax sees, changes them and the order of methods; log-probabilities it does
        not change. Look at ``logprob`` first.

    Source: DeYoung et al. 2020, arXiv 1911.03429; Edin et al. 2025, arXiv 2505.17630.

    Example:
        >>> import gim, gim.demo
        >>> model, tokenizer = gim.demo.load()
        >>> texts = [gim.demo.make_prompt(seed, facts=2).text for seed in range(3)]
        >>> found = gim.evaluate(model, tokenizer, texts, methods=("GIM", "random"), grid="coarse")
        >>> sorted(found.to_dataframe().columns)
        ['example', 'measure', 'method', 'metric', 'value']
    """
    for module in ("scipy.stats", "pandas"):
        need(module)
    check_progress(progress)
    wanted = _measures(measures)
    _check(protocol, grid, forward_dtype)
    batch_tokens = targets.counted_or_none("batch_tokens", batch_tokens)
    limit = targets.counted_or_none("limit", limit)
    seed = targets.counted("seed", seed, 0)
    _check_model(model)
    chosen = parse(methods)
    baseline_id = infer_baseline(tokenizer) if baseline is None else targets.token_id(baseline, tokenizer, "baseline")
    with suppress(TypeError):  # a model that does not say what embeds says no size of its vocabulary
        check_token_id(model, "baseline", baseline_id)
    forwards = Forwards(model, forward_dtype, batch_tokens)
    with anatomy.held(model):
        rows = examples.read(data, tokenizer, seed=seed, limit=limit)
        if isinstance(data, str) and data in TASKS and limit is None:
            limit = examples.TASK_EXAMPLES
        found = examples.choose(model, tokenizer, forwards, rows, limit)
        settings = {
            "model": type(model).__name__,
            "weights": fingerprint.of_model(model),
            "methods": [[method.name, method.key] for method in chosen],
            "grid": grid,
            "baseline": baseline_id,
            "seed": seed,
            "dtype": str(forward_dtype or anatomy.of(model).dtype),
            "versions": fingerprint.versions(),
        }
        digests = [fingerprint.of_example(kept) for kept in found.kept]
        store = None if resume is None else Store(resume, settings, digests)
        plan = _Plan(model, forwards, chosen, grid, baseline_id, seed)
        about = {
            **settings,
            "name": fingerprint.name_of(model),
            "protocol": protocol,
            "seen": found.seen,
            "dropped": found.dropped,
        }
        records: dict[int, Record] = {} if store is None else store.records

        def result() -> Evaluation:
            return Evaluation([records[index] for index in sorted(records)], wanted, about)

        try:
            _run(plan, found.kept, digests, records, store, progress)
        except KeyboardInterrupt as error:
            raise EvaluationInterrupted(result() if records else None) from error
        return result()


def _run(
    plan: _Plan,
    kept: Sequence[Kept],
    digests: Sequence[str],
    records: dict[int, Record],
    store: Store | None,
    progress: Progress | None,
) -> None:
    """Evaluate every example that is not among the records, and put it there."""
    total, before = len(kept), len(records)
    started = time.monotonic()
    if progress is not None:
        progress(before, total, None)
    for index, one in enumerate(kept):
        if index in records:
            continue
        record = _record(plan, one, index, digests[index])
        if store is None:
            records[index] = record
        else:
            store.add(record)
        if progress is not None:
            done = len(records)
            progress(done, total, (time.monotonic() - started) / (done - before) * (total - done))


def _record(plan: _Plan, kept: Kept, index: int, digest: str) -> Record:
    """Everything that is measured on one example: what the model says, not yet what that is worth."""
    ids, what = kept.ids, f"example {index} ({kept.example.where})"
    masked = Masked(plan.forwards, ids, kept.target, kept.foil, plan.baseline_id, kept.whole)
    case = Case(plan.model, ids, kept.target, plan.baseline_id, masked, plan.seed, what, digest)
    grid = Grid.of(plan.grid, len(ids) - 2)
    scores: dict[str, torch.Tensor] = {}
    seconds: dict[str, float] = {}
    for method in plan.methods:
        started = time.perf_counter()
        try:
            scores[method.name] = method.scores(case)
        except Exception as error:
            error.add_note(f"method {method.name} on {what}")
            raise
        seconds[method.name] = time.perf_counter() - started
    sets: dict[str, tuple[list[list[int]], list[list[int]]]] = {}
    for name, one in scores.items():
        ranked = ranking(one)
        sets[name] = (
            [first(ranked, count) for count in grid.counts],
            [last(ranked, share) for share in grid.shares],
        )
    single = [[position] for position in range(1, len(ids) - 1)] if plan.grid == "full" else []
    started = time.perf_counter()
    # All at once, so that batches are full.
    masked.of_sets([[], *single, *(one for pair in sets.values() for several in pair for one in several)])
    seconds["masked inputs"] = time.perf_counter() - started

    def said(several: Sequence[Sequence[int]]) -> list[list[float]]:
        return [one.to_list() for one in masked.of_sets(several)]

    return {
        "example": index,
        "id": kept.example.id,
        "digest": digest,
        "tokens": len(ids),
        "target": kept.target,
        "foil": kept.foil,
        "counts": list(grid.counts),
        "shares": list(grid.shares),
        "whole": said([[]])[0],
        "single": said(single) if single else None,
        "methods": {
            name: {"scores": scores[name].tolist(), "first": said(highest), "last": said(lowest)}
            for name, (highest, lowest) in sets.items()
        },
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
    }


# ------------------------------------------------------------------------------------------------------- arguments


def _measures(measures: Iterable[MeasureName] | MeasureName) -> list[MeasureName]:
    found = list(measures) if isinstance(measures, Iterable) and not isinstance(measures, str) else [measures]
    for one in found:
        if not isinstance(one, str) or one not in MEASURES:
            raise ValueError(f"measures must be of {', '.join(get_args(MeasureName))}, got {one!r:.80}")
    if not found or len(set(found)) < len(found):
        raise ValueError(f"measures must hold at least one, and none twice, got {found!r}")
    return found


def _check(protocol: str, grid: str, forward_dtype: Any) -> None:
    if not isinstance(protocol, str) or protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {PROTOCOLS}, got {protocol!r:.80}")
    if not isinstance(grid, str) or grid not in GRIDS:
        raise ValueError(f"grid must be one of {GRIDS}, got {grid!r:.80}")
    if protocol == "paper" and grid != "full":
        raise ValueError("protocol 'paper' has one grid, 'full': on another its numbers are not the paper's")
    if forward_dtype is not None and not (isinstance(forward_dtype, torch.dtype) and forward_dtype.is_floating_point):
        raise TypeError(f"forward_dtype must be a floating-point torch.dtype or None, got {forward_dtype!r:.80}")


def _check_model(model: nn.Module) -> None:
    parts = anatomy.of(model)
    parts.call.refuse()
    if parts.head != "next token":
        raise ValueError(f"model must be a causal language model, got {type(model).__name__}")
    for name, module in parts.modules.items():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise ValueError(f"model must be in evaluation mode (model.eval()): dropout acts in {name or 'it'}")
