"""Finding a circuit and measuring it: batches of pairs, progress, what is finished kept on disk."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
import warnings
from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from gim.circuits import probe
from gim.circuits.curve import MIB_SIZES, ORDERS, Curve
from gim.circuits.metrics import METRICS, Metric, logit_difference, name_of
from gim.circuits.pairs import Encoded, Pair, batches, encode, read
from gim.circuits.patching import Patcher
from gim.circuits.result import Circuit
from gim.circuits.scores import LEVELS, Batch, Level, Scorer, check_metric
from gim.evaluation import fingerprint
from gim.evaluation.extras import need
from gim.evaluation.store import Store
from gim.files import check_writable, write_atomically
from gim.inputs import check_progress
from gim.parts import anatomy
from gim.plan import MemoryPlan
from gim.rules import Rules
from gim.rules import get as get_rules
from gim.targets import counted, counted_or_none
from gim_kernels.types import Engine

#: Called with (pairs done, pairs in all, seconds left as far as can be told or None).
Progress = Callable[[int, int, float | None], None]

#: Tokens of a batch where nothing else is asked for: on a CPU, and on a GPU.
BATCH_TOKENS = {"cpu": 128}
BATCH_TOKENS_GPU = 2048
CONSTANT = "the softmax is constant under these rules, so every edge into a q or a k has the score 0"


class CircuitInterrupted(KeyboardInterrupt):
    """Ctrl-C came while pairs were scored.

    Args:
        circuit: the mean over the pairs that were finished; None where there is none.
    """

    def __init__(self, circuit: Circuit | None) -> None:
        super().__init__("the search for a circuit was interrupted")
        self.circuit = circuit


class CurveInterrupted(KeyboardInterrupt):
    """Ctrl-C came while a circuit was measured.

    Args:
        curve: over the pairs that were finished; None where there is none, or their metric is the same on clean and
            corrupted prompts.
    """

    def __init__(self, curve: Curve | None) -> None:
        super().__init__("the measurement of a circuit was interrupted")
        self.curve = curve


def attribute(
    model: nn.Module,
    pairs: Iterable[Pair] | str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    rules: Rules | str = "GIM",
    level: Level = "edge",
    ig_steps: int | None = None,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
    metric: Metric | str = logit_difference,
    grouped: bool = False,
    memory: MemoryPlan | str = "none",
    engine: Engine = "auto",
    resume: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Circuit:
    """The score of every edge of a model, or of every node.

    A writer is the input, a head, or an MLP; a reader the q, k or v of a head, an MLP, or the end. The score of an edge
    is the mean over pairs of::

        sum over tokens, channels of (corrupted - clean)(what the writer writes) . d(-metric) / d(what the reader reads)

    that is, what the metric would lose, to first order under the rules, if that reader alone saw the corrupted writer.
    Two forward passes and one backward give all of them. Where a norm stands between attention and the stream, each
    run's own statistic of it goes to each of its heads, so that heads add up to what attention writes.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        pairs: :class:`Pair` in a list; the name of a task that comes in pairs; or a file or folder as
            :func:`gim.circuits.read` takes them.
        tokenizer: cuts texts; not needed for ids.
        rules: of the backward.
        level: ``"edge"``, or ``"node"``: the sum over each writer's edges, at the cost of an attribution.
        ig_steps: EAP-IG: the gradient is the mean over this many points, from the corrupted input on, of what the first
            layer reads; None for that at the clean prompt.
        batch_tokens: tokens of one batch of pairs of one length, at most, but for a longer pair. Scores do not depend
            on it but for rounding.
        progress: called with pairs done, pairs in all and seconds left, None before that can be told.
        metric: from logits ``[B, V]`` and each pair's (right ids, wrong ids) to numbers ``[B]``; or a name of
            ``gim.circuits.metrics.METRICS``: ``"logit_difference"``, ``"probability_difference"``.
        grouped: count k and v for each key head, the sum over its query heads, and not for each query head.
        memory: what is kept for the backward, a plan or its name; ``"auto"`` for the fastest that fits
            beside what every part of the model writes.
        engine: as in :class:`gim.GIM`.
        resume: a file that keeps the sum over finished pairs, and that another call of the same goes on from. A metric
            of your own is told from another as functions are in :func:`gim.evaluate`.
        limit: pairs, at most.
        seed: of a task's pairs.

    Returns:
        The circuit, with scores in float64.

    Raises:
        UnsupportedModelError: the model's writers and readers are not all found, or a norm in front of attention has
            hooks of the user's, which would run for every reader; names the layer.
        ValueError, TypeError: an argument that does not fit; pairs of unequal length or answers that are no single
            token, with the pair's place and the argument.
        FloatingPointError: numbers that are not finite.
        CircuitInterrupted: Ctrl-C; what is finished is in its ``circuit``.

    Source: Syed et al. 2023, arXiv 2310.10348 (edge attribution patching); Hanna et al. 2024, arXiv 2403.17806
        (EAP-IG); Mueller et al. 2025, arXiv 2504.13151 (MIB); Edin et al. 2025, arXiv 2505.17630 (the rules).

    Example:
        >>> import gim, gim.demo
        >>> from gim import circuits
        >>> model, tokenizer = gim.demo.load()
        >>> text = "The password of Irene is {}. The password of Irene is"
        >>> pair = circuits.Pair(text.format("lantern"), text.format("copper"), " lantern", " copper")
        >>> circuits.attribute(model, [pair], tokenizer=tokenizer).graph.edge_count
        479
    """
    metric = _metric(metric)
    _check(level, grouped, memory)
    ig_steps = counted_or_none("ig_steps", ig_steps)
    batch_tokens, limit = counted_or_none("batch_tokens", batch_tokens), counted_or_none("limit", limit)
    seed = counted("seed", seed, 0)
    check_progress(progress)
    chosen = get_rules(rules)
    _check_model(model)
    with anatomy.held(model) as parts:
        given = read(pairs, tokenizer, seed=seed, limit=limit)
        encoded = encode(model, given, tokenizer)
        for one, where in zip(encoded, given.places, strict=True):
            if one.clean == one.corrupted:
                raise ValueError(f"{where}: clean and corrupted are the same tokens, so nothing tells them apart")
        found = probe.find(model, torch.tensor(encoded[0].clean, device=parts.device))
        graph = found.graph(grouped=grouped)
        scorer = Scorer(model, found, graph.ungrouped(), chosen, metric, level, ig_steps, memory, engine)
        settings = {
            "model": type(model).__name__,
            "weights": fingerprint.of_model(model),
            "rules": chosen.to_dict(),
            "level": level,
            "ig_steps": ig_steps,
            "metric": _key(metric),
            "grouped": grouped,
            "dtype": str(parts.dtype),
            "pairs": [pair.digest for pair in encoded],
            "versions": fingerprint.versions(),
        }
        notes = [CONSTANT] if chosen.softmax == "constant" else []
        about = {
            **{name: value for name, value in settings.items() if name != "pairs"},
            "metric": name_of(metric),
            "name": fingerprint.name_of(model),
            "rules_name": chosen.name,
            "passed_by": given.passed_by,
            "notes": notes,
        }
        for note in notes:
            warnings.warn(f"gim.circuits: {note}", stacklevel=2)
        tokens = batch_tokens or BATCH_TOKENS.get(parts.device.type, BATCH_TOKENS_GPU)
        sums = _Sums(resume, settings, scorer.shape, len(encoded))

        def result() -> Circuit:
            mean = sums.total / len(sums.done)
            return Circuit(
                graph, graph.gather(mean) if level == "edge" else mean, {**about, "pairs": len(sums.done)},
                model=model, tokenizer=tokenizer, metric=metric,
            )  # fmt: skip

        try:
            _run(
                model, encoded, tokens, sums.done, progress,
                lambda places, batch: sums.add(places, scorer.scores(batch)),
            )  # fmt: skip
        except KeyboardInterrupt as error:
            raise CircuitInterrupted(result() if sums.done else None) from error
    return result()


def _run(
    model: nn.Module,
    pairs: Sequence[Encoded],
    tokens: int,
    done: Container[int],
    progress: Progress | None,
    finish: Callable[[list[int], Batch], None],
) -> None:
    """Have every pair that is not done finished, batch by batch, each with its places."""
    left = [index for index in range(len(pairs)) if index not in done]
    ticks = _Ticks(progress, len(pairs), len(pairs) - len(left))
    for places, batch in batches(model, [pairs[index] for index in left], tokens):
        finish([left[place] for place in places], batch)
        ticks.done(len(places))


class _Ticks:
    """Tells whoever asked how far the work is."""

    def __init__(self, progress: Progress | None, total: int, before: int) -> None:
        self._progress, self._total, self._before, self._done = progress, total, before, before
        self._started = time.monotonic()
        self.done(0)

    def done(self, pairs: int) -> None:
        self._done += pairs
        if self._progress is not None:
            fresh = self._done - self._before
            each = (time.monotonic() - self._started) / fresh if fresh else None
            self._progress(self._done, self._total, None if each is None else each * (self._total - self._done))


class _Sums:
    """The sum over finished pairs, in a file where one is given.

    Args:
        path: the file; None for none.
        settings: what the sum depends on. A file with other settings is refused, and left as it is.
        shape: of the sum.
        pairs: how many there are in all.

    Raises:
        ValueError: the file is none of these, or of another model, rules, versions or pairs; names what differs.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, settings: dict[str, Any], shape: tuple[int, ...], pairs: int
    ) -> None:
        self.total = torch.zeros(shape, dtype=torch.float64, device="cpu")
        self.done: set[int] = set()
        self._path: Path | None = None
        self._settings = json.loads(json.dumps(settings))
        if path is None:
            return
        check_writable(path, "resume")
        self._path = Path(path)
        if self._path.exists() and self._path.stat().st_size:
            self._read(self._path, pairs)

    def _read(self, path: Path, pairs: int) -> None:
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                there, done = (json.loads(metadata[name]) for name in ("settings", "done"))
                total = file.get_tensor("total")
            there, done = dict(there), set(done)
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise ValueError(f"resume: {path} is no file of a search for a circuit: {error}") from error
        for name, value in self._settings.items():
            if there.get(name) != value:
                shown = "" if name == "pairs" else f": {there.get(name)!r:.120} there, {value!r:.120} here"
                raise ValueError(f"resume: {path} was made with other {name}{shown}; give another file to start anew")
        whole = total.dtype == self.total.dtype and total.shape == self.total.shape and bool(total.isfinite().all())
        if not whole or not done <= set(range(pairs)):
            raise ValueError(f"resume: {path} does not hold the sum over some of these {pairs} pairs")
        if metadata != self._metadata(total, done):
            raise ValueError(f"resume: {path} is not as it was written; give another file to start anew")
        self.total, self.done = total, done

    def add(self, places: Sequence[int], scores: torch.Tensor) -> None:
        """Add pairs, on the disk before this returns."""
        total, done = self.total + scores, self.done | set(places)
        if self._path is not None:
            write_atomically(self._path, safetensors.torch.save({"total": total}, self._metadata(total, done)))
        self.total, self.done = total, done

    def _metadata(self, total: torch.Tensor, done: set[int]) -> dict[str, str]:
        """What is written beside the sum, and by which it is known to be what was written."""
        written = {"settings": json.dumps(self._settings), "done": json.dumps(sorted(done))}
        known = json.dumps(written).encode() + total.numpy().tobytes()
        return {**written, "sum": hashlib.sha256(known).hexdigest()[:16]}


# ---------------------------------------------------------------------------------------------------- faithfulness


def faithfulness(
    circuit: Circuit,
    model: nn.Module,
    pairs: Iterable[Pair] | str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    sizes: Sequence[float] = MIB_SIZES,
    metric: Metric | str = logit_difference,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
    resume: str | os.PathLike[str] | None = None,
    engine: Engine = "auto",
    limit: int | None = None,
    skip: int = 0,
    seed: int = 0,
) -> Curve:
    """How much of the metric circuits of every size keep; see :meth:`Circuit.faithfulness`."""
    need("scipy.stats", "circuits")
    sizes = _sizes(sizes)
    metric = _metric(metric)
    batch_tokens, limit = counted_or_none("batch_tokens", batch_tokens), counted_or_none("limit", limit)
    skip, seed = counted("skip", skip, 0), counted("seed", seed, 0)
    check_progress(progress)
    _check_model(model)
    with anatomy.held(model) as parts:
        encoded = encode(model, read(pairs, tokenizer, seed=seed, limit=limit, skip=skip), tokenizer)
        found = probe.find(model, torch.tensor(encoded[0].clean, device=parts.device))
        whole = found.graph()
        if whole != circuit.graph.ungrouped():
            raise ValueError(f"model has other writers and readers than the circuit: {whole} and {circuit.graph}")
        counts = [int(size * circuit.count) for size in sizes]
        kept = {order: [circuit.kept(count, absolute=order == "absolute") for count in counts] for order in ORDERS}
        cuts = {order: [1 - circuit.graph.expand(one).float() for one in several] for order, several in kept.items()}
        digests = [pair.digest for pair in encoded]
        settings = {
            "weights": fingerprint.of_model(model), "circuit": circuit.digest, "metric": _key(metric),
            "sizes": list(sizes), "versions": fingerprint.versions(),
        }  # fmt: skip
        store = None if resume is None else Store(resume, settings, digests)
        records: dict[int, Any] = {} if store is None else store.records

        def result() -> Curve:
            rows = [records[index] for index in sorted(records)]
            clean, corrupted, *values = ([row[name] for row in rows] for name in ("clean", "corrupted", *ORDERS))
            edges: dict[str, Sequence[int]] = {
                order: [int(one.sum()) for one in several] for order, several in kept.items()
            }
            return Curve(clean, corrupted, dict(zip(ORDERS, values, strict=True)), sizes, counts, edges, seed)

        def finish(places: list[int], batch: Batch) -> None:
            for index, record in zip(places, _measured(patcher, batch, cuts, metric), strict=True):
                record |= {"example": index, "digest": digests[index]}
                if store is None:
                    records[index] = record
                else:
                    store.add(record)

        patcher = Patcher(model, found, whole, engine)
        tokens = batch_tokens or BATCH_TOKENS.get(parts.device.type, BATCH_TOKENS_GPU)
        try:
            _run(model, encoded, tokens, records, progress, finish)
        except KeyboardInterrupt as error:
            curve = None
            if records:
                with suppress(ValueError):  # whose metric is the same on both prompts so far; others may differ
                    curve = result()
            raise CurveInterrupted(curve) from error
    return result()


def _measured(
    patcher: Patcher, batch: Batch, cuts: dict[str, list[torch.Tensor]], metric: Metric
) -> list[dict[str, Any]]:
    """Of every pair the metric of the model itself, and of each circuit; the same circuit runs once."""

    def said(logits: torch.Tensor) -> list[float]:
        with torch.no_grad():
            values = metric(logits, batch.answers)
        check_metric(values, len(batch))
        return values.double().tolist()

    clean = said(patcher.plain(batch.clean)[0])
    logits, parts = patcher.plain(batch.corrupted)
    known = [(torch.ones_like(cuts[ORDERS[0]][0]), said(logits))]
    columns: dict[str, list[list[float]]] = {order: [] for order in ORDERS}
    for order, several in cuts.items():
        for cut in several:
            values = next((one for other, one in known if torch.equal(other, cut)), None)
            if values is None:
                values = said(patcher.logits(batch, parts, cut))
                known.append((cut, values))
            columns[order].append(values)
    of_pair = {order: list(zip(*one, strict=True)) for order, one in columns.items()}
    corrupted = known[0][1]
    return [
        {"clean": clean[row], "corrupted": corrupted[row], **{order: list(of_pair[order][row]) for order in ORDERS}}
        for row in range(len(batch))
    ]


# ------------------------------------------------------------------------------------------------------- arguments


def _sizes(sizes: Sequence[float]) -> tuple[float, ...]:
    found = tuple(sizes) if isinstance(sizes, Iterable) else ()
    rising = all(a < b for a, b in itertools.pairwise(found))
    if len(found) < 2 or not rising or not all(isinstance(one, int | float) and 0 <= one <= 1 for one in found):
        raise ValueError(f"sizes must be two shares of all edges at least, rising, in 0..1, got {sizes!r:.80}")
    return found


def _check(level: str, grouped: Any, memory: Any) -> None:
    if level not in LEVELS:
        raise ValueError(f"level must be one of {LEVELS}, got {level!r:.80}")
    if not isinstance(grouped, bool):
        raise TypeError(f"grouped must be True or False, got {grouped!r:.80}")
    if not isinstance(memory, MemoryPlan | str):
        raise TypeError(f"memory must be a MemoryPlan or a plan's name, got {memory!r:.80}")


def _metric(metric: Any) -> Metric:
    """A metric by its name, or as it is."""
    if isinstance(metric, str) and metric not in METRICS:
        raise ValueError(f"metric must be a function or one of {', '.join(METRICS)}, got {metric!r:.80}")
    found = METRICS[metric] if isinstance(metric, str) else metric
    if not callable(found):
        raise TypeError(f"metric must be a function of logits and answers, or its name, got {metric!r:.80}")
    return found


def _key(metric: Metric) -> str:
    """What tells a metric from another: one of our own its name, a function of the user's its code too."""
    return name_of(metric) if metric in METRICS.values() else fingerprint.of_function(metric)


def _check_model(model: nn.Module) -> None:
    if anatomy.of(model).head != "next token":
        raise ValueError(f"model must be a causal language model, got {type(model).__name__}")
