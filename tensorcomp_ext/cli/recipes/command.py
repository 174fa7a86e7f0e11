"""A command that has the options of the recipe it is called with."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperCommand

from tensorcomp_ext.cli.recipes.base import owners_of, parameters_of, recipe_class

_NAME, _VALUES = "tensorcomp.recipe", "tensorcomp.recipe_options"


def _chosen(words: Sequence[str]) -> str | None:
    """The value of --recipe among the words of a command line; the last one, as options go."""
    found = None
    for place, word in enumerate(words):
        if word == "--recipe" and place + 1 < len(words):
            found = words[place + 1]
        elif word.startswith("--recipe="):
            found = word.partition("=")[2]
    return found


class RecipeCommand(TyperCommand):
    """Options behind ``--recipe NAME`` are those of that recipe, in its ``--help`` as in its use.

    Options of another recipe, or of any where none is given, are refused with the names of those that have
    them.
    """

    def get_params(self, ctx: Any) -> list[Any]:
        own = super().get_params(ctx)
        name = ctx.meta.get(_NAME)
        if name is None:
            return own
        return [*own[:-1], *parameters_of(recipe_class(name)), *own[-1:]]  # --help comes last

    def format_options(self, ctx: Any, formatter: Any) -> None:
        name = ctx.meta.pop(_NAME, None)
        super().format_options(ctx, formatter)
        if name is not None:
            recipe = recipe_class(name)
            ctx.meta[_NAME] = name
            with formatter.section(f"Options of --recipe {name}"):
                formatter.write_text(inspect.getdoc(recipe) or "")
                records = [p.get_help_record(ctx) for p in parameters_of(recipe)]
                formatter.write_dl([record for record in records if record is not None])

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        name = _chosen(args)
        ctx.meta[_NAME] = name
        known = {option for param in self.get_params(ctx) for option in (*param.opts, *param.secondary_opts)}
        for word in args:
            option = word.partition("=")[0]
            owners = owners_of(option) if option.startswith("--") and option not in known else []
            if owners:
                given = "no recipe is given" if name is None else f"--recipe is {name}"
                raise typer.BadParameter(
                    f"this is for --recipe {', '.join(owners)}; {given}", param_hint=option
                )
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        name = ctx.meta.get(_NAME)
        own = parameters_of(recipe_class(name)) if name is not None else ()
        ctx.meta[_VALUES] = {p.name: ctx.params.pop(p.name) for p in own}
        return super().invoke(ctx)


def recipe_values(context: typer.Context) -> dict[str, Any]:
    """The options of the recipe, as they were given or by default."""
    found: dict[str, Any] = context.meta[_VALUES]
    return found
