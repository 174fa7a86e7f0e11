"""The command ``tensorcomp``."""

from __future__ import annotations

import typer

from tensorcomp_ext.cli.bench import bench
from tensorcomp_ext.cli.common import Commands
from tensorcomp_ext.cli.compress import compress
from tensorcomp_ext.cli.demo import demo
from tensorcomp_ext.cli.info import info
from tensorcomp_ext.cli.recipes import RecipeCommand
from tensorcomp_ext.cli.report import report
from tensorcomp_ext.cli.tune import tune

app = typer.Typer(
    cls=Commands,
    name="tensorcomp",
    help="Make trained networks smaller and faster by low-rank tensor compression.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(demo)
app.command(cls=RecipeCommand)(compress)
for command in (bench, tune, report, info):
    app.command()(command)
