"""What a user gives as a prompt, text or a chat, as the text and the tokens that the model sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

#: The roles of the model itself, in the words of transformers and of Gemma: their last message is continued.
ANSWERING = ("assistant", "model")

#: What a chat template raises where messages do not fit it: on purpose, or by an operation on another type.
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, AttributeError, KeyError)


@dataclass(frozen=True)
class Encoded:
    """A prompt's text, its token ids, and first and one-past-last character of each token in the text."""

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]


def encode(prompt: Any, tokenizer: Any) -> Encoded:
    """Text, or a chat rendered with the tokenizer's template, as tokens with the special ones that belong to it.

    A chat template writes the special tokens itself. Around text the tokenizer puts its own, but for those that the
    text has already: it begins with the first of them, or ends with the last.

    Raises:
        TypeError: neither text nor messages.
        ValueError: an empty prompt, one without tokens, a slow tokenizer, a chat that cannot be rendered.
    """
    is_chat = not isinstance(prompt, str)
    text = render_chat(prompt, tokenizer) if is_chat else prompt
    if not text:
        raise ValueError("prompt must not be empty")
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"tokenizer must be a fast one, which tells character offsets, got {type(tokenizer).__name__}: load it "
            "with AutoTokenizer.from_pretrained(...), or use gim.explain with ids"
        )
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
    return Encoded(text, ids, offsets)


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


# ------------------------------------------------------------------------------------------------------------ chats


def render_chat(messages: Any, tokenizer: Any) -> str:
    """A chat as the text that the model sees, up to where the model goes on.

    That is where its answer starts or, where the last message is the model's own, inside that message: at its last
    character, white space included.

    Args:
        messages: each with ``role`` and ``content``: text, or parts ``{"type": "text", "text": ...}``. A message
            that calls tools needs no content.
        tokenizer: has the chat template.

    Raises:
        TypeError: not messages.
        ValueError: content that is no text, a template that refuses the messages, leaves a user's out, or changes
            the message that is to be continued.
    """
    if (
        not isinstance(messages, Sequence)
        or not messages
        or not all(isinstance(one, Mapping) and {"role", "content"} <= {*one, *_no_content(one)} for one in messages)
    ):
        raise TypeError(f"prompt must be text, or messages with role and content, got {messages!r:.200}")
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("prompt is a chat, and the tokenizer has no chat template")
    given = [dict(message) for message in messages]
    contents = [_texts(number, message) for number, message in enumerate(given, start=1)]
    if given[-1]["role"] not in ANSWERING:
        return _render(given, contents, tokenizer, add_generation_prompt=True)

    if contents[-1] is None or given[-1].get("tool_calls"):
        raise ValueError(
            f"message {len(given)}, the last, is a tool call of the model's, which cannot be continued: add the "
            "tool's answer, or leave the call out"
        )
    # What `continue_final_message` of transformers does, but that its mark ends in white space: where a template trims
    # messages it strips what stands in front as well, the header's line end in front of an empty message included.
    mark = "GIM_CONTINUES_HERE"
    while any(mark in text for texts in contents for text in texts or ()):
        mark += "_"
    *before, final = contents[-1] or [""]
    contents[-1] = [*before, final + mark]
    rendered, found, _ = _render(given, contents, tokenizer, add_generation_prompt=False).rpartition(mark)
    if not found or not rendered.endswith(final):
        raise ValueError(
            f"message {len(given)}, the last, cannot be continued as it stands: the chat template "
            + (f"has {rendered[-len(final) :]!r:.80} for {final!r:.80}" if found else "leaves it out")
            + ". Give it as the template has it, such as without white space in front, or render the chat yourself and "
            "give the text"
        )
    return rendered


def _no_content(message: Mapping[str, Any]) -> tuple[str, ...]:
    """What a message need not have: content, where it calls tools."""
    return ("content",) if message.get("tool_calls") else ()


def _texts(number: int, message: dict[str, Any]) -> list[str] | None:
    """The texts of a message's content, one for each part; None for a tool call without any."""
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    if content is None and message.get("tool_calls"):
        return None
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise ValueError(f"content of message {number} must be text or a list of parts, got {content!r:.80}")
    for index, part in enumerate(content, start=1):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            what = f"type {kind!r}" if isinstance(kind, str) and kind != "text" else f"{part!r:.80}"
            raise ValueError(
                f"part {index} of message {number} must be {{'type': 'text', 'text': ...}}, got {what}: only text can "
                "be attributed"
            )
    return [part["text"] for part in content]


def _render(
    messages: list[dict[str, Any]], contents: list[list[str] | None], tokenizer: Any, *, add_generation_prompt: bool
) -> str:
    """The chat with these contents, in the one of the two forms, text or parts, that the template reads."""

    def render(content: Any) -> str:
        filled = [
            message if texts is None else {**message, "content": content(texts)}
            for message, texts in zip(messages, contents, strict=True)
        ]
        return str(tokenizer.apply_chat_template(filled, tokenize=False, add_generation_prompt=add_generation_prompt))

    def has_all(rendered: str) -> bool:
        return all(
            text.strip() in rendered
            for message, texts in zip(messages, contents, strict=True)
            if message["role"] == "user"
            for text in texts or ()
        )

    try:
        rendered = render("".join)
        if any(len(texts) > 1 for texts in contents if texts) and _reads_parts(render, rendered):
            rendered = render(_as_parts)
        elif not has_all(rendered):
            # A template for parts alone finds none in a text, and leaves it out without a word.
            rendered = render(_as_parts)
    except _TEMPLATE_ERRORS as error:
        raise ValueError(f"prompt is a chat that the tokenizer's chat template refuses: {error}") from error
    if not has_all(rendered):
        raise ValueError("prompt is a chat, and the tokenizer's chat template leaves out what a user says in it")
    return rendered


def _reads_parts(render: Callable[[Any], str], of_text: str) -> bool:
    """Whether a template makes the same of a text as of one part with it: then it knows how several go together."""
    try:
        return render(lambda texts: _as_parts(["".join(texts)])) == of_text
    except _TEMPLATE_ERRORS:
        return False


def _as_parts(texts: Sequence[str]) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]
