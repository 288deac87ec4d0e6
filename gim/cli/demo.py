"""`gim demo`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gim.cli.attributions import progress_bar, show, writers
from gim.cli.errors import UserError, check_outputs, handled, refused
from gim.cli.models import loading, quieten, rules_named, token_count
from gim.cli.options import Debug, HtmlFile, JsonFile, PngFile, RulesName, Top
from gim.cli.output import deliver

if TYPE_CHECKING:
    from gim.attribution import Attribution


def command(
    html: HtmlFile = None,
    json: JsonFile = None,
    png: PngFile = None,
    rules: RulesName = "GIM",
    top: Top = 10,
    debug: Debug = False,
) -> None:
    """Ask a small model that comes with the package for a fact in a long text, and see where it looked."""
    with handled(debug):
        chosen = rules_named(rules, None)
        outputs = check_outputs({"--html": html, "--json": json, "--png": png})
        import gim
        import gim.demo

        try:
            with loading("the demo model"):
                quieten()
                model, tokenizer = gim.demo.load()
                prompt = gim.demo.prompt()
        except FileNotFoundError as error:
            raise UserError(str(error)) from error
        with refused(), progress_bar(token_count(tokenizer, prompt.text)) as progress:
            attribution = gim.attribute(model, tokenizer, prompt.text, rules=chosen, progress=progress)

        def shown() -> None:
            show(attribution, top)
            _show_demo(attribution, prompt)

        deliver(outputs, writers(attribution, top), shown)


def _show_demo(attribution: Attribution, prompt: Any) -> None:
    """The question, the model's answer, and where the statements of the asked fact rank."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from gim.report.text import number, one_line

    console = Console()
    answer = "".join(attribution.target.tokens)
    is_right = answer.strip() == prompt.answer.strip()
    question = prompt.text.rstrip().splitlines()[-2]
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    grid.add_row("Asked", Text(one_line(question)))
    verdict = (" (right)", "green") if is_right else (f" (wrong, it is {prompt.answer.strip()!r})", "red")
    grid.add_row("Answered", Text.assemble((one_line(answer.strip()), "bold"), verdict))
    console.print(grid)
    console.print()

    sentences = sorted(attribution.to_sentences(), key=lambda span: -abs(span.score))
    table = Table(
        title=f"The {len(prompt.statements)} statements of the asked fact",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("statement")
    table.add_column("best token")
    table.add_column("at", justify="right")
    table.add_column("score", justify="right")
    table.add_column("rank", justify="right")
    table.add_column("sentence rank", justify="right")
    tokens = sum(not one for one in attribution.aside)
    for statement in prompt.statements:
        start, end = statement.sentence
        best = attribution.best_in(start, end, by="abs")
        of_sentences = next(
            rank for rank, span in enumerate(sentences, start=1) if span.start < end and span.end > start
        )
        table.add_row(
            Text(one_line(attribution.text[start:end])),
            Text(one_line(best.token)),
            f"{best.position:,}",
            number(best.score),
            f"{best.rank:,} of {tokens:,}",
            f"{of_sentences:,} of {len(sentences):,}",
        )
    console.print(table)
