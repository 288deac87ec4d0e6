"""Words and sentences of a text as character ranges, for any script, without a language library.

Both functions return ranges in order which do not overlap and which cover every character of the text that is
not white space, so whatever is summed over them loses nothing.
"""

from __future__ import annotations

import re
import unicodedata

Range = tuple[int, int]

# Scripts written without spaces between words. Without a dictionary nothing finds their words, so, as in the
# default rules of Unicode Standard Annex 29, every character with its marks is a unit of its own. Katakana is
# not among them: its runs are words nearly always.
_UNSPACED: tuple[Range, ...] = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x1980, 0x19DF),  # New Tai Lue
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x2E80, 0x2FDF),  # CJK radicals
    (0x3005, 0x3007),  # iteration mark, closing mark, zero
    (0x3040, 0x309F),  # Hiragana
    (0x3400, 0x4DBF),  # CJK extension A
    (0x4E00, 0x9FFF),  # CJK
    (0xAA60, 0xAA7F),  # Myanmar extended
    (0xF900, 0xFAFF),  # CJK compatibility
    (0x20000, 0x3FFFF),  # CJK extensions B and later
)
_ZERO_WIDTH_JOINER = "\u200d"
_REGIONAL_INDICATORS = (0x1F1E6, 0x1F1FF)
_SKIN_TONES = (0x1F3FB, 0x1F3FF)
# Marks that stay inside a word between two letters (don't, l·l, example.com) or two digits (3.14, 1,000).
_BETWEEN_LETTERS = frozenset("'\u2019.\u00b7\u05f4")
_BETWEEN_DIGITS = frozenset("'\u2019.,\u066b\u066c")


def words(text: str) -> list[Range]:
    """Cut a text into words, punctuation marks and symbols.

    A word is a run of letters, digits and underscores with their combining marks; apostrophes and full stops
    between letters and the separators within numbers belong to it. In a script without spaces each character
    with its marks is a word. Of everything else, a run of one repeated character is a unit ("...", "=="), and
    an emoji keeps its modifiers.

    Args:
        text: any text.

    Returns:
        First and one-past-last character of each word, in order.
    """
    ranges: list[Range] = []
    index = 0
    while index < len(text):
        if text[index].isspace():
            index += 1
            continue
        start = index
        index = _word_end(text, index)
        ranges.append((start, index))
    return ranges


def _word_end(text: str, start: int) -> int:
    """One past the last character of the word that starts at `start`."""
    first = text[start]
    index = _past_extensions(text, start + 1)
    if _is_letter(first):
        while index < len(text):
            if _is_letter(text[index]):
                index = _past_extensions(text, index + 1)
            elif _joins(text, index):
                index += 1
            else:
                break
    elif _is_within(first, _REGIONAL_INDICATORS):
        # Two regional indicators are one flag.
        if index < len(text) and _is_within(text[index], _REGIONAL_INDICATORS):
            index = _past_extensions(text, index + 1)
    elif not _is_unspaced(first):
        while index < len(text) and text[index] == first:
            index = _past_extensions(text, index + 1)
    return index


def _past_extensions(text: str, index: int) -> int:
    """Skip what belongs to the character before `index`: marks, format characters, joined characters."""
    while index < len(text):
        character = text[index]
        if character == _ZERO_WIDTH_JOINER and index + 1 < len(text) and _is_symbol(text[index + 1]):
            index += 2
        elif unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf") or _is_within(character, _SKIN_TONES):
            index += 1
        else:
            break
    return index


def _joins(text: str, index: int) -> bool:
    """Whether the mark at `index` stands between two letters or two digits that it keeps together."""
    if index + 1 >= len(text):
        return False
    before, mark, after = text[index - 1], text[index], text[index + 1]
    if before.isdecimal() and after.isdecimal():
        return mark in _BETWEEN_DIGITS
    return mark in _BETWEEN_LETTERS and before.isalpha() and after.isalpha() and not _is_unspaced(after)


def _is_letter(character: str) -> bool:
    if character.isascii():
        return character.isalnum() or character == "_"
    return unicodedata.category(character)[0] in "LN" and not _is_unspaced(character)


def _is_symbol(character: str) -> bool:
    return unicodedata.category(character) == "So"


def _is_unspaced(character: str) -> bool:
    return not character.isascii() and any(_is_within(character, block) for block in _UNSPACED)


def _is_within(character: str, block: Range) -> bool:
    return block[0] <= ord(character) <= block[1]


# A possible end of a sentence: terminators of scripts with spaces, which need a space after them; those of
# scripts without, which do not; and line ends, with the white space around them. None starts inside of a run of its
# own characters: where the run's first did not make an end none of them does, and looking again from each would take
# time with the square of its length.
_CLOSING = r"[\"')\]}\u2019\u201d\u00bb\u203a\u300d\u300f\u3011\u300b\u3009\uff09]*"
_SPACED = r"[.!?\u2026\u203d\u061f\u06d4\u0964\u0965\u1362\u104b\u17d4]"
_LINE_END = r"\n\v\f\r\x1c-\x1e\x85\u2028\u2029"
_SENTENCE_END = re.compile(
    rf"(?P<spaced>(?<!{_SPACED}){_SPACED}+{_CLOSING})(?=\s|$)"
    rf"|(?P<unspaced>[\u3002\uff01\uff1f\uff61]+{_CLOSING})"
    rf"|(?P<line>(?<![^\S{_LINE_END}])[^\S{_LINE_END}]*[{_LINE_END}]\s*)"
)
_TITLES = frozenset({"dr", "fig", "mr", "mrs", "ms", "prof", "st", "vs"})
_LAST_WORD = re.compile(r"(\w+)\.$")


def sentences(text: str) -> list[Range]:
    """Cut a text into sentences.

    A sentence ends at ``.``, ``!``, ``?`` or their like in other scripts, with closing quotes and brackets,
    where white space follows; at a full-width terminator of Chinese or Japanese wherever it stands; and at the
    end of a line. It goes on where a small letter follows (so a hard-wrapped line is not an end, nor is most
    an abbreviation), after an initial, after a common title and after the number of a list item.

    Args:
        text: any text.

    Returns:
        First and one-past-last character of each sentence without the white space around it, in order.
    """
    ranges: list[Range] = []
    start = 0
    for match in _SENTENCE_END.finditer(text):
        if match.end() > start and _ends_sentence(text, start, match):
            _append_trimmed(ranges, text, start, match.end())
            start = match.end()
    _append_trimmed(ranges, text, start, len(text))
    return ranges


def _ends_sentence(text: str, start: int, match: re.Match[str]) -> bool:
    """Whether a possible end is one, for a sentence that began at `start`."""
    if match["unspaced"]:
        return True
    follows = text[match.end() : match.end() + 1]
    if match["line"]:
        return match["line"].count("\n") > 1 or not follows.islower()
    after = match.end()
    while after < len(text) and text[after].isspace() and text[after] != "\n":
        after += 1
    if text[after : after + 1].islower():
        return False
    if match["spaced"] == ".":
        word = _LAST_WORD.search(text, max(start, match.end() - 12), match.end())
        if word:
            is_initial = len(word[1]) == 1 and word[1].isupper()
            is_item = word[1].isdecimal() and not text[start : word.start()].strip()
            return not (is_initial or is_item or word[1].lower() in _TITLES)
    return True


def _append_trimmed(ranges: list[Range], text: str, start: int, end: int) -> None:
    """Append a range without the white space around it, unless nothing else is in it."""
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    if start < end:
        ranges.append((start, end))
