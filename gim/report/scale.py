"""Which colour a score has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gim.attribution import Attribution

#: Steps of colour on each side of 0.
LEVELS = 32
#: Colours saturate at this quantile of |score| over the tokens that are not set aside ...
SATURATION_QUANTILE = 0.99
#: ... or at this part of the largest |score|, if that is more: where a few tokens of a long prompt have nearly
#: all of the score, the quantile alone would paint the noise of all others in full colour.
SATURATION_LEAST = 0.2


@dataclass(frozen=True)
class Theme:
    """The colours of one theme; text has a contrast of at least 4.5 to 1 on each step of both sides.

    Args:
        page: background of a token whose score is 0.
        text: text of every token.
        positive: background of a token at or beyond the positive end of the scale.
        negative: background of a token at or beyond the negative end.
    """

    page: str
    text: str
    positive: str
    negative: str

    def ramp(self, positive: bool) -> list[str]:
        """The backgrounds of the levels 1 to :data:`LEVELS` of one side."""
        end = self.positive if positive else self.negative
        return [_mix(self.page, end, level / LEVELS) for level in range(1, LEVELS + 1)]


# Orange and blue differ for every common colour vision deficiency; orange is positive, as warm colours are in
# most attribution pictures.
LIGHT = Theme(page="#ffffff", text="#15171c", positive="#f0852d", negative="#5aa5e0")
DARK = Theme(page="#15171b", text="#f1f2f4", positive="#b05206", negative="#226eb2")


def _mix(start: str, end: str, amount: float) -> str:
    """The colour between two others, in OKLab, where equal steps look equal (Ottosson 2020)."""
    mixed = [a + (b - a) * amount for a, b in zip(_to_oklab(start), _to_oklab(end), strict=True)]
    return _from_oklab(mixed)


def _to_oklab(colour: str) -> list[float]:
    channels = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    red, green, blue = ((c / 12.92) if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    long = (0.4122214708 * red + 0.5363325363 * green + 0.0514459929 * blue) ** (1 / 3)
    middle = (0.2119034982 * red + 0.6806995451 * green + 0.1073969566 * blue) ** (1 / 3)
    short = (0.0883024619 * red + 0.2817188376 * green + 0.6299787005 * blue) ** (1 / 3)
    return [
        0.2104542553 * long + 0.7936177850 * middle - 0.0040720468 * short,
        1.9779984951 * long - 2.4285922050 * middle + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * middle - 0.8086757660 * short,
    ]


def _from_oklab(lab: Sequence[float]) -> str:
    lightness, a, b = lab
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    middle = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * middle + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * middle - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * middle + 1.7076147010 * short,
    )
    channels = (12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055 for c in linear)
    return "#" + "".join(f"{round(255 * min(1.0, max(0.0, c))):02x}" for c in channels)


@dataclass(frozen=True)
class Scale:
    """From a score to a step of colour, linear around 0 and saturating at `limit` on both sides.

    Special tokens are not on the scale, because a begin-of-text token often has many times the score of all
    others.

    Args:
        limit: the |score| from which on the colour is full; 0 where every score is 0.
        largest: the largest |score|.
        beyond: how many lie beyond the limit.
        quantile, least: of which the limit was made.
    """

    limit: float
    largest: float
    beyond: int
    quantile: float = SATURATION_QUANTILE
    least: float = SATURATION_LEAST

    @classmethod
    def of(cls, attribution: Attribution) -> Scale:
        """The scale of an attribution: see :data:`SATURATION_QUANTILE` and :data:`SATURATION_LEAST`."""
        scores: list[float] = attribution.scores.tolist()
        return cls.over(score for score, special in zip(scores, attribution.aside, strict=True) if not special)

    @classmethod
    def over(
        cls, scores: Iterable[float], quantile: float = SATURATION_QUANTILE, least: float = SATURATION_LEAST
    ) -> Scale:
        """The scale of numbers: full colour from a quantile of |score| on, or from a part of the largest if more."""
        ordered = sorted(abs(score) for score in scores)
        if not ordered:
            return cls(0.0, 0.0, 0)
        largest = ordered[-1]
        limit = max(ordered[ceil(quantile * (len(ordered) - 1))], least * largest)
        return cls(limit, largest, sum(size > limit for size in ordered), quantile, least)

    def level(self, score: float) -> int:
        """The step of colour, from -LEVELS to LEVELS; 0 is no colour."""
        if self.limit == 0:
            return 0
        return max(-LEVELS, min(LEVELS, round(LEVELS * max(-1.0, min(1.0, score / self.limit)))))

    def aligned(self, score: float) -> str:
        """A score with as many decimals as all others of a table, four digits of the largest."""
        if self.largest == 0:
            return "0"
        decimals = max(0, 3 - floor(log10(self.largest)))
        return f"{score:+.{decimals}f}" if decimals <= 7 else f"{score:+.2e}"

    def describe(self) -> str:
        """The rule of the scale in words, for a legend."""
        if self.limit == 0:
            return "Every score is 0."
        beyond = f" {self.beyond} lie beyond." if self.beyond > 1 else ""
        return (
            f"Linear around 0; full colour from ±{self.limit:.3g} on: the {100 * self.quantile:.0f}th "
            f"percentile of |score| without tokens set aside, at least {100 * self.least:.0f} % of the "
            f"largest, {self.largest:.3g}.{beyond}"
        )
