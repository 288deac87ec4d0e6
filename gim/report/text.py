"""Text in which nothing is invisible, and numbers for people."""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING

from rich.cells import cell_len

if TYPE_CHECKING:
    pass

# Format characters that are seen or that join visible ones; all others are shown by their code.
_HARMLESS_FORMAT = frozenset("\u200c\u200d\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u08e2\U000110bd\U000110cd")
_SUSPECT = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u08e2\u180e\u200b-\u200f\u2028-\u202f"
    "\u2060-\u206f\ud800-\udfff\ufdd0-\ufdef\ufeff\ufff0-\uffff\U00010000-\U0010ffff]"
)


def visible(text: str) -> str:
    """A text in which no character is invisible, changes the direction of others or controls a terminal.

    Control characters become their pictures, and format characters, lone surrogates and noncharacters their
    code. Line feeds and tabs stay.
    """
    return _SUSPECT.sub(lambda match: _visible(match[0]), text)


def _visible(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if code & 0xFFFE == 0xFFFE:
        return f"\u27e8U+{code:04X}\u27e9"
    category = unicodedata.category(character)
    if category in ("Cc", "Cs", "Zl", "Zp", "Cn", "Co") or (category == "Cf" and character not in _HARMLESS_FORMAT):
        # An unassigned character may be one that this Python does not know yet, so it stays as it is.
        if category in ("Cn", "Co") and not 0xFDD0 <= code <= 0xFDEF:
            return character
        return f"\u27e8U+{code:04X}\u27e9"
    return character


def one_line(text: str) -> str:
    """A visible text in which line feeds and tabs are visible too."""
    return visible(text).replace("\n", "\u21b5").replace("\t", "\u21e5")


def number(score: float) -> str:
    """A score with its sign, to three digits."""
    return "0" if score == 0 else f"{score:+.3g}"


def fitting(text: str, width: int) -> str:
    """The longest beginning of a text that fits `width` columns."""
    used = 0
    for index, character in enumerate(text):
        used += cell_len(character)
        if used > width:
            return text[:index]
    return text


def shortened(text: str, width: int) -> str:
    """A text in at most `width` columns, with a sign where it goes on."""
    shown = fitting(text, width)
    return shown if shown == text else fitting(text, width - 1) + "\u2026"
