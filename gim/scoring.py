"""One forward and one backward under the rules: from checked ids to scores."""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from gim import checkpoint, embedded
from gim.applied import AppliedReport
from gim.context import GIM
from gim.intercept.gates import Changes
from gim.intercept.session import session_of, stack_of
from gim.nonfinite import first_nonfinite_gradient, refuse_nonfinite
from gim.parts import anatomy
from gim.parts.anatomy import Anatomy
from gim.parts.calling import Kept, MadeOfLogitsError, Prepared, Rows
from gim.parts.layers import stream
from gim.parts.parameters import frozen_parameters, named_parameters
from gim.plan import MemoryPlan
from gim.rules import Rules
from gim.taps import Taps
from gim.taps import applied as tapped
from gim.targets import LIKELIEST, Measure, Per
from gim_kernels import engines
from gim_kernels.types import Engine

#: Called with ("forward" or "backward", layers done, layers in all).
Progress = Callable[[str, int, int], None]

#: Tokens whose scores are computed at once.
SCORE_TILE = 4096
#: In float16 a small gradient has few bits or none and a large one is infinite: the explained number's own, of which
#: all others are multiples, is scaled by these powers of two, one after another. Attributions are divided by it.
HALF_SEEDS = (2.0**8, 1.0, 2.0**-8)


#: Stands in ``Terms.token_ids`` for the model's own prediction.
PREDICTION = -1


@dataclass(frozen=True)
class Terms:
    """Terms of the explained number: for each row, at ``positions``, ``token_ids`` times ``signs`` are summed.

    ``token_ids`` of :data:`PREDICTION` stand for the model's own prediction. All are ``[B, P]``.

    With ``total``, of a batch of one, each term is a number explained by itself, and after them all comes their sum
    under the measure ``total``: N = P + 1 numbers of one forward. Ctrl-C among their backwards leaves the first of the
    terms, and the sum of these.
    """

    positions: torch.Tensor
    token_ids: torch.Tensor
    signs: torch.Tensor
    measure: Measure
    total: Measure | None = None


class Numbers(NamedTuple):
    """What one forward and its backward tell; with :attr:`Terms.total` N numbers take the place of the rows B.

    Args:
        scores: ``[B, L]``, float32 or float64.
        token_ids: ``[B, P]``, predictions filled in.
        values: ``[B]``, the explained numbers.
        likeliest: ``[B, 5]``, the ids of largest logits at each row's first position, largest first; with
            :attr:`Terms.total` ``[P, 6]``, at every position, and last the one explained there.
        probabilities: theirs.
        inside: where :attr:`Request.per` asks, of the stream that each layer reads ``[B, layers, L]``, or of each head
            ``[B, layers, heads]``; else None.
        of_rows: whether the logits are of each row as a whole, and so of classes.
    """

    scores: torch.Tensor
    token_ids: torch.Tensor
    values: torch.Tensor
    likeliest: torch.Tensor
    probabilities: torch.Tensor
    inside: torch.Tensor | None
    of_rows: bool


@dataclass(frozen=True)
class Result:
    """:class:`Numbers` in the columns of the batch as it was given, what was applied, and under which plan."""

    scores: torch.Tensor
    token_ids: torch.Tensor
    values: torch.Tensor
    likeliest: torch.Tensor
    probabilities: torch.Tensor
    inside: torch.Tensor | None
    of_rows: bool
    report: AppliedReport
    plan: MemoryPlan
    memory: str = ""  # the plan in words


@dataclass(frozen=True)
class Request:
    """A checked batch and what is wanted of it.

    Args:
        rows: the batch as the model reads it, ``[B, L]``, or ``[1, L]`` packed.
        scored: what is explained, its positions columns of ``rows``.
        kept: every row's positions together: the head runs on these.
        where: ``[B, P]``, each row's positions among ``kept``.
        per: what is looked at beside the tokens; None for nothing.
    """

    rows: Rows
    scored: Terms
    kept: Kept
    where: torch.Tensor
    per: Per | None = None

    @property
    def numbers(self) -> int:
        """How many gradients are wanted."""
        return self.where.shape[1] + 1 if self.scored.total else 1

    @classmethod
    def of(
        cls,
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        scored: Terms,
        position_ids: torch.Tensor | None = None,
        pad_token_id: int | None = None,
        per: Per | None = None,
        packed: bool = False,
    ) -> Request:
        """The request for a batch ``[B, T]``, whose positions count its columns; with ``packed`` its rows in one."""
        rows = Rows.in_one(ids, mask) if packed else Rows.of(ids, mask, position_ids, pad_token_id)
        positions = rows.columns(scored.positions.to(ids.device).expand(ids.shape[0], -1))
        # The head runs on the union of all rows' positions; each row then takes its own.
        kept, where = torch.unique(positions, return_inverse=True)
        return cls(
            rows,
            dataclasses.replace(scored, positions=positions),
            Kept(kept, rows.ids.shape[1]),
            where.view(positions.shape),
            per,
        )


def run(
    model: nn.Module,
    request: Request,
    baseline_id: int,
    rules: Rules,
    plan: MemoryPlan,
    progress: Progress | None,
    strict: bool = True,
    engine: Engine = "auto",
    at_once: int = 1,
) -> Result:
    """One forward and one backward over a checked batch, its memory spent by a plan.

    Where several numbers are explained, backwards take ``at_once`` of them together.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("explain cannot run under torch.inference_mode(): gradients do not exist there")
    parts = anatomy.of(model)
    plan = checkpoint.suited(plan, model)
    try:
        return _run(model, parts, request, baseline_id, rules, plan, progress, strict, engine, at_once)
    except MadeOfLogitsError:
        if plan.head == "all":
            raise
    plan = dataclasses.replace(plan, head="all")
    return _run(model, parts, request, baseline_id, rules, plan, progress, strict, engine, at_once)


def _run(
    model: nn.Module,
    parts: Anatomy,
    request: Request,
    baseline_id: int,
    rules: Rules,
    plan: MemoryPlan,
    progress: Progress | None,
    strict: bool,
    engine: Engine,
    at_once: int,
) -> Result:
    """:func:`run` under exactly this plan."""
    # One explanation of a model at a time: a plan and frozen weights are the model's, not a thread's.
    with (
        stack_of(model).exclusive,
        GIM(model, rules=rules, strict=strict, engine=engine) as report,
        ExitStack() as stack,
    ):
        backwards = -(-request.numbers // at_once)
        taps = looked_at(model, request, stack)
        stack.enter_context(
            checkpoint.applied(plan, model, request.kept, request.rows.ids.device, several=backwards > 1)
        )
        if progress is not None:
            stack.enter_context(_reporting(parts, progress, backwards))
        numbers = passes(model, request, baseline_id, plan, at_once=at_once, taps=taps)
        session = session_of(model)
        if strict and session is not None and session.proof.runs_new_code:
            numbers = passes(model, request, baseline_id, plan, at_once=at_once, taps=taps)  # which is watched
    if not request.scored.total:
        numbers = numbers._replace(scores=request.rows.as_given(numbers.scores))
    if request.per == "layer" and numbers.inside is not None:
        rows = [request.rows.as_given(row) for row in numbers.inside.unbind(1)]
        numbers = numbers._replace(inside=torch.stack(rows, 1))
    return Result(*numbers, report, plan)


def looked_at(model: nn.Module, request: Request, stack: ExitStack) -> Taps | None:
    """What looks at the model's inside until the stack closes, where that is asked for; before a plan is applied."""
    if request.per is None:
        return None
    return stack.enter_context(tapped(request.per, model, request.rows))


def passes(
    model: nn.Module,
    request: Request,
    baseline_id: int,
    plan: MemoryPlan,
    *,
    check: bool = True,
    at_once: int = 1,
    taps: Taps | None = None,
) -> Numbers:
    """Forward and backward inside a GIM context with its plan applied.

    ``check=False`` looks at no number, for tensors without any.
    """

    def tried(seed: float, names: bool = False) -> Numbers | None:
        def run() -> Numbers | None:
            return _passes(model, request, baseline_id, plan, check, seed, at_once, taps, names)

        return embedded.copied_if_written(anatomy.of(model), run)

    *others, last = _seeds(model)
    for seed in others:
        found = tried(seed)
        if found is not None:
            return found
    found = tried(last, names=True)
    assert found is not None, "with names=True it raises instead"
    return found


def _seeds(model: nn.Module) -> tuple[float, ...]:
    """What the explained number's own gradient is taken to be, 1 but in float16, until one gives finite gradients."""
    held = named_parameters(anatomy.of(model).modules)
    halves = any(parameter.dtype == torch.float16 for _, parameter in held) or any(
        engines.autocasts(kind) and torch.get_autocast_dtype(kind) == torch.float16 for kind in ("cuda", "cpu")
    )
    return HALF_SEEDS if halves else (1.0,)


def _passes(
    model: nn.Module,
    request: Request,
    baseline_id: int,
    plan: MemoryPlan,
    check: bool,
    seed: float,
    at_once: int,
    taps: Taps | None,
    names: bool,
) -> Numbers | None:
    """:func:`passes` with one seed. Where the gradient is not finite None, or with ``names`` an error that names the
    module it comes from, for which the model runs once more."""
    parts = anatomy.of(model)
    if taps is not None:
        taps.begin()
    with torch.enable_grad(), frozen_parameters(model), ExitStack() as stack:
        session = session_of(model)
        assert session is not None, "a GIM context is open around this"
        leaf = stack.enter_context(embedded.leaf(parts, session, request.rows.ids))
        changes = stack.enter_context(closing(Changes(session)))
        prepared = parts.call.prepared(
            request.rows,
            request.kept,
            narrow=plan.head == "explained",
            leaves=leaf.made,
            replace_forward=changes.replace_forward,
        )
        numbers, wanted, likeliest, probabilities = _explained(parts, request, prepared, check)
        embeddings = leaf.only()
        if not numbers.requires_grad:
            raise ValueError("the logits do not depend on the input embeddings: the model detaches them")
        values = numbers.detach()
        # All rows of a batch together: none depends on another's tokens.
        explained = numbers if request.scored.total else numbers.sum()[None]
        del numbers
        found, places, finite = _backwards(parts, request, explained, embeddings, baseline_id, check, seed, at_once)
        if request.scored.total:
            values = values[places]
        del explained
        if not finite and not names:
            return None
        if not finite:
            module = first_nonfinite_gradient(parts, prepared.logits, wanted, request.where)
            raise FloatingPointError(
                f"the gradient holds NaN or infinity; going backwards, the first module whose output's gradient has "
                f"one is {module}"
            )
    inside = None if taps is None else taps.scores(found.device) / seed
    return Numbers(found / seed, wanted, values, likeliest, probabilities, inside, prepared.of_rows)


def _backwards(
    parts: Anatomy,
    request: Request,
    explained: torch.Tensor,
    leaf: torch.Tensor,
    baseline_id: int,
    check: bool,
    seed: float,
    at_once: int,
) -> tuple[torch.Tensor, list[int], bool]:
    """Scores of the explained numbers, where those are among ``explained``, and whether all gradients are finite."""
    mask, total, terms = request.rows.mask, request.scored.total, request.where.shape[1]
    found: list[torch.Tensor] = []

    def take(places: Sequence[int]) -> bool:
        for grad in gradients(explained, leaf, seed, at_once, places, keep=bool(total)):
            scores, finite = _scores(parts, leaf.detach(), grad, baseline_id, check)
            if mask is not None and finite:
                _refuse_others_that_are_read(parts.call.model, request.rows, mask, grad)
                scores = scores.masked_fill(~mask, 0.0)
            found.append(scores)
            del grad
            if not finite:
                return False
        return True

    places = [*range(terms), 2 * terms - 1] if total else [0]
    try:
        finite = take(places)
    except KeyboardInterrupt:
        done = min(terms, sum(map(len, found)))
        session = session_of(parts.call.model)
        if not total or not done or (session is not None and session.proof.runs_new_code):
            raise  # nothing is finished, or nothing of what was watched
        # What is finished is the attribution of the first terms, whose sum is one backward more.
        found[:] = [torch.cat(found)[:done]]
        places = [*range(done), terms + done - 1]
        finite = take(places[-1:])
    return torch.cat(found), places, finite


def _refuse_others_that_are_read(model: nn.Module, rows: Rows, mask: torch.Tensor, grad: torch.Tensor) -> None:
    """An error where what is explained depends on a place that is no row's: a row alone would give another."""
    read = torch.zeros_like(mask)
    read[~mask] = (grad[~mask] != 0).any(-1)
    if bool(read.any()) and rows.packed:
        raise ValueError(f"documents that {type(model).__name__} reads in one row depend on one another")
    if bool(read.any()):
        raise ValueError(
            f"{type(model).__name__} reads padding in row {int(read.any(-1).int().argmax())}, so a padded row does not "
            "give what it gives alone (its config may lack pad_token_id, or it pools over all tokens): explain rows "
            "one at a time"
        )


def _explained(parts: Anatomy, request: Request, prepared: Prepared, check: bool) -> tuple[torch.Tensor, ...]:
    """The explained numbers, which can be differentiated, then all of :class:`Numbers` but scores and values.

    Logits go out of scope here, so that the backward does not run beside them.
    """
    logits = prepared.logits()  # [B, K, V]
    if check:
        refuse_nonfinite(logits, parts, prepared.run)
    batch, device = request.where.shape[0], request.where.device
    if logits.device != device and not logits.is_meta:
        logits = logits.to(device)  # a model that is spread over devices puts its logits out on the last
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    rows = torch.arange(len(wide), device=device)[:, None]  # one where all rows are in one
    chosen = wide[rows, request.where]  # [B, P, V]
    wanted = request.scored.token_ids.to(device).expand(batch, -1)
    wanted = torch.where(wanted == PREDICTION, chosen.argmax(-1), wanted)
    if check and int(wanted.max()) >= chosen.shape[-1]:
        raise ValueError(
            f"target must be in 0..{chosen.shape[-1] - 1}, as many as there are logits, got {wanted.max()}"
        )
    scored = request.scored
    with torch.no_grad():
        shares = (chosen[0] if scored.total else chosen[:, 0]).softmax(-1)
        probabilities, likeliest = shares.topk(min(LIKELIEST, chosen.shape[-1]))
        if scored.total:
            likeliest = torch.cat([likeliest, wanted.mT], -1)
            probabilities = torch.cat([probabilities, shares.gather(-1, wanted.mT)], -1)
        del shares
    signs = scored.signs.to(device)
    terms = _measured(chosen, wanted, scored.measure) * signs
    numbers = terms.sum(-1)
    if scored.total:
        whole = terms if scored.total == scored.measure else _measured(chosen, wanted, scored.total) * signs
        # A sum for each place where the row may be cut.
        numbers = torch.cat([terms[0], whole[0].cumsum(-1)])
    return numbers, wanted.detach(), likeliest, probabilities


def _measured(logits: torch.Tensor, wanted: torch.Tensor, measure: Measure) -> torch.Tensor:
    """Of logits ``[B, P, V]`` the number of each wanted token ``[B, P]``."""
    at = wanted[..., None]
    own = logits.gather(-1, at)[..., 0]
    if measure == "logit":
        return own
    odds = own - logits.scatter(-1, at, -torch.inf).logsumexp(-1)
    # Of a token that is nearly certain, the backward of log_softmax has few digits: it takes a probability from 1.
    return odds if measure == "logodds" else torch.nn.functional.logsigmoid(odds)


@torch.no_grad()
def _scores(
    parts: Anatomy, embedded: torch.Tensor, grad: torch.Tensor, baseline_id: int, check: bool
) -> tuple[torch.Tensor, bool]:
    """``(embedding - baseline embedding) . gradient`` of every token ``[B, T]``, and whether the gradient is finite.
    Of one row of embeddings there may be several gradients.

    In tiles of tokens: in half precision, whole products in float32 would be larger than what the backward kept.
    """
    baseline = parts.embedding(torch.full((1, 1), baseline_id, device=parts.device))
    wide = torch.promote_types(embedded.dtype, torch.float32)
    scores = torch.empty(grad.shape[:-1], dtype=wide, device=embedded.device)
    finite = True
    for start in range(0, embedded.shape[1], SCORE_TILE):
        tokens = slice(start, start + SCORE_TILE)
        gradient = grad[:, tokens]
        finite = finite and (not check or bool(torch.isfinite(gradient).all()))
        difference = embedded[:, tokens].to(wide) - baseline.to(wide)
        scores[:, tokens] = (difference * gradient.to(wide)).sum(-1)
    return scores, finite


def gradients(
    numbers: torch.Tensor, leaf: torch.Tensor, seed: float, at_once: int, places: Sequence[int], keep: bool
) -> Iterator[torch.Tensor]:
    """The gradients of those of ``numbers`` ``[N]`` that stand at ``places``, each times ``seed``.

    They are with respect to a leaf of one row ``[1, T, W]``, or of one number with respect to any: ``at_once`` of them
    in a backward, as ``[at_once, T, W]``. The graph is left whole with ``keep``.

    A checkpoint runs a layer again once for all that are taken together. Where several together fail, for memory or
    because a part of the model does not let them, each is taken by itself, with a warning.
    """
    count = len(places)

    def backward(seeds: torch.Tensor, keep: bool = True) -> torch.Tensor:
        (grad,) = torch.autograd.grad(numbers, leaf, seeds, retain_graph=keep)
        return grad

    start = 0
    while start < count:
        stop = min(start + at_once, count)
        seeds = torch.zeros(stop - start, len(numbers), dtype=numbers.dtype, device=numbers.device)
        seeds[range(stop - start), places[start:stop]] = seed
        if len(seeds) > 1:
            try:
                grad = torch.func.vmap(backward)(seeds)[:, 0]
            except (RuntimeError, TypeError, ValueError, MemoryError) as error:
                why = (str(error).splitlines() or [type(error).__name__])[0]
                warnings.warn(f"gradients are taken one by one, for several at once fail: {why}", stacklevel=2)
                at_once = 1
                continue
        else:
            grad = backward(seeds[0], keep=keep or stop < count)
        start = stop
        given = [grad]
        del grad
        yield given.pop()  # held by nobody here while the next is found


@contextmanager
def _reporting(parts: Anatomy, progress: Progress, backwards: int) -> Iterator[None]:
    """Inside, ``progress`` hears of every layer that has finished its forward and each of its backwards."""
    layers = parts.layers
    total = len(layers)
    ended = Counter[int]()

    def count(index: int) -> None:
        # A backward that is tried with another seed is no further one.
        before = min(ended[index], backwards - 1)
        ended[index] += 1
        progress("backward", before * total + total - index, backwards * total)

    def watch(index: int) -> Callable[..., None]:
        def before(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            hidden = stream(inputs, named)
            if hidden is not None and hidden.requires_grad:
                # The gradient of a layer's input exists once the layer's backward is done.
                hidden.register_hook(lambda _: count(index))

        return before

    def after(index: int) -> Callable[..., None]:
        return lambda *_: progress("forward", index + 1, total)

    with ExitStack() as hooks:
        for index, (_, layer) in enumerate(layers):
            hooks.enter_context(layer.register_forward_pre_hook(watch(index), with_kwargs=True))
            hooks.enter_context(layer.register_forward_hook(after(index)))
        progress("forward", 0, total)  # a user's code, which may raise
        yield
