"""A comparison from a TOML file, or from the same values given as flags."""

from __future__ import annotations

import os
import re
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from sidestep.backbone.gguf import GGUF, gguf_name, gguf_parts, is_gguf
from sidestep.backbone.source import TIMM, VIT
from sidestep.compare.claims import places
from sidestep.compare.spec import (
    CHECKPOINT,
    Backbone,
    Comparison,
    Contender,
    Costs,
    Task,
    default_contenders,
    require_known,
)
from sidestep.data import Fields, TableOptions
from sidestep.data.pairs import looked_for
from sidestep.disk.atomic import check_file, refuse_inputs
from sidestep.disk.feature_options import FeatureOptions
from sidestep.disk.sources import backbones_at, rows_at
from sidestep.kinds.base import kind_named
from sidestep.kinds.prepare import check_kind
from sidestep.measure.plan import memory_of
from sidestep.messages import duration_of
from sidestep.methods import method_named, methods

VARIABLE = re.compile(r"\$\{(\w+)\}")
Made = TypeVar("Made")
KINDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", dict: "a table"}


def comparison_file(path: Path, results: Path | None = None) -> tuple[Comparison, Path]:
    """The comparison that a TOML file describes, and where its results go.

    Args:
        path: of the file. Paths in the file are relative to it, and `${NAME}` is an environment variable.
        results: where results go. None: the file's `output`, or a .jsonl of the same name.

    Raises:
        ValueError: if the file cannot be read, or a field, method or value in it is unknown. The message says which.
        OutputError: if the results cannot go there, or would go into the file itself or into what is compared.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: check the path of the comparison") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as TOML: {error}") from error
    output = values.pop("output", None)
    if not isinstance(output, str | None):
        raise ValueError(f"{path}: output={output!r} is not a text")
    if output == "":
        raise ValueError(f"{path}: output is empty: name a file, or leave it out")
    own = (
        path.with_suffix(".jsonl") if output is None else path.parent / Path(_expanded(output, str(path))).expanduser()
    )
    comparison = comparison_from(values, path.parent, str(path))
    check_results(comparison, results or own, path)
    return comparison, results or own


def check_results(comparison: Comparison, results: Path, *read: Path) -> None:
    """Refuses a results file that cannot be written, or that the comparison reads.

    Args:
        comparison: with rows and backbones.
        results: the file.
        read: further files that it must not be.

    Raises:
        OutputError: naming both.
    """
    check_file(results)
    rows = [source for task in comparison.tasks for source in (task.train, task.dev)]
    models = [model for backbone in comparison.backbones for model in (backbone.model, backbone.text_model) if model]
    refuse_inputs(places(results), [*read, *rows_at(*rows), *backbones_at(*models)])


def comparison_from(values: Mapping[str, Any], base: Path, where: str) -> Comparison:
    """The comparison that these values describe.

    Args:
        values: as a TOML file holds them. See docs/compare.md.
        base: the folder that relative paths start at.
        where: what the values are from, for messages.

    Raises:
        ValueError: for what is unknown, missing or out of range.
    """
    table = _Table(values, where)
    backbones = tuple(_backbone(part, base) for part in table.tables("backbone"))
    tasks = tuple(_task(part, base) for part in table.tables("task"))
    named = table.texts("methods")
    own = table.tables("contender")
    given: dict[str, Any] = {
        "seeds": table.several("seeds", int),
        "rows": table.get("rows", int),
        "dev_rows": table.get("dev_rows", int),
        "epochs": table.get("epochs", int),
        "batch_size": table.get("batch_size", int),
        "weight_decay": table.get("weight_decay", float),
        "warmup": table.get("warmup", float),
        "schedule": table.get("schedule", str),
        "bf16": table.get("bf16", bool),
        "max_length": table.get("max_length", int),
        "holdout": table.get("holdout", float),
        "attention": table.get("attention", str),
    }
    if (budget := table.get("budget", str)) is not None:
        given["budget"] = table.made(duration_of, text=budget)
    given["features"] = _features(table)
    contenders = (*map(Contender.named, named or ()), *map(_contender, own)) or default_contenders()
    found = {name: value for name, value in given.items() if value is not None}
    comparison = table.made(Comparison, backbones=backbones, tasks=tasks, contenders=contenders, costs=None, **found)
    costs = _costs(table, given)
    table.finish()
    return replace(comparison, costs=costs)


class _Table:
    """A table of the file, read field by field, so that `finish` knows which fields there are."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = dict(values), where
        self.known: list[str] = []

    def get(self, name: str, kind: type, default: Any = None, *, empty: bool = False) -> Any:
        """A value of a kind, `default` if the field is missing. `empty`: a text may have no letter."""
        self.known.append(name)
        value = self.values.get(name)
        return default if value is None else self._checked(name, value, kind, empty=empty)

    def need(self, name: str) -> str:
        """A text that has to be there."""
        if (value := self.get(name, str)) is None:
            raise ValueError(f"{self.where}: {name} is missing")
        return value

    def several(self, name: str, kind: type) -> tuple[Any, ...] | None:
        """Values of a kind, None where there are none."""
        self.known.append(name)
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, list | tuple):
            raise ValueError(f"{self.where}: {name}={value!r} is not a list")
        if not value:
            raise ValueError(f"{self.where}: {name}=[] is empty: give at least one, or leave it out")
        return tuple(self._checked(name, part, kind) for part in value)

    def texts(self, name: str) -> tuple[str, ...] | None:
        """Texts, None where there are none."""
        return self.several(name, str)

    def tables(self, name: str) -> list[_Table]:
        """The tables of an array ([[name]])."""
        parts = self.several(name, dict) or ()
        return [_Table(part, f"{self.where}, [[{name}]] {number + 1}") for number, part in enumerate(parts)]

    def made(self, kind: Callable[..., Made], /, **values: Any) -> Made:
        """What the table describes.

        Raises:
            ValueError: if a value is out of range, with where it stands.
        """
        try:
            return kind(**values)
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from error

    def finish(self) -> None:
        """Refuse a field that nobody has asked for."""
        for name in self.values:
            try:
                require_known("field", name, self.known)
            except ValueError as error:
                raise ValueError(f"{self.where}: {error}") from None

    def _checked(self, name: str, value: Any, kind: type, *, empty: bool = False) -> Any:
        if (
            kind is float
            and isinstance(value, int)
            and not isinstance(value, bool)
            and abs(value) <= sys.float_info.max
        ):
            return float(value)
        # a bool is an int to Python, not to a user
        if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
            raise ValueError(f"{self.where}: {name}={value!r} is not {KINDS[kind]}")
        if value == "" and not empty:
            raise ValueError(f"{self.where}: {name} is empty: give a text, or leave it out")
        return _expanded(value, self.where) if isinstance(value, str) else value


def _called(model: str, base: Path) -> str:
    """A backbone's name in tables, where the file gives none."""
    if is_gguf(model):
        return Path(gguf_parts(model)[1]).stem
    return _name_of(model.partition("@")[0], base)


def _backbone(table: _Table, base: Path) -> Backbone:
    model = table.need("model")
    found = table.made(
        Backbone,
        name=table.get("name", str) or _called(model, base),
        model=_resolved_backbone(model, base),
        text_model=None if (text := table.get("text_model", str)) is None else _resolved_backbone(text, base),
        dtype=table.get("dtype", str),
        revision=table.get("revision", str),
        quantize=table.get("quantize", str),
        pool=table.get("pool", str),
    )
    table.finish()
    return found


def _task(table: _Table, base: Path) -> Task:
    dev = table.get("dev", str)
    text, text2, image, audio, video = (table.get(name, str) for name in ("text", "text2", "image", "audio", "video"))
    problem = check_kind(table.get("kind", str) or table.get("problem", str))
    label = table.get("label", str, "label")
    named = [column for column in (text, image, audio) if column is not None]
    if problem is not None and kind_named(problem).dual:
        label = None
        table.made(looked_for, fields=Fields(text=text, text2=text2, image=image, audio=audio, video=video))
    elif video is not None or not named or (audio is not None and len(named) > 1):
        raise ValueError(
            f"{table.where}: name one column, of texts (text), of images (image) or of sounds (audio). For a "
            "vision-language model name text and image. Pairs of texts with images or videos are for kind = retrieval"
        )
    options = table.made(
        TableOptions,
        columns=table.texts("columns"),
        header=table.get("header", bool, True),
        quoting=table.get("quoting", bool, True),
        encoding=table.get("encoding", str, "utf-8"),
    )
    train = table.need("train")
    found = table.made(
        Task,
        name=table.get("name", str) or _name_of(train, base).partition(".")[0],
        train=_resolved(train, base),
        dev=None if dev is None else _resolved(dev, base),
        fields=Fields(text=text, text2=text2, image=image, audio=audio, video=video, label=label),
        problem=problem,
        options=options,
        train_split=table.get("train_split", str, "train"),
        dev_split=table.get("dev_split", str, "validation"),
        rows=table.get("rows", int),
        shots=table.get("shots", int),
        separator=table.get("separator", str, empty=True),
        frames=table.get("frames", int),
        answers=table.get("answers", int),
        boxes=table.get("boxes", str, "xyxy"),
    )
    table.finish()
    return found


def _contender(table: _Table) -> Contender:
    method = table.need("method")
    require_known("method", method, methods())
    checkpoint = table.get("checkpoint", bool, False)
    config = table.get("set", dict, {})
    try:
        made = table.made(method_named(method).config.from_dict, values=config)
    except TypeError as error:
        raise ValueError(f"{table.where}: {error}") from error
    keep = table.get("keep", str, "full")
    ways = f"{CHECKPOINT if checkpoint else ''}{f'+{keep}' if keep != 'full' else ''}"
    found = table.made(
        Contender,
        name=table.get("name", str) or f"{method}{ways}",
        config=made,
        rates=method_named(method).config.rates if (rates := table.several("rates", float)) is None else rates,
        checkpoint=checkpoint,
        keep=keep,
        noise=table.get("noise", str),
        pool=table.get("pool", str),
    )
    table.finish()
    return found


def _features(table: _Table) -> FeatureOptions | None:
    """Where features are kept, if the file says it."""
    limit = table.get("features_limit", str)
    wanted = {
        "where": table.get("features", str),
        "folder": None if (folder := table.get("features_folder", str)) is None else Path(folder).expanduser(),
        "limit": None if limit is None else table.made(memory_of, text=limit),
        "precision": table.get("features_precision", str),
    }
    found = {name: value for name, value in wanted.items() if value is not None}
    return table.made(FeatureOptions, **found) if found else None


def _costs(table: _Table, given: Mapping[str, Any]) -> Costs | None:
    """The [costs] table. `costs = false` for none. The batch and the length are those of training by default."""
    values = table.values.get("costs", {})
    table.known.append("costs")
    if values is False:
        return None
    if not isinstance(values, dict):
        raise ValueError(f"{table.where}: costs={values!r}: write a table [costs], or costs = false")
    part = _Table(values, f"{table.where}, [costs]")
    wanted = {
        "batch": part.get("batch", int, given["batch_size"]),
        "length": part.get("length", int, given["max_length"]),
        "repeats": part.get("repeats", int),
        "warmup": part.get("warmup", int),
    }
    part.finish()
    return part.made(Costs, **{name: value for name, value in wanted.items() if value is not None})


def _expanded(text: str, where: str) -> str:
    """The text with `${NAME}` replaced by the environment's values."""

    def value(found: re.Match[str]) -> str:
        name = found.group(1)
        if name not in os.environ:
            raise ValueError(f"{where}: ${{{name}}} in {text!r} is no environment variable: set it, or write the path")
        return os.environ[name]

    return VARIABLE.sub(value, text)


def _name_of(path: str, base: Path) -> str:
    """The last part of a path, or of the folder that "." stands for."""
    return Path(path).name or (base / path).resolve().name


def _resolved(source: str, base: Path) -> str:
    """A source of rows. It is relative to `base` if it is there or is written as a path, and a hub id otherwise."""
    path = base / Path(source).expanduser()
    written_as_path = source.startswith((".", "~")) or Path(source).suffix or source.count("/") > 1
    return str(path) if path.exists() or written_as_path else source


def _resolved_backbone(model: str, base: Path) -> str:
    if model.startswith(TIMM):
        architecture, at, file = model.partition("@")
        return f"{architecture}@{base / file}" if at else model
    if model.startswith(GGUF):
        place, packed = gguf_parts(model)
        return gguf_name(_resolved_backbone(place, base), packed)
    if model.startswith(VIT):
        return f"{VIT}{base / model.removeprefix(VIT)}"
    folder = base / Path(model).expanduser()
    return str(folder) if folder.exists() or model.startswith((".", "~")) else model
