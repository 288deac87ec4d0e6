"""Pictures of attributions: pages, notebooks, terminals, PNG."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import struct
import sys
import zlib
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from rich.console import Console

from gim import rules
from gim.applied import Application, AppliedReport
from gim.attribution import Attribution
from gim.report import html, picture
from gim.report.pieces import context, pieces
from gim.report.scale import DARK, LEVELS, LIGHT, Scale, Theme
from gim.report.text import one_line, visible
from gim.targets import Explained
from tests.first import first

HOSTILE = (
    "<script>alert(1)</script> \"quotes\" & 'single' </style></span><!-- a\u202eevil\u202c \x00 \x1b[31mred "
    "\ud800 \ufffd العربية مرحبا 日本語のテキスト。👩\u200d👧 🇩🇪"
    "\r\n\u05e9\u05dc\u05d5\u05dd\u200b\u2028end\x9b2J {{ 7*7 }}\n"
)


def cut(text: str, size: int = 5) -> list[tuple[int, int]]:
    return [(start, min(start + size, len(text))) for start in range(0, len(text), size)]


def attribution(
    text: str,
    scores: list[float] | None = None,
    *,
    offsets: list[tuple[int, int]] | None = None,
    bos: float | None = None,
    label: str = "' lantern'",
    model: str = "Model (tiny)",
    unsupported: list[tuple[str, str]] | None = None,
) -> Attribution:
    """An attribution of a text cut anyhow; with a special token in front if `bos` is its score."""
    offsets = cut(text) if offsets is None else offsets
    if scores is None:
        scores = torch.randn(len(offsets), generator=torch.Generator().manual_seed(0)).tolist()
    tokens = [text[a:b] for a, b in offsets]
    if bos is not None:
        offsets, scores, tokens = [(0, 0), *offsets], [bos, *scores], ["<|begin|>", *tokens]
    report = AppliedReport(
        "GIM",
        [Application("attention", "layers.0.attn", "Attention", "temperature", "interface", "blockwise", 1)],
        unsupported or [],
        ["no q/k norms <b>"],
    )
    return Attribution(
        text=text,
        tokens=tuple(tokens),
        token_ids=tuple(range(len(tokens))),
        offsets=tuple(offsets),
        scores=torch.tensor(scores, dtype=torch.float32),
        special=tuple(bos is not None and index == 0 for index in range(len(tokens))),
        target=Explained("prediction", label, (1,), (" lantern",), (3,), "logit", 1.25),
        rules=rules.GIM,
        engine="blockwise",
        report=report,
        model=model,
        baseline=(0, " "),
        versions={"torch": "2.13"},
        memory="all kept",
    )


# Every kind of element that a page of ours has.
TAGS = """html head meta title style body header h1 small dl dt dd div span p strong ul li figure figcaption svg path
    main aside section h2 table thead tbody tr th td bdi a b footer script"""


class Page(HTMLParser):
    """What a browser makes of a page, as far as these tests ask."""

    VOID = frozenset({"meta", "br", "link", "img", "input"})

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.blocks: dict[str, list[str]] = {"style": [], "script": []}
        self.tokens: dict[str, str] = {}
        self.prompt = ""
        self.visible = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in self.blocks:
            self.blocks[tag].append("")
        if tag not in self.VOID:
            self.open.append((tag, dict(attrs)))
        if tag == "span" and "data-s" in dict(attrs):
            self.tokens[str(dict(attrs)["id"])] = ""

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop()[0] == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        where = self.open[-1][0] if self.open else ""
        if where in self.blocks:
            self.blocks[where][-1] += data
            return
        self.visible += data
        if any(attributes.get("id") == "tokens" for _, attributes in self.open):
            self.prompt += data
            for tag, attributes in self.open:
                if tag == "span" and "data-s" in attributes:
                    self.tokens[str(attributes["id"])] += data

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


# --------------------------------------------------- page


@pytest.mark.parametrize(
    "result",
    [
        attribution("The password of Irene is lantern.\n\nWhat? \tlantern", bos=40.0),
        attribution(HOSTILE, label=HOSTILE, model=HOSTILE, unsupported=[(HOSTILE, HOSTILE)]),
        attribution(HOSTILE * 20, bos=1.0),
        attribution("a"),
        attribution("", [], offsets=[]),
        attribution("", [], offsets=[], bos=3.0),
        attribution("all zero and more", [0.0] * 4),
        attribution("one line\n" * 40, bos=-3.0),
    ],
    ids=["plain", "hostile", "long", "one", "none", "only special", "zero", "lines"],
)
def test_page_shows_the_text_and_nothing_of_it_is_markup(result: Attribution) -> None:
    source = result.to_html()
    source.encode("utf-8")
    page = Page(source)
    assert page.open == []
    special = "".join(t for t, s in zip(result.tokens, result.special, strict=True) if s)
    assert page.prompt == special + visible(result.text)
    # Each line end has an element in front that a style sheet shows as a sign.
    assert len(page.attributes("b")) == result.text.count("\n")
    assert list(page.tokens) == [f"t{index}" for index in range(len(result))]
    assert {tag for tag, _ in page.elements} <= set(TAGS.split())
    assert len(page.blocks["script"]) == len(page.blocks["style"]) == 1
    for tag, attributes in page.elements:
        # No handler and no address but a place in the page itself.
        assert not {name for name in attributes if name.startswith("on") or name in ("src", "style", "srcset")}
        assert tag != "a" or str(attributes["href"])[2:].isdigit()
        assert tag != "a" or str(attributes["href"])[1:] in page.tokens
    assert not re.search(r"https?:|//[a-z]|@import|url\(|fetch|XMLHttp|import\(", source.replace(page.prompt, ""))


def test_policy_allows_exactly_the_two_blocks() -> None:
    page = Page(attribution(HOSTILE).to_html())
    policy = next(
        str(a["content"]) for a in page.attributes("meta") if a.get("http-equiv") == "Content-Security-Policy"
    )
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives["default-src"] == "'none'"
    for kind in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(page.blocks[kind][0].encode()).digest()).decode()
        assert directives[f"{kind}-src"] == f"'sha256-{digest}'"


def test_page_says_what_it_shows() -> None:
    result = attribution("lantern and more", unsupported=[("layers.3.mlp", "unknown <gate>")], bos=50.0)
    page = Page(result.to_html(top=2))
    for text in (
        "the model\u2019s prediction ' lantern', logit 1.25",
        "Model (tiny)",
        rules.GIM.describe(),
        "blockwise",
        "layers.3.mlp: unknown <gate>",
        "no q/k norms <b>",
        "torch 2.13",
        "token 0, ' '",
    ):
        assert text in page.visible
    ranked = [a["href"] for a in page.attributes("a")][:2]
    assert ranked == [f"#t{token.position}" for token in result.top(2)]
    score = dict(zip(page.tokens, [a["data-s"] for a in page.attributes("span") if "data-s" in a], strict=True))
    assert score["t1"] == f"{result.scores[1].item():+.3g}"
    assert score["t0"] == "+50"
    assert {a["id"]: a.get("class") for a in page.attributes("span") if "data-s" in a}["t0"] == "s"


def test_white_space_between_and_shared_characters() -> None:
    # A tokenizer that trims offsets, one that puts a space in front, and three bytes of one character.
    result = attribution("two  wörds 日", [1.0] * 6, offsets=[(0, 0), (0, 3), (5, 10), (11, 12), (11, 12), (11, 12)])
    shown = [(piece.text, piece.position, piece.in_text) for piece in pieces(result)]
    assert shown == [
        ("·", 0, False),
        ("two", 1, True),
        ("  wörds", 2, True),
        (" 日", 3, True),
        ("·", 4, False),
        ("·", 5, False),
    ]
    gap = attribution("ab cd ef", [1.0, 2.0], offsets=[(0, 2), (6, 8)])
    assert [(p.text, p.position) for p in pieces(gap)] == [("ab", 0), (" cd ", None), ("ef", 1)]
    for one in (result, gap):
        assert "".join(piece.text for piece in pieces(one) if piece.in_text) == one.text


def test_ten_thousand_tokens_fit_a_page() -> None:
    words = ["Password", "lantern", "the", "of", "<&>", "no\n", "end. "] * 1500
    result = attribution(" ".join(words)[:50_000], bos=1000.0)
    assert len(result) == 10_001
    source = result.to_html()
    assert len(source.encode()) < 3_000_000
    page = Page(source)
    assert len(page.tokens) == 10_001
    strip = [a for a in page.attributes("path") if len(str(a["d"])) > 1000]
    assert len(strip) == 4
    assert len(result._repr_html_()) < 60_000


def test_strip_has_a_bar_where_the_score_is() -> None:
    scores = [0.0] * 1000
    scores[250], scores[750] = 2.0, -1.0
    page = Page(attribution("x" * 5000, scores).to_html())
    paths = [(a.get("class"), str(a["d"])) for a in page.attributes("path")]
    tokens = [d for name, d in paths if name in ("plus", "minus") and d.count("M") == 1 and "h1.7" in d]
    # 1,000 tokens in 600 columns of a box of 1,000: token 250 in column 150, the bar upwards to the full height.
    assert tokens == ["M250.0 50h1.7v-50.0h-1.7z", "M750.0 50h1.7v25.0h-1.7z"]


# --------------------------------------------------- colour


def luminance(colour: str) -> float:
    """Relative luminance, by the definition of WCAG 2.2."""
    channels = (int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5))
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_text_is_legible_on_every_step(theme: Theme) -> None:
    for side in (True, False):
        ramp = theme.ramp(side)
        assert len(ramp) == LEVELS
        assert ramp[-1] == (theme.positive if side else theme.negative)
        assert min(contrast(theme.text, colour) for colour in [theme.page, *ramp]) >= 4.5
        # Each step is further from the page than the one before.
        steps = [contrast(theme.page, colour) for colour in ramp]
        assert steps == sorted(steps)
        assert steps[-1] > 1.9


# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
DEFICIENCIES = {
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}


@pytest.mark.parametrize("theme", [LIGHT, DARK])
@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_signs_differ_for_every_colour_vision(theme: Theme, deficiency: str) -> None:
    def seen(colour: str) -> list[float]:
        linear = [((int(colour[i : i + 2], 16) / 255 + 0.055) / 1.055) ** 2.4 for i in (1, 3, 5)]
        channels = [sum(m * c for m, c in zip(row, linear, strict=True)) for row in DEFICIENCIES[deficiency]]
        return [255 * min(1.0, max(0.0, c)) ** (1 / 2.4) for c in channels]

    for level in (LEVELS // 2, LEVELS):
        positive, negative = seen(theme.ramp(True)[level - 1]), seen(theme.ramp(False)[level - 1])
        assert sum((a - b) ** 2 for a, b in zip(positive, negative, strict=True)) ** 0.5 > 30


def test_scale() -> None:
    noise = [0.01 * (-1) ** index for index in range(995)]
    scale = Scale.of(attribution("x" * 5000, [*noise, *[1.0] * 5], bos=500.0))
    # The 99th percentile is noise here, so a fifth of the largest takes its place; the special token has no say.
    assert (scale.limit, scale.largest, scale.beyond) == (0.2, 1.0, 5)
    assert [scale.level(s) for s in (0.0, 0.2, -0.2, 5.0, -5.0, 0.1, -0.001)] == [0, 32, -32, 32, -32, 16, 0]
    even = Scale.of(attribution("x" * 5000, [index / 1000 for index in range(1000)]))
    assert even.limit == pytest.approx(0.99, abs=0.002)
    assert even.beyond == 9
    assert "99th percentile" in scale.describe()
    assert "5 lie beyond" in scale.describe()
    zero = Scale.of(attribution("ab cd ef", [0.0, 0.0]))
    assert (zero.level(0.0), zero.aligned(0.0), zero.describe()) == (0, "0", "Every score is 0.")


# --------------------------------------------------- text


def test_visible_leaves_nothing_hidden() -> None:
    shown = visible(HOSTILE + "\ufeff\u2066\x7f\ufdd0\U0001fffe\u00ad")
    shown.encode("utf-8")
    for character in "\x00\x1b\x9b\r\x7f\u202e\u202c\u200b\u2028\ufeff\u2066\ud800\ufdd0\U0001fffe\u00ad":
        assert character not in shown
    assert "⟨U+202E⟩evil" in shown
    assert "␛[31mred" in shown
    for kept in ("العربية", "日本語", "👩\u200d👧", "🇩🇪", "\ufffd", "\n", "naïve \u0645\u06cc\u200c\u062e\u0648\u0627"):
        assert visible(kept) == kept
    assert one_line("a\n\tb\r") == "a↵⇥b␍"


def test_templates_show_nothing_raw() -> None:
    shown = html.environment().from_string("{{ text }}").render(text="<b>\u202e&\x00")
    assert shown == "&lt;b&gt;⟨U+202E⟩&amp;␀"


def test_context_fits_and_marks_what_it_cuts() -> None:
    text = "before " * 9 + "lantern" + " after" * 9
    result = attribution(text, [1.0], offsets=[(62, 70)])
    found = context(result, result.top(1)[0], 10)
    assert (found.before, found.token, found.after) == ("…re before ", "lantern", " after aft…")
    wide = attribution("日" * 40, [1.0], offsets=[(20, 21)])
    assert context(wide, wide.top(1)[0], 10).before == "…" + "日" * 5


# --------------------------------------------------- notebook


@pytest.mark.parametrize("text", [HOSTILE, HOSTILE * 60])
def test_notebook_piece_stays_inside(text: str) -> None:
    source = attribution(text, bos=5.0)._repr_html_()
    page = Page(source)
    assert page.open == []
    assert not page.blocks["script"]
    assert not re.search(r"https?:|@import|url\(", source)
    (style,) = page.blocks["style"]
    selectors = [s for rule in re.findall(r"([^{}]+)\{", style) for s in rule.split(",")]
    assert len(selectors) > 100
    assert all(".gim-attribution" in selector for selector in selectors)
    assert source.startswith('<div class="gim-attribution">')
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert any(attributes.get("title") for attributes in page.attributes("span"))


# --------------------------------------------------- terminal


def printed(result: Attribution, width: int = 100, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=width, **options)
    console.print(result)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_terminal_without_colour_has_signs() -> None:
    text = "The password is lantern."
    result = attribution(text, [0.1, -3.0, 0.0, 4.0, 0.0], offsets=[(0, 3), (3, 12), (12, 15), (15, 23), (23, 24)])
    shown = printed(result)
    assert "The [-password-] is [+lantern+]." in shown
    assert "\x1b" not in shown
    assert re.search(r"1 +\+4\.000 +█+ +3 +The password is \[lantern\]\.", shown)

    # Not by the codes that are written: rich remembers a style's codes from the first console that wrote it.
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="truecolor", no_color=False)
    segments = [segment for segment in console.render(result) if "lantern" in segment.text]
    (style,) = [segment.style for segment in segments if segment.text == " lantern"]
    assert style is not None and style.bgcolor is not None
    assert style.bgcolor.name == LIGHT.positive
    assert not any("[+" in segment.text for segment in segments)


@pytest.mark.parametrize("text", [HOSTILE, HOSTILE * 40], ids=["short", "long"])
@pytest.mark.parametrize("width", [30, 80, 200])
def test_terminal_obeys_nothing_in_the_text(text: str, width: int) -> None:
    result = attribution(text, bos=3.0, label=HOSTILE, model=HOSTILE)
    shown = printed(result, width)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", shown)
    plain = printed(result, width, force_terminal=True, color_system="256")
    assert not re.search(r"\x1b(?!\[[0-9;]*m)", plain)


def test_terminal_of_a_long_prompt_is_short_and_shows_the_strongest() -> None:
    text = "Nothing is here to see. " * 1000 + "The password is lantern. " + "Nor is it here. " * 500
    at = text.index("lantern")
    offsets = cut(text, 8)
    scores = [9.0 if a < at + 7 and b > at else 0.001 for a, b in offsets]
    shown = printed(attribution(text, scores, offsets=offsets))
    assert len(shown.splitlines()) < 60
    assert "lantern" in shown
    assert "All 4,004 tokens" in shown
    (bars,) = [line for line in shown.splitlines() if line.startswith("+ ")]
    assert bars[2:].index("█") == pytest.approx(98 * at / len(text), abs=1.5)


@pytest.mark.parametrize("width", [40, 60, 80])
def test_terminal_cuts_no_number(width: int) -> None:
    text = "Oscar has a dog named Rocket. " * 40
    result = attribution(text, [(-1) ** i * (400.0 + i) for i in range(len(cut(text)))])
    shown = printed(result, width).split("Strongest tokens")[1]
    for token in result.top(10):
        assert re.search(rf" *{token.rank} +{re.escape(f'{token.score:+.1f}')} .*{token.position:,} ", shown), shown


@pytest.mark.parametrize(
    "result",
    [
        attribution("", [], offsets=[]),
        attribution("a", [0.0]),
        pytest.param(attribution("x" * 4000, [0.0] * 800), marks=pytest.mark.slow),
    ],
)
def test_degenerate_attributions_can_be_drawn(result: Attribution) -> None:
    assert "Every score is 0." in printed(result)
    assert "Every score is 0." in result._repr_html_()
    assert picture.png(result)[:4] == b"\x89PNG"


# --------------------------------------------------- picture


def pixels(png: bytes) -> set[tuple[int, ...]]:
    from PIL import Image

    image = Image.open(io.BytesIO(png)).convert("RGB")
    return {colour for _, colour in image.getcolors(1 << 24)}


def test_picture_has_the_colours_of_its_tokens(tmp_path: Any) -> None:
    result = attribution("one lantern camel", [0.0, 1.0, -0.5], offsets=[(0, 3), (3, 11), (11, 17)])
    result.to_png(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    assert width == 1440
    assert 600 < height < 1600
    assert zlib.crc32(content[12:29]) == struct.unpack(">I", content[29:33])[0]

    def rgb(colour: str) -> tuple[int, ...]:
        return tuple(int(colour[index : index + 2], 16) for index in (1, 3, 5))

    colours = pixels(content)
    assert rgb(LIGHT.ramp(True)[LEVELS - 1]) in colours
    assert rgb(LIGHT.ramp(False)[LEVELS // 2 - 1]) in colours
    assert rgb(LIGHT.ramp(False)[LEVELS - 1]) not in colours


@pytest.mark.parametrize("text", first((HOSTILE + "$x_1$ $\\nope{$", HOSTILE * 60), (HOSTILE + "$x_1$ $\\nope{$",)))
def test_picture_of_a_hostile_text(text: str, recwarn: pytest.WarningsRecorder) -> None:
    assert picture.png(attribution(text, bos=5.0, label=HOSTILE))[:8] == b"\x89PNG\r\n\x1a\n"
    assert not recwarn.list


def test_picture_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install gim-kernels\[report\]"):
        attribution("a").to_png(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
