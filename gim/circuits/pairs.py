"""Pairs of prompts: as text or ids, drawn by a task, or from files as MIB and EAP-IG have them."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gim import prompts, targets
from gim.circuits.metrics import Answers
from gim.circuits.scores import Batch
from gim.evaluation import tasks
from gim.evaluation.data import rows_of
from gim.inputs import check_length, check_token_id
from gim.parts import anatomy
from gim.targets import TokenLike

#: Pairs of a task, where no limit is given.
TASK_PAIRS = 100
#: The counterfactual that MIB takes of each of its tasks, by the columns that tell the task.
COUNTERFACTUALS = ("s2_io_flip_counterfactual", "symbol_counterfactual", "random_counterfactual")
#: A year, and at the end of the prompt its century again: the model is to say a later one's last two digits.
YEARS = re.compile(r"(\d\d)(\d\d)\D+\1$")


@dataclass(frozen=True)
class Pair:
    """A prompt, and one of as many tokens that has another answer; the same prompt twice adds 0 to every score.

    Args:
        clean: what the model should answer; text, or token ids.
        corrupted: what a circuit's missing edges carry comes from this one.
        answer: the right next token after ``clean``, as id or text that is one token, or a list of such.
        wrong: the wrong one, or a list.
    """

    clean: str | Sequence[int] | torch.Tensor
    corrupted: str | Sequence[int] | torch.Tensor
    answer: TokenLike | Sequence[TokenLike]
    wrong: TokenLike | Sequence[TokenLike]


@dataclass(frozen=True)
class Encoded:
    """A pair in token ids, checked.

    Args:
        clean, corrupted: ids ``[T]``.
        answers: right and wrong next tokens.
    """

    clean: tuple[int, ...]
    corrupted: tuple[int, ...]
    answers: Answers

    @property
    def digest(self) -> str:
        """What tells it from another."""
        content = [self.clean, self.corrupted, *map(list, self.answers)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def encode(model: nn.Module, given: Read, tokenizer: Any) -> list[Encoded]:
    """Pairs in token ids, each checked.

    Args:
        model: the vocabulary and the longest prompt are its own.
        given: at least one.
        tokenizer: cuts texts; None where everything is ids.

    Raises:
        TypeError, ValueError: not such a pair, texts without a tokenizer, prompts of unequal length, an answer that is
            no single token, a token that is both right and wrong; names where the pair came from and the argument.
    """
    found = []
    for pair, where in zip(given.pairs, given.places, strict=True):
        if not isinstance(pair, Pair):
            raise TypeError(f"{where} must be a gim.circuits.Pair, got {pair!r:.80}")
        clean, corrupted = (
            _ids(model, getattr(pair, name), tokenizer, _argument(where, name)) for name in ("clean", "corrupted")
        )
        if len(clean) != len(corrupted):
            raise ValueError(
                f"{where}: clean and corrupted must have as many tokens, got {len(clean)} and {len(corrupted)}"
            )
        right, wrong = (
            _answers(model, getattr(pair, name), tokenizer, _argument(where, name)) for name in ("answer", "wrong")
        )
        if set(right) & set(wrong):
            raise ValueError(f"{where}: answer and wrong hold the same token, {min(set(right) & set(wrong))}")
        found.append(Encoded(clean, corrupted, (right, wrong)))
    if not found:
        raise ValueError("pairs must hold at least one pair")
    return found


def _argument(where: str, name: str) -> str:
    """What to call a part of a pair: ``pairs[3].clean``, or ``pairs.csv, row 3: clean``."""
    return f"{where}.{name}" if where.endswith("]") else f"{where}: {name}"


def _ids(model: nn.Module, given: Any, tokenizer: Any, argument: str) -> tuple[int, ...]:
    if isinstance(given, str):
        if tokenizer is None:
            raise TypeError(f"{argument} is text, which needs a tokenizer: give tokenizer=, or ids")
        try:
            given = prompts.encode(given, tokenizer).ids
        except (TypeError, ValueError) as error:
            raise type(error)(f"{argument}: {error}") from error
    if isinstance(given, torch.Tensor):
        if given.dim() == 2 and given.shape[0] == 1:
            given = given[0]
        if given.dim() != 1:
            raise ValueError(f"{argument} must have shape [T], got {tuple(given.shape)}")
        given = given.tolist()
    ids = tuple(targets.id_list(given, argument))
    if not ids:
        raise TypeError(f"{argument} must be text or a list of token ids that is not empty, got {given!r:.80}")
    for one in ids:
        check_token_id(model, argument, one)
    try:
        check_length(model, torch.tensor(ids, device="cpu")[None], None, False)
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from error
    return ids


def _answers(model: nn.Module, given: Any, tokenizer: Any, argument: str) -> tuple[int, ...]:
    several = list(given) if isinstance(given, list | tuple) else [given]
    if not several:
        raise ValueError(f"{argument} must hold at least one token")
    found = []
    for one in several:
        if isinstance(one, str) and tokenizer is None:
            raise TypeError(f"{argument} is text, which needs a tokenizer: give tokenizer=, or an id")
        found.append(targets.token_id(one, tokenizer, argument))
        check_token_id(model, argument, found[-1])
    return tuple(dict.fromkeys(found))


def batches(model: nn.Module, pairs: Sequence[Encoded], batch_tokens: int) -> Iterator[tuple[list[int], Batch]]:
    """Pairs of one length together, in the order of their first, with their places.

    Args:
        model: ids go where it reads them.
        pairs: any.
        batch_tokens: tokens of one batch, at most, but for a single longer pair.
    """
    device = anatomy.of(model).device
    by_length: dict[int, list[int]] = {}
    for index, pair in enumerate(pairs):
        by_length.setdefault(len(pair.clean), []).append(index)
    for length, places in by_length.items():
        step = max(1, batch_tokens // length)
        for start in range(0, len(places), step):
            chosen = places[start : start + step]
            clean, corrupted = (
                torch.tensor([getattr(pairs[one], name) for one in chosen], device=device)
                for name in ("clean", "corrupted")
            )
            yield chosen, Batch(clean, corrupted, [pairs[one].answers for one in chosen])


# -------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Read:
    """Pairs, where each came from, and how many rows of a file of MIB's, or of greater-than, make none here.

    Args:
        pairs: to be encoded.
        places: of each, what to call it in a message.
        passed_by: rows whose prompts are not of one length, or whose answers no single tokens, of this tokenizer.
    """

    pairs: list[Pair]
    places: list[str]
    passed_by: int = 0


def read(data: Any, tokenizer: Any, *, seed: int = 0, limit: int | None = None, skip: int = 0) -> Read:
    """Pairs from whatever they were given as.

    Args:
        data: the name of a task with pairs; a file ``.jsonl``, ``.csv`` or ``.parquet``, or a folder that ``datasets``
            saved, of rows ``clean``, ``corrupted``, ``answer``, ``wrong``, of EAP-IG's rows ``clean``, ``corrupted``,
            ``correct_idx``, ``incorrect_idx``, of its greater-than ``clean``, ``corrupted``, ``label``, or of MIB's
            data sets as they are; or pairs.
        tokenizer: cuts texts.
        seed: of a task.
        limit: pairs, at most; None for all, and for :data:`TASK_PAIRS` of a task.
        skip: pairs that are left out first: those that a circuit was found on.

    Raises:
        ValueError, TypeError: a row that is no pair, or none at all; names the row. A task, or a data set of MIB's,
            without a tokenizer.
        OSError: a file that cannot be read.
    """
    if not isinstance(data, str | os.PathLike):
        if not isinstance(data, Iterable):
            raise TypeError(f"pairs must be pairs, a task or a file, got {type(data).__name__}")
        given = list(itertools.islice(data, skip, None if limit is None else skip + limit))
        return Read(given, [f"pairs[{index}]" for index in range(skip, skip + len(given))])
    found: list[Pair] = []
    places: list[str] = []
    passed_by = 0
    count = skip + (limit or TASK_PAIRS) if str(data) in tasks.TASKS else None if limit is None else skip + limit
    if str(data) in tasks.TASKS:
        _need_tokenizer(tokenizer, str(data))
        drawn = tasks.draw_pairs(str(data), tokenizer, count or 0, seed)
        found = [Pair(text, other, list(right), list(wrong)) for text, other, right, wrong in drawn]
        places = [f"task {data}, pair {index}" for index in range(len(found))]
    else:
        for index, row in enumerate(_rows(Path(data))):
            where = f"{data}, row {index}"
            pair, is_mib = _pair(row, where)
            if is_mib:
                _need_tokenizer(tokenizer, where)
            if is_mib and not _fits(pair, tokenizer):
                passed_by += 1
                continue
            found.append(pair)
            places.append(where)
            if len(found) == count:
                break
    if len(found) <= skip:
        others = f", {passed_by} rows make none with this tokenizer" if passed_by else ""
        raise ValueError(f"pairs: {data} holds {len(found)} pairs{others}, and {skip} of them are left out")
    return Read(found[skip:], places[skip:], passed_by)


def _need_tokenizer(tokenizer: Any, what: str) -> None:
    if tokenizer is None:
        raise TypeError(f"pairs: {what} is text, which needs a tokenizer: give tokenizer=")


def _rows(path: Path) -> Iterator[Any]:
    if path.suffix == ".csv" and path.is_file():
        with path.open(encoding="utf-8-sig", newline="") as file:
            try:
                yield from csv.DictReader(file)
            except (csv.Error, UnicodeDecodeError) as error:
                raise ValueError(f"{path} is not CSV in UTF-8: {error}") from error
    else:
        yield from rows_of(path, None, tasks.PAIRED)


def _pair(row: Any, where: str) -> tuple[Pair, bool]:
    """A row as a pair, and whether it is of a data set some of whose rows may not fit a tokenizer."""
    if not isinstance(row, Mapping):
        raise TypeError(f"{where} must be a mapping, got {row!r:.80}")
    try:
        for name in COUNTERFACTUALS:
            other = row.get(name)
            if other is not None:
                return _of_mib(row, name, other), True
        if "correct_idx" in row and "incorrect_idx" in row:
            return Pair(row["clean"], row["corrupted"], *_indices(row)), False
        if "label" in row and "answer" not in row:
            return _of_years(row), True
        return Pair(row["clean"], row["corrupted"], row["answer"], row["wrong"]), False
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(
            f"{where}: neither clean, corrupted, answer and wrong, nor a row of EAP-IG or MIB ({type(error).__name__}: "
            f"{error})"
        ) from error


def _indices(row: Mapping[str, Any]) -> tuple[Any, Any]:
    """Answers of EAP-IG's files: one id each, or a list of them written as JSON."""
    right, wrong = (json.loads(str(row[name])) for name in ("correct_idx", "incorrect_idx"))
    return right, wrong


def _of_mib(row: Mapping[str, Any], name: str, other: Mapping[str, Any]) -> Pair:
    """A row of MIB's indirect objects, multiple choice, ARC or arithmetic, as its benchmark reads them."""
    prompts = _said(row["prompt"]), _said(other["prompt"])
    if name == "s2_io_flip_counterfactual":
        said = row["metadata"]
        return Pair(*prompts, f" {_said(said['indirect_object'])}", f" {_said(said['subject'])}")
    if name == "symbol_counterfactual":
        right, wrong = (one["choices"]["label"][one["answerKey"]] for one in (row, other))
    else:
        right, wrong = row["label"], other["label"]
    return Pair(*prompts, _said(right), _said(wrong))


def _said(value: Any) -> str:
    """A text that is not empty, or a number as text."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        raise TypeError(f"a prompt or an answer must be text that is not empty, got {value!r:.80}")
    return str(value)


def _of_years(row: Mapping[str, Any]) -> Pair:
    """A row of EAP-IG's greater-than: later years of the century are right, the label and those before it wrong."""
    said, label = YEARS.search(row["clean"]), int(row["label"])
    if said is None or int(said[2]) != label or label == 99:
        raise ValueError(f"label {label} is no year of its prompt that another of the century comes after")
    years = [f"{year:02d}" for year in range(100)]
    return Pair(row["clean"], _said(row["corrupted"]), years[label + 1 :], years[: label + 1])


def _fits(pair: Pair, tokenizer: Any) -> bool:
    """Whether both prompts of a row of MIB's have as many tokens, and each answer one."""
    clean, corrupted = (len(prompts.encode(one, tokenizer).ids) for one in (pair.clean, pair.corrupted))
    answers = [one for given in (pair.answer, pair.wrong) for one in (given if isinstance(given, list) else [given])]
    single = all(len(tokenizer.encode(one, add_special_tokens=False)) == 1 for one in answers)
    return clean == corrupted and single and pair.answer != pair.wrong
