"""Backbones in GGUF files, by the name "gguf:FOLDER@FILE" (FOLDER may be a hub id).

transformers reads config and tokenizer from the file's header and unpacks the weights, with the package of the extra
"gguf". A model that was loaded so is a plain one: it can be tuned, saved and digested like any other.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import transformers

GGUF = "gguf:"
SUFFIX = ".gguf"
MAGIC = b"GGUF"
# llama.cpp writes the parts of a split file under such names, and finds them by these
PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


class GgufError(ValueError):
    """A GGUF file cannot be used, and the message says what is wrong with it and what to do."""


def gguf_name(folder: str | Path, file: str) -> str:
    """The name of the backbone in a GGUF file of a folder or hub id."""
    return f"{GGUF}{folder}@{file}"


def is_gguf(name: str | Path) -> bool:
    """Whether a name is that of a GGUF file: "gguf:FOLDER@FILE", or the path of one."""
    return str(name).startswith(GGUF) or (Path(name).suffix == SUFFIX and Path(name).is_file())


def gguf_parts(name: str | Path) -> tuple[str, str]:
    """Folder (or hub id) and file of a GGUF backbone's name.

    Raises:
        GgufError: if one of them is missing.
    """
    if not str(name).startswith(GGUF):
        return str(Path(name).parent), Path(name).name
    folder, _, file = str(name).removeprefix(GGUF).rpartition("@")
    if not folder or not file:
        raise GgufError(f"{str(name)!r}: write {gguf_name('FOLDER', 'FILE.gguf')}, or --backbone FOLDER --gguf FILE")
    return folder, file


def gguf_files(folder: Path) -> list[str]:
    """The GGUF files of a folder."""
    return sorted(path.name for path in folder.glob(f"*{SUFFIX}"))


def check_gguf(name: str | Path) -> None:
    """Refuse what transformers cannot read, before it is asked to.

    Raises:
        GgufError: if the extra is not installed, or the file is absent, a part of several, or no GGUF file.
    """
    folder, file = gguf_parts(name)
    if importlib.util.find_spec("gguf") is None:
        raise GgufError(f"{file} is read with the package gguf: install the extra, pip install 'sidestep[gguf]'")
    if PART.search(file):
        raise GgufError(
            f"{file} is one part of a split GGUF file, which transformers does not read. Join the parts with "
            "llama.cpp's llama-gguf-split --merge, or take a file in one part"
        )
    if not Path(folder).is_dir():
        return  # a hub id: the hub says what is wrong
    path = Path(folder) / file
    if not path.is_file():
        held = ", ".join(gguf_files(Path(folder))) or "no GGUF file"
        raise GgufError(f"there is no file {file} in {folder}: it holds {held}")
    with path.open("rb") as opened:
        if opened.read(len(MAGIC)) != MAGIC:
            raise GgufError(f"{path} is no GGUF file: it does not begin with {MAGIC.decode()}")


def gguf_file(name: str | Path) -> str:
    """What transformers is given as `gguf_file`.

    For a local file it is absolute, because transformers tries the working folder first.
    """
    folder, file = gguf_parts(name)
    return str((Path(folder) / file).absolute()) if Path(folder).is_dir() else file


def unpacking() -> dict[str, Any]:
    """What tells `from_pretrained` to give plain weights, which older releases of transformers always give."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}
