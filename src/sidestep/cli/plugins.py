"""Methods and kinds of task of one's own, from a file: `--plugin own.py`, anywhere on the command line."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

FLAG = "--plugin"


class WithPlugins(TyperGroup):
    """The commands, with `--plugin FILE` taken in any place. So no command has to name the option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The arguments with every `--plugin` brought to the front, where this group reads it."""
        front, rest, left = [], [], list(args)
        while left:
            word = left.pop(0)
            if word == "--":
                rest += [word, *left]
                break
            if word == FLAG and left:
                front += [word, left.pop(0)]
            elif word.startswith(f"{FLAG}="):
                front.append(word)
            else:
                rest.append(word)
        return super().parse_args(ctx, front + rest)


def load_plugins(files: list[Path] | None) -> None:
    """Run files that register methods or kinds of task.

    Raises:
        typer.BadParameter: if a file is missing, is no Python file, or fails.
    """
    for file in files or []:
        if file.suffix != ".py" or not file.is_file():
            what = "is no Python file" if file.exists() else "is not there"
            raise typer.BadParameter(f"{file} {what}: give a file such as own.py, in which a method is registered")
        name = f"sidestep_plugin_{file.stem}"
        spec = spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look for their module there
        sys.path.insert(0, str(file.resolve().parent))  # for its own imports
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # a file of the user's own may raise anything
            raise typer.BadParameter(f"{file} failed: {type(error).__name__}: {error}") from error
        finally:
            sys.path.remove(str(file.resolve().parent))
