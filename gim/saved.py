"""The JSON form of an attribution: what is written, and what a document must hold before anything is made of it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gim.applied import PARTS, Application, AppliedReport
from gim.files import parse_json, read_json
from gim.rules import Rules
from gim.targets import MEASURES, PERS, Explained, NextToken

if TYPE_CHECKING:
    from gim.answers import AnswerAttribution
    from gim.attribution import Attribution
    from gim.layerwise import LayerwiseAttribution

#: Names and version of the JSON forms. The version grows when a reader of the one before could not read it.
SCHEMA = "gim-kernels/attribution"
ANSWER_SCHEMA = "gim-kernels/answer"
LAYERWISE_SCHEMA = "gim-kernels/layerwise"
SCHEMA_VERSION = 1

#: Bytes that are read, at most: about three million tokens, which Python holds in ten times that.
MAX_BYTES = 256 * 2**20

#: Says what is wrong with a value, in words that follow its name; None for nothing.
Check = Callable[[Any], str | None]


def to_fields(attribution: Attribution) -> dict[str, Any]:
    """The fields of an attribution's JSON form."""
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "model": attribution.model,
        "target": attribution.target.to_dict(),
        "rules": attribution.rules.to_dict(),
        "rules_name": attribution.rules.name,
        "engine": attribution.engine,
        "baseline": list(attribution.baseline),
        "memory": attribution.memory,
        "versions": dict(attribution.versions),
        "text": attribution.text,
        "tokens": list(attribution.tokens),
        "token_ids": list(attribution.token_ids),
        "offsets": [list(offset) for offset in attribution.offsets],
        "special": list(attribution.special),
        "template": list(attribution.template),
        "segments": {name: list(ends) for name, ends in attribution.segments.items()},
        "next_tokens": [dataclasses.asdict(one) for one in attribution.next_tokens],
        "scores": attribution.scores.tolist(),
        "report": attribution.report.to_dict(),
    }


def answer_to_fields(answer: AnswerAttribution) -> dict[str, Any]:
    """The fields of the JSON form of a whole answer's attribution, the prompt's own among them."""
    return {
        "schema": ANSWER_SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "answer": answer.answer,
        "tokens": list(answer.tokens),
        "offsets": [list(offset) for offset in answer.offsets],
        "special": list(answer.special),
        "scores": answer.scores.tolist(),
        "total": answer.total.tolist(),
        "targets": [target.to_dict() for target in answer.targets],
        "next_tokens": [[dataclasses.asdict(one) for one in row] for row in answer.next_tokens],
        "prompt": to_fields(answer.prompt),
    }


def layerwise_to_fields(found: LayerwiseAttribution) -> dict[str, Any]:
    """The fields of the JSON form of scores by layer or head, the tokens' own among them."""
    return {
        "schema": LAYERWISE_SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "per": found.per,
        "layers": list(found.layers),
        "scores": found.scores.tolist(),
        "attribution": to_fields(found.attribution),
    }


def to_document(fields: dict[str, Any]) -> str:
    """The JSON text of fields, of ASCII characters."""
    # One line for each field keeps the file readable; only ASCII, so that lone surrogates survive.
    lines = (f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in fields.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def schema_of(source: str | os.PathLike[str], max_bytes: int = MAX_BYTES) -> Any:
    """What a JSON text, or a file with it, says that it is; None where it says nothing.

    Raises:
        OSError, ValueError: it cannot be read, or is not JSON.
    """
    _, fields = _fields(source, max_bytes)
    return fields.get("schema") if isinstance(fields, dict) else None


def read(source: str | os.PathLike[str], max_bytes: int) -> dict[str, Any]:
    """The arguments of an :class:`gim.Attribution` from its JSON text, or from a file with it.

    Raises:
        OSError: the file cannot be read.
        ValueError: anything else; says what of the document is wrong.
    """
    return _attribution(*_fields(source, max_bytes))


def read_answer(source: str | os.PathLike[str], max_bytes: int) -> dict[str, Any]:
    """The arguments of an :class:`gim.AnswerAttribution`, and of its ``prompt``; errors as of :func:`read`."""
    name, given = _fields(source, max_bytes)
    what = "an answer's attribution"
    fields = _checked(name, given, ANSWER_SCHEMA, what, _ANSWER_FIELDS)
    width = len(fields["total"])
    return {
        "prompt": _attribution(f"prompt of {name}", fields["prompt"]),
        "answer": fields["answer"],
        "tokens": tuple(fields["tokens"]),
        "offsets": tuple((start, end) for start, end in fields["offsets"]),
        "special": tuple(fields["special"]),
        "scores": _matrix(name, what, fields["scores"], width),
        "total": torch.tensor([float(one) for one in fields["total"]], dtype=torch.float32, device="cpu"),
        "targets": tuple(Explained.from_dict(one) for one in fields["targets"]),
        "next_tokens": tuple(tuple(NextToken(**one) for one in row) for row in fields["next_tokens"]),
    }


def read_layerwise(source: str | os.PathLike[str], max_bytes: int) -> dict[str, Any]:
    """The arguments of a :class:`gim.LayerwiseAttribution`, and of its ``attribution``; errors as of :func:`read`."""
    name, given = _fields(source, max_bytes)
    what = "an attribution by layer or head"
    fields = _checked(name, given, LAYERWISE_SCHEMA, what, _LAYERWISE_FIELDS)
    attribution = _attribution(f"attribution of {name}", fields["attribution"])
    per, scores = fields["per"], fields["scores"]
    rows = len(fields["layers"])
    if len(scores) != rows:
        raise ValueError(f"{name} is not {what}: field 'scores' must have {rows} rows, got {len(scores)}")
    width = len(attribution["tokens"]) if per == "layer" else len(scores[0]) if scores else 0
    return {
        "attribution": attribution,
        "per": per,
        "scores": _matrix(name, what, scores, width),
        "layers": tuple(fields["layers"]),
    }


def _matrix(name: str, what: str, scores: list[list[float]], width: int) -> torch.Tensor:
    """Rows of one width."""
    if any(len(row) != width for row in scores):
        raise ValueError(f"{name} is not {what}: field 'scores' must have {width} numbers in each row")
    numbers = [[float(one) for one in row] for row in scores]
    return torch.tensor(numbers, dtype=torch.float32, device="cpu").reshape(len(scores), width)


def _fields(source: str | os.PathLike[str], max_bytes: int) -> tuple[str, Any]:
    """What a JSON text or file is called in messages, and what it holds."""
    if not isinstance(source, str) or not _is_document(source):
        return str(source), read_json(source, max_bytes)
    if len(source) > max_bytes:
        raise ValueError(f"the text is longer than {max_bytes:,} bytes")
    return "the text", parse_json("the text", source)


def _checked(name: str, fields: Any, schema: str, what: str, checks: dict[str, Check]) -> dict[str, Any]:
    """Fields of which each is what it must be."""
    if not isinstance(fields, dict) or fields.get("schema") != schema:
        raise ValueError(f"{name} is not {what}: it has no field schema = {schema!r}")
    version = fields.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise ValueError(
            f"{name} has schema version {version!r:.40}; this version of gim-kernels reads version {SCHEMA_VERSION}"
        )
    fields = {**{later: kind() for later, kind in _LATER.items()}, **fields}
    missing = [field for field in checks if field not in fields]
    if missing:
        raise ValueError(f"{name} is not complete as {what}: field {missing[0]!r} is missing")
    for field, check in checks.items():
        wrong = check(fields[field])
        if wrong is not None:
            raise ValueError(f"{name} is not {what}: field {field!r} {wrong}")
    return fields


def _attribution(name: str, given: Any) -> dict[str, Any]:
    """The arguments of an attribution from the fields of its JSON form."""
    fields = _checked(name, given, SCHEMA, "an attribution", _FIELDS)
    try:
        return {
            **{field: fields[field] for field in ("text", "engine", "model", "memory")},
            **{field: tuple(fields[field]) for field in ("tokens", "token_ids", "special", "template", "baseline")},
            "segments": {name: (start, end) for name, (start, end) in fields["segments"].items()},
            "next_tokens": tuple(NextToken(**one) for one in fields["next_tokens"]),
            "offsets": tuple((start, end) for start, end in fields["offsets"]),
            "scores": torch.tensor([float(score) for score in fields["scores"]], dtype=torch.float32, device="cpu"),
            "target": Explained.from_dict(fields["target"]),
            "rules": Rules.from_dict(fields["rules"]),
            "report": AppliedReport.from_dict(fields["report"]),
            "versions": dict(fields["versions"]),
        }
    except ValueError as error:
        raise ValueError(f"{name} is not an attribution: {error}") from error


def _is_document(source: str) -> bool:
    """Whether a string is a JSON text rather than a path: it is empty, starts with a brace, has several lines, or is
    some other value of JSON and no file's name."""
    start = source.removeprefix("\ufeff").lstrip()
    if not start or start.startswith("{") or "\n" in source.rstrip("\n") or "\0" in source:
        return True
    try:
        parse_json("", source)
        return not Path(source).exists()
    except ValueError:
        return False
    except OSError:  # longer than any name
        return True


# ------------------------------------------------------------------------------------------------------- the fields


def _is(kind: type, words: str) -> Check:
    """A value of one type; True and False are no numbers."""
    return lambda value: None if type(value) is kind else f"must be {words}, got {value!r:.40}"


def _one_of(values: tuple[str, ...]) -> Check:
    return lambda value: None if value in values else f"must be one of {values}, got {value!r:.40}"


def _count(value: Any) -> str | None:
    """A whole number that any reader of JSON can hold."""
    return None if type(value) is int and 0 <= value < 2**63 else f"must be a whole number >= 0, got {value!r:.40}"


def _number(value: Any) -> str | None:
    """A finite number; a whole one too, as other writers of JSON write 2.0."""
    if type(value) in (int, float):
        try:
            if math.isfinite(value):
                return None
        except OverflowError:  # a whole number beyond the largest float
            pass
    return f"must be a finite number, got {value!r:.40}"


def _list_of(check: Check) -> Check:
    def wrong(value: Any) -> str | None:
        if type(value) is not list:
            return f"must be a list, got {value!r:.40}"
        for index, one in enumerate(value):
            found = check(one)
            if found is not None:
                return f"entry {index} {found}"
        return None

    return wrong


def _pair_of(first: Check, second: Check) -> Check:
    def wrong(value: Any) -> str | None:
        if type(value) is not list or len(value) != 2:
            return f"must be a list of two, got {value!r:.40}"
        return first(value[0]) or second(value[1])

    return wrong


def _fields_of(kind: type, *later: str) -> Check:
    """An object with the fields of a dataclass, each of the type that is declared there, but for those that earlier
    documents lack."""
    checks = {field.name: _BY_TYPE[str(field.type)] for field in dataclasses.fields(kind)}
    needed = set(checks) - set(later)

    def wrong(value: Any) -> str | None:
        if type(value) is not dict:
            return f"must be an object, got {value!r:.40}"
        if not needed <= set(value) <= set(checks):
            return f"must have the fields {', '.join(checks)}, got {', '.join(value)!r:.200}"
        for name, one in value.items():
            found = checks[name](one)
            if found is not None:
                return f"{name} {found}"
        return None

    return wrong


def _object_of(check: Check, words: str) -> Check:
    def wrong(value: Any) -> str | None:
        if type(value) is not dict or any(check(one) for one in value.values()):
            return f"must be an object of {words}, got {value!r:.40}"
        return None

    return wrong


def _target(value: Any) -> str | None:
    wrong = _fields_of(Explained)(value)
    if wrong is None and not len(value["token_ids"]) == len(value["tokens"]) == len(value["positions"]):
        return "must have as many token_ids as tokens and positions"
    return wrong


def _next_token(value: Any) -> str | None:
    wrong = _fields_of(NextToken)(value)
    if wrong is None and not 0 <= value["probability"] <= 1:
        return f"probability must be from 0 to 1, got {value['probability']!r:.40}"
    return wrong


_text = _is(str, "text")
_truth = _is(bool, "true or false")

#: What a declared type means in JSON. A field of a type that is not here fails when this is imported.
_BY_TYPE: dict[str, Check] = {
    "str": _text,
    "bool": _truth,
    "int": _count,
    "float": _number,
    "Part": _one_of(PARTS),
    "Measure": _one_of(MEASURES),
    "list[str]": _list_of(_text),
    "tuple[str, ...]": _list_of(_text),
    "tuple[int, ...]": _list_of(_count),
    "list[tuple[str, str]]": _list_of(_pair_of(_text, _text)),
}
_BY_TYPE["list[Application]"] = _list_of(_fields_of(Application))

_FIELDS: dict[str, Check] = {
    "text": _text,
    "tokens": _list_of(_text),
    "token_ids": _list_of(_count),
    "offsets": _list_of(_pair_of(_count, _count)),
    "scores": _list_of(_number),
    "special": _list_of(_truth),
    "target": _target,
    "rules": _is(dict, "an object"),  # whose fields Rules checks by itself
    "engine": _text,
    "report": _fields_of(AppliedReport, "watched"),
    "model": _text,
    "baseline": _pair_of(_count, _text),
    "versions": _object_of(_text, "texts"),
    "memory": _text,
    "template": _list_of(_truth),
    "segments": _object_of(_pair_of(_count, _count), "pairs of numbers"),
    "next_tokens": _list_of(_next_token),
}
_ANSWER_FIELDS: dict[str, Check] = {
    "answer": _text,
    "tokens": _list_of(_text),
    "offsets": _list_of(_pair_of(_count, _count)),
    "special": _list_of(_truth),
    "scores": _list_of(_list_of(_number)),
    "total": _list_of(_number),
    "targets": _list_of(_target),
    "next_tokens": _list_of(_list_of(_next_token)),
    "prompt": _is(dict, "an object"),  # which is read as an attribution of its own
}
_LAYERWISE_FIELDS: dict[str, Check] = {
    "per": _one_of(PERS),
    "layers": _list_of(_text),
    "scores": _list_of(_list_of(_number)),
    "attribution": _is(dict, "an object"),  # which is read as an attribution of its own
}
#: Fields that earlier documents of this version lack, and what they then are.
_LATER: dict[str, Callable[[], Any]] = {"template": list, "segments": dict, "next_tokens": list}
