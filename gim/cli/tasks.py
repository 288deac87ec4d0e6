"""`gim tasks`."""

from __future__ import annotations

from typing import Annotated

import typer

from gim.cli.errors import UserError, handled
from gim.cli.output import showing


def command(
    name: Annotated[str | None, typer.Argument(help="A task, for its page; none to list them.")] = None,
) -> None:
    """List the tasks that gim evaluate has in the box, or show one: what it asks, its source, licence, examples."""
    from rich.console import Console
    from rich.text import Text

    from gim.evaluation.tasks import TASKS

    with handled(False):
        if name is not None and name not in TASKS:
            raise UserError(f"there is no task {name!r}: those are {', '.join(TASKS)}")
        console = Console()
        with showing():
            if name is not None:
                console.print(Text(TASKS[name].page()), soft_wrap=True)
                return
            for task in TASKS.values():
                console.print(Text.assemble((task.name, "bold"), f"  {task.asks}"), soft_wrap=True)
