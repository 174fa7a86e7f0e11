"""``compress --recipe``: each recipe shows and takes its own options, and none of another's."""

import inspect

import pytest
from typer.testing import CliRunner

from tensorcomp_ext import recipes
from tensorcomp_ext.cli.main import app
from tensorcomp_ext.cli.recipes import recipe_names
from tensorcomp_ext.cli.recipes.base import parameters_of, recipe_class


def run(*words):
    return CliRunner().invoke(app, ["compress", *words], env={"COLUMNS": "200"})


@pytest.mark.parametrize("name", recipe_names())
def test_help_of_each_recipe(name):
    outcome = run("--recipe", name, "--help")
    assert outcome.exit_code == 0
    own = outcome.stdout.partition(f"Options of --recipe {name}")[2]
    summary = "".join((recipe_class(name).__doc__ or "").split())  # words may be parted at line ends
    assert summary and summary in "".join(own.split())
    for parameter in parameters_of(recipe_class(name)):
        assert parameter.opts[0] in own and parameter.help
    assert "--model" in outcome.stdout and own.count("--model") == 0


def test_help_without_a_recipe_names_them():
    text = "".join(run("--help").stdout.split())  # names may be parted at line ends
    assert ",".join(recipe_names()) in text and "--recipeNAME--helpshowsitsoptions" in text
    assert "--sparsity" not in text


@pytest.mark.parametrize("words", [["--sparsity", "0.5"], ["--sparsity=0.5"], ["--low-rank", "tt"]])
def test_options_of_a_recipe_that_is_not_given(words):
    outcome = run("--model", "lenet5", *words)
    assert outcome.exit_code == 2
    assert "this is for --recipe lowrank-sparse, sparse, lowrank; no recipe is given" in " ".join(
        outcome.stderr.split()
    )


def test_a_recipe_that_decides_ranks_takes_none():
    outcome = run("--model", "lenet5", "--recipe=sparse", "--rank", "4")
    assert outcome.exit_code == 2
    assert "--recipe sparse has no use for it" in " ".join(outcome.stderr.split())


def test_a_recipe_that_trains_needs_epochs_and_images():
    words = ["--model", "lenet5", "--recipe", "lowrank-sparse"]
    assert "this recipe trains: say for how long with --epochs" in " ".join(run(*words).stderr.split())
    assert "needs --data" in " ".join(run(*words, "--epochs", "1").stderr.split())


@pytest.mark.parametrize(
    "name", ["l0", "reinforce", "mars", "uniform", "nrmf", "progressive", "lowrank-sparse"]
)
def test_defaults_are_those_of_the_function(name):
    """A recipe does the same from the command line as from Python."""
    function = getattr(recipes, name.replace("-", "_"))
    given = {key: p.default for key, p in inspect.signature(function).parameters.items()}
    own = {p.name: p.default for p in parameters_of(recipe_class(name)) if p.name in given}
    own.pop("low_rank", None)  # several words there, one value or a mapping here
    assert own and own == {key: given[key] for key in own}
