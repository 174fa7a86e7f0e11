"""``tensorcomp compress --recipe``: one file a family of recipes."""

from . import posttraining, nrmf, gated, progressive, lowrank_sparse  # noqa: F401, I001 - in this order
from .base import Common, Recipe, recipe_class, recipe_names
from .command import RecipeCommand, recipe_values
from .lowrank_sparse import stored_rows

__all__ = [
    "Common",
    "Recipe",
    "RecipeCommand",
    "recipe_class",
    "recipe_names",
    "recipe_values",
    "stored_rows",
]
