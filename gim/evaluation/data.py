"""Examples: from texts, pairs, files, tables and tasks to prompts whose answer a model has right."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gim import prompts, targets
from gim.evaluation import tasks
from gim.evaluation.extras import need
from gim.evaluation.perturbation import Forwards, Outcome, outcomes_of
from gim.files import parse_json
from gim.inputs import check_length
from gim.targets import TokenLike, whole_number

#: Right examples of a task, where no limit is given.
TASK_EXAMPLES = 100
#: Candidates of a task that are tried for each right example that is wanted.
CANDIDATES = 20
#: Columns that are read; others are left alone.
COLUMNS = ("text", "target", "foil", "id")


@dataclass(frozen=True)
class Example:
    """A prompt and what may come next.

    Args:
        id: its own name.
        text: the prompt.
        targets: right next tokens, each an id or text that is one token; none for the model's own prediction.
        foils: wrong ones; none for the whole vocabulary.
        where: how to call it in a message.
    """

    id: str
    text: str
    targets: tuple[TokenLike, ...] = ()
    foils: tuple[TokenLike, ...] = ()
    where: str = ""


@dataclass(frozen=True)
class Kept:
    """An example that the model has right.

    Args:
        example: as it was given.
        ids: of the prompt ``[T]``, on the model's device.
        target: the most likely of the right tokens, or the prediction.
        foil: the most likely of the wrong tokens.
        whole: what the model says after the prompt.
    """

    example: Example
    ids: torch.Tensor
    target: int
    foil: int
    whole: Outcome


@dataclass(frozen=True)
class Chosen:
    """The examples to evaluate, and how many were looked at and dropped as wrong."""

    kept: list[Kept]
    seen: int
    dropped: int


# -------------------------------------------------------------------------------------------------------- reading


def read(data: Any, tokenizer: Any, *, seed: int, limit: int | None) -> Iterator[Example]:
    """Examples from whatever they were given as.

    Args:
        data: the name of a task; a file ``.jsonl`` or ``.parquet``, or a folder that ``datasets`` saved; a ``datasets``
            Dataset; or texts, pairs (text, target), triples (text, target, foil), or mappings.
        tokenizer: cuts the words of a task.
        seed: of a task.
        limit: right examples that are wanted, None for all.

    Raises:
        ValueError, TypeError: no example, one that is not whole, an id twice; names the row.
        OSError: a file that cannot be read.
    """
    if isinstance(data, str) and data in tasks.TASKS:
        wanted = (TASK_EXAMPLES if limit is None else limit) * CANDIDATES
        drawn = tasks.draw(data, tokenizer, wanted, seed)
        rows: Iterable[Any] = ({"text": text, "target": right, "foil": wrong} for text, right, wrong in drawn)
        name = f"task {data}, candidate"
    elif isinstance(data, str | os.PathLike):
        rows, name = rows_of(Path(data)), f"{data}, row"
    elif isinstance(data, Iterable):
        rows, name = _by_row(data), "data, row"
    else:
        raise TypeError(
            f"data must be a task, a file, a Dataset or a list of texts or pairs, got {type(data).__name__}"
        )
    seen: dict[str, str] = {}
    for index, row in enumerate(rows):
        example = _example(row, index, f"{name} {index}")
        if example.id in seen:
            raise ValueError(f"{example.where}: the id {example.id!r} is that of {seen[example.id]} too")
        seen[example.id] = example.where
        yield example
    if not seen:
        raise ValueError("data holds no example")


def rows_of(
    path: Path, columns: tuple[str, ...] | None = COLUMNS, names: Iterable[str] = tuple(tasks.TASKS)
) -> Iterator[Any]:
    """Rows of a file, or of a folder that ``datasets`` saved. No code that comes with data is ever run.

    Args:
        path: of either.
        columns: of a Parquet file that are read; None for all.
        names: of tasks that it might have been, where it is no file.
    """
    if path.is_dir():
        yield from _by_row(need("datasets").load_from_disk(str(path)))
    elif not path.is_file():
        raise FileNotFoundError(f"data: {str(path)!r} is no file, and no task: those are {', '.join(names)}")
    elif path.suffix == ".parquet":
        yield from _parquet(path, columns)
    elif path.suffix == ".jsonl":
        yield from _json_lines(path)
    else:
        raise ValueError(f"data must be a file .jsonl or .parquet, got {path}")


def _by_row(data: Iterable[Any]) -> Iterable[Any]:
    """Data as it is, where Python goes through it row by row; of a table it goes through the names of its columns.

    Raises:
        TypeError: a mapping of columns or of parts (a ``DatasetDict``), or a data frame.
    """
    if isinstance(data, Mapping):
        raise TypeError(
            f"data must be rows, got {type(data).__name__} of {', '.join(map(repr, itertools.islice(data, 5)))}: give "
            "one of them, or a list of rows"
        )
    if hasattr(data, "columns"):
        raise TypeError(f"data must be rows, got {type(data).__name__}: give its rows, such as to_dict('records')")
    return data


def _json_lines(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        for index, line in enumerate(filter(bytes.strip, file)):
            try:
                document = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, row {index} is not text in UTF-8: {error}") from error
            yield parse_json(f"{path}, row {index}", document)


def _parquet(path: Path, columns: tuple[str, ...] | None) -> Iterator[Any]:
    arrow, parquet = need("pyarrow"), need("pyarrow.parquet")
    with path.open("rb") as file:
        try:
            table = parquet.ParquetFile(file)
            there = [name for name in table.schema_arrow.names if columns is None or name in columns]
            for batch in table.iter_batches(columns=there):
                yield from batch.to_pylist()
        except (arrow.ArrowException, OSError) as error:  # the latter of a damaged page
            raise ValueError(f"data: {path} is not a Parquet file, or a damaged one: {error}") from error


def _example(row: Any, index: int, where: str) -> Example:
    """One row as an example."""
    if isinstance(row, str):
        row = {"text": row}
    elif isinstance(row, Sequence) and len(row) in (2, 3):
        row = dict(zip(("text", "target", "foil"), row, strict=False))
    if not isinstance(row, Mapping):
        raise TypeError(f"{where} must be a text, a pair (text, target) or a mapping, got {row!r:.80}")
    text = row.get("text")
    if not isinstance(text, str) or not text:
        raise ValueError(f"{where}: text must be a text that is not empty, got {text!r:.80}")
    name = row.get("id")
    name = str(index) if name is None else str(name)
    if not name:
        raise ValueError(f"{where}: id must not be empty")
    right, wrong = _tokens(row.get("target"), "target", where), _tokens(row.get("foil"), "foil", where)
    if wrong and not right:
        raise ValueError(f"{where}: a foil needs a target")
    return Example(name, text, right, wrong, where)


def _tokens(given: Any, what: str, where: str) -> tuple[TokenLike, ...]:
    """One token or several."""
    if given is None:
        return ()
    found = [whole_number(one) for one in (given if isinstance(given, list | tuple) else [given])]
    for one in found:
        if isinstance(one, bool) or not isinstance(one, int | str) or one == "":
            raise TypeError(f"{where}: {what} must be a token, as id or text, or a list of them, got {given!r:.80}")
    return tuple(found)


# ------------------------------------------------------------------------------------------------------- choosing


def choose(
    model: nn.Module, tokenizer: Any, forwards: Forwards, examples: Iterable[Example], limit: int | None
) -> Chosen:
    """The first examples that the model has right: of all tokens that are named, a right one is the most likely.

    Where only right tokens are named, one must be the most likely of the vocabulary; where none is, the prediction is
    explained.

    Raises:
        ValueError: a text of fewer than three tokens or longer than the model's limit, a target or a foil that is not
            one token; or no example that the model has right. Names the row.
    """
    kept: list[Kept] = []
    seen = 0
    for example in examples:
        seen += 1
        found = _right(model, tokenizer, forwards, example)
        if found is not None:
            kept.append(found)
            if len(kept) == limit:
                break
    if not kept:
        raise ValueError(f"data: the model has none of the {seen} examples right, so there is nothing to evaluate")
    return Chosen(kept, seen, seen - len(kept))


def _right(model: nn.Module, tokenizer: Any, forwards: Forwards, example: Example) -> Kept | None:
    """The example where the model has it right."""
    try:
        ids = torch.tensor(prompts.encode(example.text, tokenizer).ids, device=forwards.device)
        check_length(model, ids[None], None, False)
        right = [targets.token_id(one, tokenizer, "target") for one in example.targets]
        wrong = [targets.token_id(one, tokenizer, "foil") for one in example.foils]
    except (ValueError, TypeError) as error:
        raise type(error)(f"{example.where}: {error}") from error
    if len(ids) < 3:
        raise ValueError(
            f"{example.where}: text must have three tokens at least, got {len(ids)}: the first and the last are never "
            "replaced"
        )
    if set(right) & set(wrong):
        raise ValueError(f"{example.where}: a token is both target and foil")
    with torch.no_grad():
        logits = forwards.logits(ids[None])
    for one in (*right, *wrong):
        if not 0 <= one < logits.shape[1]:
            raise ValueError(f"{example.where}: the model has {logits.shape[1]} logits, and none for token {one}")
    said = logits[0].double().cpu()
    order = torch.argsort(said, descending=True, stable=True)[: len(right) + 2].tolist()
    target = max(right, key=lambda one: said[one].item()) if right else order[0]
    foil = (
        max(wrong, key=lambda one: said[one].item())
        if wrong
        else next(one for one in order if one not in right and one != target)
    )
    try:
        whole = outcomes_of(logits, target, foil)[0]
    except FloatingPointError as error:
        raise FloatingPointError(f"{example.where}: {error}") from error
    is_right = not right or bool(said[target] > said[foil])
    return Kept(example, ids, int(target), int(foil), whole) if is_right else None
