"""What a user gives as a prompt, text or a chat, as the text and the tokens that the model sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gim import chats
from gim.segments import Range
from gim.targets import check_text


@dataclass(frozen=True)
class Encoded:
    """A prompt as tokens.

    Args:
        text: what the model reads.
        ids: the tokens.
        offsets: first and one-past-last character of each in the text.
        segments: what each message of a chat says, by its role, as a range of the text; empty for text, and where the
            template changes what messages say.
        template: whether each token is the chat template's own, with no character of any message in it.
    """

    text: str
    ids: list[int]
    offsets: list[Range]
    segments: dict[str, Range]
    template: list[bool]


def encode(prompt: Any, tokenizer: Any, template_arguments: Mapping[str, Any] | None = None) -> Encoded:
    """Text, or a chat rendered with the tokenizer's template, as tokens with the special ones that belong to it.

    A chat template writes the special tokens itself. Around text the tokenizer puts its own, but for those that the
    text has already: it begins with the first of them, or ends with the last.

    Args:
        prompt: text, or messages.
        tokenizer: a fast one.
        template_arguments: what the chat template is given besides the messages.

    Raises:
        TypeError: neither text nor messages, template arguments that are no mapping.
        ValueError: an empty prompt, one without tokens, a slow tokenizer, a chat that cannot be rendered, template
            arguments for a text.
    """
    if isinstance(prompt, list | tuple) and not prompt:
        raise ValueError("prompt must be text, messages with role and content, or a list of such, got an empty list")
    is_chat = not isinstance(prompt, str)
    if template_arguments is not None and not is_chat:
        raise ValueError("template_arguments are for a chat, and prompt is text")
    rendered = chats.render(prompt, tokenizer, template_arguments or {}) if is_chat else None
    text = rendered.text if rendered else prompt
    if not text:
        raise ValueError("prompt must not be empty")
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"tokenizer must be a fast one, which tells character offsets, got {type(tokenizer).__name__}: load it "
            "with AutoTokenizer.from_pretrained(...), or use gim.explain with ids"
        )
    check_text(text, "prompt")
    encoded = tokenizer(
        text,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        truncation=False,
        verbose=False,
        add_special_tokens=not is_chat,
    )
    ids = list(encoded["input_ids"])
    offsets = [(int(start), int(end)) for start, end in encoded["offset_mapping"]]
    if not is_chat:
        kept = _without_repeated(ids, [bool(one) for one in encoded["special_tokens_mask"]])
        ids, offsets = ids[kept], offsets[kept]
    if not ids:
        raise ValueError(f"prompt must have at least one token, got {text!r}, which has none")
    said = list(rendered.segments.values()) if rendered else []
    return Encoded(
        text,
        ids,
        offsets,
        dict(rendered.segments) if rendered else {},
        [bool(said) and not any(_meet(offset, one) for one in said) for offset in offsets],
    )


def _meet(token: Range, said: Range) -> bool:
    """Whether a token has a character of a range; one without characters, whether it lies inside."""
    start, end = token
    return said[0] < end and start < said[1] if start < end else said[0] < start < said[1]


def _without_repeated(ids: Sequence[int], added: Sequence[bool]) -> slice:
    """The tokens without those that the tokenizer put around a text which has them already.

    Args:
        ids: the tokens.
        added: whether each was put there by the tokenizer; False for a special token that the text itself spells.
    """
    if all(added):
        return slice(0, len(ids))
    first = added.index(False)
    last = len(ids) - list(reversed(added)).index(False)
    start = first if first > 0 and ids[first] == ids[0] else 0
    end = last if last < len(ids) and ids[last - 1] == ids[-1] else len(ids)
    return slice(start, end)
