"""The command `sidestep`: train, eval, predict, inspect, bank, serve, features, methods, recipes, demo, report, plan.

Whatever imports torch is imported inside the commands. So help and typing errors come at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sidestep.cli.bank import bank
from sidestep.cli.compare import compare
from sidestep.cli.demo import demo
from sidestep.cli.features import features
from sidestep.cli.listing import inspect, methods, recipes
from sidestep.cli.plan import plan
from sidestep.cli.plugins import WithPlugins, load_plugins
from sidestep.cli.report import report
from sidestep.cli.serve import serve
from sidestep.cli.tasks import evaluate, predict
from sidestep.cli.train import train

__all__ = ["app"]

app = typer.Typer(
    name="sidestep",
    cls=WithPlugins,
    help="Tune a frozen pretrained Transformer for a task, and use the task.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _commands(
    plugin: Annotated[
        list[Path] | None,
        typer.Option("--plugin", metavar="FILE", help="File that registers a method or a kind of task."),
    ] = None,
) -> None:
    load_plugins(plugin)


app.command()(train)
app.command("eval")(evaluate)
app.command()(predict)
app.command()(inspect)
app.add_typer(bank)
app.command()(serve)
app.add_typer(features)
app.command()(methods)
app.command()(recipes)
app.command()(compare)
app.command()(demo)
app.command()(plan)
app.command()(report)
