"""The recipes of the papers' own code, by names such as "dtl/vtab/svhn".

Each file of this folder is one method on one benchmark: what its tasks share, and a table with a row for each task. A
name is the method's folder, the file, and the task. In few-shot learning it ends in the task and its images per class,
as in "dtl/fewshot/flowers102-4".

    from sidestep.training import recipes

    recipe = recipes.load("dtl/vtab/svhn")
    backbone = load_backbone("timm:vit_base_patch16_224@ViT-B_16.npz", drop_path=recipe.drop_path)
    model = ss.attach(backbone, recipe.config(), head=head_for(data, recipe.pool), backbone_noise=recipe.noise)
    train(model, data, recipe.settings(output="tasks/svhn"))
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from sidestep.backbone.pixels import ImageTransform
    from sidestep.methods import MethodConfig
    from sidestep.training.settings import TrainSettings

__all__ = ["Group", "Recipe", "groups", "load", "names"]

FOLDER = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a paper's code trains one task. It is plain data until a method asks for more.

    Attributes:
        name: such as "dtl/vtab/svhn".
        source: where its numbers come from.
        backbone: what it was made for, in words.
        method: name of the method.
        method_settings: its config's fields.
        problem: what the task is, as `sidestep.kinds.prepare.prepare` names it. None: by the labels.
        pool: what the head reads. None: the method has a read-out of its own, or the backbone's own head is there.
        head: further fields of the head (`Retrieve`'s).
        noise: what `attach` takes as `backbone_noise`.
        drop_path: rate of the backbone's drop path in training.
        training: fields of `TrainSettings`.
        images: fields of `ImageTransform`, for all images but augmented ones. Empty: the backbone's own processor.
        max_length: tokens that are kept of a text. None: as the tokenizer says.
        frames: taken of a video. None: the recipe is for no videos.
        augment: random views of the training images. None: no such views.
        shots: training images of each class. None: all.
    """

    name: str
    source: str
    backbone: str
    method: str
    method_settings: Mapping[str, Any]
    problem: Literal["text2text", "retrieval"] | None
    pool: str | None
    head: Mapping[str, Any]
    noise: Literal["drop_path", "dropout", "all"] | None
    drop_path: float
    training: Mapping[str, Any]
    images: Mapping[str, Any]
    max_length: int | None
    frames: int | None
    augment: str | None
    shots: int | None

    def config(self) -> MethodConfig:
        """The method's config."""
        from sidestep.methods import method_named

        return method_named(self.method).config.from_dict(dict(self.method_settings))

    def settings(self, **others: Any) -> TrainSettings:
        """The settings of training. `others` are fields of `TrainSettings` that the recipe leaves open, or overrides.

        Raises:
            ValueError: if a value is out of range.
        """
        from sidestep.training.settings import TrainSettings

        return TrainSettings(**{**self.training, **others})

    def transform(self) -> ImageTransform | None:
        """What makes pixel values of an image. None: the backbone's own processor."""
        from sidestep.backbone.pixels import ImageTransform

        return ImageTransform.from_dict(self.images) if self.images else None


@dataclass(frozen=True, kw_only=True)
class Group:
    """One file of recipes.

    Attributes:
        name: what the names of its recipes begin with, such as "dtl/vtab".
        title: in words.
        recipes: by name.
    """

    name: str
    title: str
    recipes: Mapping[str, Recipe]


def load(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        ValueError: if there is no such recipe. The message has close names, or all that the name may begin with.
    """
    known = {recipe: group for group in groups() for recipe in group.recipes}
    if name in known:
        return known[name].recipes[name]
    within = next((group for group in groups() if name.startswith(f"{group.name}/")), None)
    if within is not None:
        tasks = ", ".join(recipe.removeprefix(f"{within.name}/") for recipe in within.recipes)
        raise ValueError(f"there is no recipe {name!r}{_meant(name, within.recipes)}: {within.name} has {tasks}")
    raise ValueError(
        f"there is no recipe {name!r}{_meant(name, known)}: names begin with "
        f"{', '.join(group.name for group in groups())}. `sidestep recipes PREFIX` lists them"
    )


def names(prefix: str = "") -> tuple[str, ...]:
    """Names of the recipes below a prefix such as "dtl/vtab", or of that very name, in the order of their tables."""
    every = [name for group in groups() for name in group.recipes]
    return tuple(name for name in every if not prefix or f"{name}/".startswith(f"{prefix.rstrip('/')}/"))


@lru_cache(maxsize=1)
def groups() -> tuple[Group, ...]:
    """All recipes, file by file."""
    return tuple(_group(path) for path in sorted(FOLDER.glob("*/*.toml"), key=lambda path: path.with_suffix("")))


def _meant(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def _group(path: Path) -> Group:
    shared = tomllib.loads(path.read_text(encoding="utf-8"))
    prefix, title, tasks = f"{path.parent.name}/{path.stem}", shared.pop("title"), shared.pop("tasks")
    rows = _few_shot_rows(tasks) if "shots" in tasks else _rows(tasks)
    recipes = {f"{prefix}/{task}": _recipe(f"{prefix}/{task}", shared, row) for task, row in rows.items()}
    return Group(name=prefix, title=title, recipes=MappingProxyType(recipes))


def _rows(tasks: Mapping[str, list[Any]]) -> dict[str, dict[str, Any]]:
    """Each task's own values, under the names in the table's first row."""
    columns = tasks["columns"]
    return {task: dict(zip(columns, row, strict=True)) for task, row in tasks.items() if task != "columns"}


def _few_shot_rows(tasks: Mapping[str, list[Any]]) -> dict[str, dict[str, Any]]:
    """A row for each task and number of shots, from a table of learning rates."""
    return {
        f"{task}-{shots}": {"shots": shots, "learning_rate": rate}
        for task, row in tasks.items()
        if task != "shots"
        for shots, rate in zip(tasks["shots"], row, strict=True)
    }


def _recipe(name: str, shared: Mapping[str, Any], row: Mapping[str, Any]) -> Recipe:
    own = dict(row)
    # a published run trains all its epochs
    training = {"patience": 0, **shared["training"], **_taken(own, ("learning_rate", "epochs", "weight_decay"))}
    plain: dict[str, Any] = {"problem": None, "pool": None, "drop_path": 0.0, "max_length": None}
    plain |= {"frames": None, "augment": None, "shots": None}
    plain |= {key: value for key, value in shared.items() if not isinstance(value, dict)}
    plain |= _taken(own, ("drop_path", "shots"))
    plain.setdefault("noise", "drop_path" if plain["drop_path"] else None)
    return Recipe(
        name=name,
        # what is left of the row belongs to the method
        method_settings=_fixed({**shared.get("method_settings", {}), **own}),
        training=_fixed(training),
        images=_fixed(shared.get("images", {})),
        head=_fixed(shared.get("head", {})),
        **plain,
    )


def _fixed(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The values, not to be changed."""
    return MappingProxyType({key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def _taken(values: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: values.pop(key) for key in keys if key in values}
