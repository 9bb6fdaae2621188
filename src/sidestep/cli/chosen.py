"""The values of a run's options: what was typed, else what a recipe says, else their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import typer

from sidestep.training.recipes import Recipe, load


@dataclass(frozen=True)
class Chosen:
    """A recipe's values of a command's options, and what was typed.

    Attributes:
        recipe: None without a recipe.
        values: of the recipe, by the names of the command's parameters.
        typed: values of the parameters that were given on the command line.
    """

    recipe: Recipe | None
    values: Mapping[str, Any]
    typed: Mapping[str, Any]

    @classmethod
    def of(cls, context: typer.Context, name: str | None) -> Chosen:
        """The choices of a command that was given a recipe's name, or None.

        Raises:
            ValueError: if there is no such recipe.
        """
        sources = {key: context.get_parameter_source(key) for key in context.params}
        typed = {key: context.params[key] for key, source in sources.items() if source and source.name == "COMMANDLINE"}
        if name is None:
            return cls(None, {}, typed)
        recipe = load(name)
        return cls(recipe, _values(recipe, typed), typed)

    def over(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters' values, with the recipe's in the place of those that were not typed."""
        return {key: self.values[key] if key in self._filled else value for key, value in given.items()}

    @property
    def _filled(self) -> set[str]:
        return set(self.values) - set(self.typed)

    def method_settings(self, method: str) -> dict[str, Any]:
        """What the recipe sets of its method. Nothing for another method."""
        return dict(self.recipe.method_settings) if self.recipe and self.recipe.method == method else {}

    def head(self) -> dict[str, Any]:
        """What the recipe sets of the head of pairs."""
        return dict(self.recipe.head) if self.recipe else {}

    def record(self) -> dict[str, Any] | None:
        """The recipe's name, and what was typed in the place of its values. None without a recipe."""
        if self.recipe is None:
            return None
        names = {*self.values, "set_", "warmup", "image_size", "normalize"}
        changed = {key.rstrip("_"): self.typed[key] for key in sorted(names & set(self.typed))}
        return {"name": self.recipe.name, "overridden": changed}


def _values(recipe: Recipe, typed: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's values by the names of the command's parameters, as far as they fit what was typed."""
    values = {
        **recipe.training,
        "method": recipe.method,
        "pool": None if typed.get("own_head") else recipe.pool,
        **recipe.head,
        "problem": recipe.problem,
        "max_length": recipe.max_length,
        "frames": recipe.frames,
        "backbone_noise": recipe.noise if not recipe.drop_path else None,  # which goes with the rate
        "drop_path": recipe.drop_path,
        "augment": recipe.augment or "none",
        "shots": recipe.shots,
    }
    if {"warmup", "warmup_epochs", "warmup_steps"} & set(typed):
        values |= {"warmup_epochs": None, "warmup_steps": None}
    if "schedule" in typed:
        values["milestones"] = ()
    if "epochs" in typed:
        # a shorter or longer run warms up for the same share, and its rate falls at the same shares
        share = typed["epochs"] / recipe.training["epochs"]
        if values.get("warmup_epochs"):
            values["warmup_epochs"] = round(values["warmup_epochs"] * share)
        scaled = {round(epoch * share) for epoch in values.get("milestones", ())}
        values["milestones"] = tuple(sorted(scaled & set(range(1, typed["epochs"]))))
        if values.get("schedule") == "step" and not values["milestones"]:
            values["schedule"] = "constant"
    return values
