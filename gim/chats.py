"""A chat as the text that the model sees, and where in it each message stands."""

from __future__ import annotations

import inspect
import itertools
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2.ext
import jinja2.meta

from gim.segments import Range

#: The roles of the model itself, in the words of transformers and of Gemma: their last message is continued.
ANSWERING = ("assistant", "model")

#: The content of one message as a template reads it, from its texts.
_Form = Callable[[Sequence[str]], Any]


@dataclass(frozen=True)
class Rendered:
    """What the model reads, and the range of it that each message fills, by role (``user``, or ``user 1``, ``user 2``).

    There are no ranges where the template changes what messages say.
    """

    text: str
    segments: dict[str, Range]


def render(messages: Any, tokenizer: Any, arguments: Mapping[str, Any]) -> Rendered:
    """A chat as the text that the model sees, up to where the model goes on.

    That is where its answer starts or, where the last message is the model's own, inside that message: at its last
    character, white space included. What a template leaves out or changes of other messages than a user's, such as an
    earlier answer's thoughts, is warned of.

    Args:
        messages: each with ``role`` and ``content``: text, or parts ``{"type": "text", "text": ...}``. A message
            that calls tools needs no content.
        tokenizer: has the chat template.
        arguments: what the template is given besides, such as ``tools`` or ``enable_thinking``.

    Raises:
        TypeError: not messages, or arguments that are no mapping.
        ValueError: content that is no text, a template that refuses the messages, leaves a user's out, or changes
            the message that is to be continued; an argument that is not the caller's.
    """
    if (
        not isinstance(messages, Sequence)
        or not messages
        or not all(isinstance(one, Mapping) and {"role", "content"} <= {*one, *_no_content(one)} for one in messages)
        or not all(isinstance(one["role"], str) for one in messages)
    ):
        raise TypeError(f"prompt must be text, or messages with role and content, got {messages!r:.200}")
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("prompt is a chat, and the tokenizer has no chat template")
    _check_arguments(arguments, tokenizer)
    given = [dict(message) for message in messages]
    contents = [_texts(number, message) for number, message in enumerate(given, start=1)]
    if given[-1]["role"] not in ANSWERING:
        chat = _Chat(given, tokenizer, {**arguments, "add_generation_prompt": True})
        text, form = chat.render(contents)
        chat.warn(contents, text)
        return Rendered(text, chat.segments(contents, form, text))

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
    chat = _Chat(given, tokenizer, {**arguments, "add_generation_prompt": False})
    whole, form = chat.render(contents)
    rendered, found, _ = whole.rpartition(mark)
    if not found or not rendered.endswith(final):
        raise ValueError(
            f"message {len(given)}, the last, cannot be continued as it stands: the chat template "
            + (f"has {rendered[-len(final) :]!r:.80} for {final!r:.80}" if found else "leaves it out")
            + ". Give it as the template has it, such as without white space in front, or render the chat yourself and "
            "give the text"
        )
    chat.warn(contents, whole)
    ranges = chat.segments(contents, form, whole).items()
    cut = {name: (start, min(end, len(rendered))) for name, (start, end) in ranges}
    return Rendered(rendered, {name: (start, end) for name, (start, end) in cut.items() if start < end})


def _check_arguments(arguments: Any, tokenizer: Any) -> None:
    """Refuse arguments that the template would never see, and warn of those that it does not read: chats of several
    models may be given the same."""
    if not isinstance(arguments, Mapping):
        raise TypeError(f"template_arguments must be a mapping of names to values, got {arguments!r:.80}")
    if not arguments:
        return
    from transformers import PreTrainedTokenizerBase

    rendering = PreTrainedTokenizerBase.apply_chat_template
    ours = {*inspect.signature(rendering).parameters, "messages"} - {"tools", "documents"}
    for name in arguments:
        if not isinstance(name, str) or name in ours:
            raise ValueError(f"template_arguments must be named arguments of the chat template's own, got {name!r:.80}")
    if getattr(type(tokenizer), "apply_chat_template", None) is not rendering:
        return  # a tokenizer with code of its own, of which nobody can tell what it reads
    try:
        template = _PARSER.parse(tokenizer.get_chat_template(tools=arguments.get("tools")))
    except (ValueError, jinja2.TemplateError):
        return  # refused when the chat is rendered
    reads = jinja2.meta.find_undeclared_variables(template)
    if unread := [name for name in arguments if name not in reads]:
        warnings.warn(
            f"template_arguments: the chat template does not read {', '.join(map(repr, unread))}; what it reads is "
            + (", ".join(sorted(reads - ours)) or "the messages alone"),
            stacklevel=4,
        )


class _Generation(jinja2.ext.Extension):
    """The tag of transformers around what the model says."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


#: Parses templates as transformers does, and renders none.
_PARSER = jinja2.Environment(extensions=[jinja2.ext.loopcontrols, _Generation])
_PARSER.globals.update(dict.fromkeys(("raise_exception", "strftime_now")))


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


class _Chat:
    """Messages and a template; their contents are what varies."""

    def __init__(self, messages: Sequence[dict[str, Any]], tokenizer: Any, arguments: Mapping[str, Any]) -> None:
        self._messages = messages
        self._tokenizer = tokenizer
        self._arguments = arguments

    def render(self, contents: Sequence[list[str] | None]) -> tuple[str, _Form]:
        """The chat with these contents, in the one of the two forms, text or parts, that the template reads."""
        form: _Form = "".join
        try:
            rendered = self._fill(contents, form)
            if any(len(texts) > 1 for texts in contents if texts) and self._reads_parts(contents, rendered):
                form = _as_parts
            elif "user" in self._left_out(contents, rendered) and not self._prints_parts(contents):
                # A template for parts alone finds none in a text, and leaves it out without a word.
                form = _as_parts
            if form is _as_parts:
                rendered = self._fill(contents, form)
        except Exception as error:  # a template is code of somebody's
            raise ValueError(f"prompt is a chat that the tokenizer's chat template refuses: {error}") from error
        if "user" in self._left_out(contents, rendered):
            raise ValueError("prompt is a chat, and the tokenizer's chat template leaves out what a user says in it")
        return rendered, form

    def warn(self, contents: Sequence[list[str] | None], rendered: str) -> None:
        """Say whose messages are not in the rendered chat as they are."""
        if left_out := self._left_out(contents, rendered):
            roles = ", ".join(dict.fromkeys(left_out))
            warnings.warn(f"the chat template leaves out, or changes, what messages say: {roles}", stacklevel=3)

    def segments(self, contents: Sequence[list[str] | None], form: _Form, rendered: str) -> dict[str, Range]:
        """Where in the rendered chat each message stands that says something, by its role.

        The chat is rendered once more with a mark around each text, which tells what of it is the template's; a mark
        hides white space at a text's ends from a template that trims, so both ways are looked for. Nothing where the
        two renderings differ otherwise.
        """
        mark = "GIM_SAYS"
        while mark in rendered:
            mark += "_"
        owners = [message for message, parts in enumerate(contents) for text in parts or () if text]
        texts = [text for parts in contents for text in parts or () if text]
        numbers = itertools.count(1)

        def marked(text: str) -> str:
            around = f"{mark}{next(numbers)}." if text else ""
            return around + text + around

        try:
            filled = self._fill([None if parts is None else [*map(marked, parts)] for parts in contents], form)
            pieces = re.split(rf"{mark}(\d+)\.", filled)
        except Exception:  # of a template that minds the marks
            return {}
        # The template's own, a mark, a text, the same mark, the template's own, and so on.
        if pieces[1::2] != [str(number) for number in range(1, len(texts) + 1) for _ in range(2)]:
            return {}
        between = pieces[0::4]
        if not rendered.startswith(between[0]):
            return {}
        at, places = len(between[0]), []
        for text, after in zip(texts, between[1:], strict=True):
            forms = (text, text.rstrip(), text.lstrip(), text.strip())
            shown = next((one for one in forms if rendered.startswith(one + after, at)), None)
            if shown is None:
                return {}
            places.append((at, at + len(shown)))
            at += len(shown) + len(after)
        return self._named(owners, places) if at == len(rendered) else {}

    def _named(self, owners: Sequence[int], places: Sequence[Range]) -> dict[str, Range]:
        """The range of each message, from the first of its texts to the last, by its role."""
        roles = [str(message["role"]) for message in self._messages]
        several, seen, found = Counter(roles), Counter[str](), {}
        for message, role in enumerate(roles):
            seen[role] += 1
            own = [place for owner, place in zip(owners, places, strict=True) if owner == message]
            if own and own[0][0] < own[-1][1]:
                found[f"{role} {seen[role]}" if several[role] > 1 else role] = (own[0][0], own[-1][1])
        return found

    def _fill(self, contents: Sequence[list[str] | None], form: _Form) -> str:
        filled = [
            message if texts is None else {**message, "content": form(texts)}
            for message, texts in zip(self._messages, contents, strict=True)
        ]
        return str(self._tokenizer.apply_chat_template(filled, tokenize=False, **self._arguments))

    def _left_out(self, contents: Sequence[list[str] | None], rendered: str) -> list[str]:
        """The roles of messages that have a text which the rendered chat has not."""
        return [
            message["role"]
            for message, texts in zip(self._messages, contents, strict=True)
            if not all(text.strip() in rendered for text in texts or ())
        ]

    def _prints_parts(self, contents: Sequence[list[str] | None]) -> bool:
        """Whether a template that is given parts writes them down as a list, and does not read what they say."""
        mark = "GIM_UNREAD"
        return mark in self._fill(contents, lambda texts: [{**part, mark: mark} for part in _as_parts(texts)])

    def _reads_parts(self, contents: Sequence[list[str] | None], of_text: str) -> bool:
        """Whether a template makes the same of a text as of one part with it: then it knows how several go together."""
        try:
            return self._fill(contents, lambda texts: _as_parts(["".join(texts)])) == of_text
        except Exception:  # of a template that knows no parts
            return False


def _as_parts(texts: Sequence[str]) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]
