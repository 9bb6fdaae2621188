"""The corpus of `make demo`: docstrings of installed scientific packages. The class is the package.

Real text that needs no download. The packages are not imported. Their source files are parsed. The same
installed versions give the same corpus, row by row.
"""

import ast
import random
import re
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TypedDict

__all__ = ["DEFAULT", "Row", "docstrings", "split"]

# All of them come with sidestep's own dependencies.
DEFAULT = ("networkx", "numpy", "pandas", "scipy", "sklearn", "sympy", "torch", "transformers")

# Other names that give a package away. Its import name is removed anyway.
ALIASES = {
    "networkx": ["nx"],
    "numpy": ["np"],
    "pandas": ["pd"],
    "scipy": ["sp"],
    "sklearn": ["scikit-learn", "scikit learn", "scikits.learn"],
    "sympy": ["sm"],
    "torch": ["pytorch", "libtorch"],
    "transformers": ["huggingface", "hugging face"],
}

PER_PACKAGE = 500
SURPLUS = 2  # candidates read for each text taken: a choice, without parsing all of torch
MIN_CHARS = 80
MAX_CHARS = 400
MIN_LETTERS = 0.7  # share of letters below which a text is a table or a formula
SAME_WORDS = 12  # texts that begin with the same words are one text
# Tests, and what packages carry along of others.
SKIPPED = {"test", "tests", "testing", "_testing", "conftest.py", "externals", "_external", "_vendor"}

# Where the prose of a docstring ends: an underlined heading, a Google-style heading, a field, a doctest.
END_OF_PROSE = re.compile(
    r"^\s*(?:[-=~^*]{3,}\s*$|:\w[^:`]*:(?!`)|>>>|@\w+|"
    r"(?:Args?|Arguments?|Attributes?|Examples?|Keyword args|Kwargs|Notes?|Parameters?|Raises|References|"
    r"Returns?|See also|Shape|Usage|Warnings?|Yields?)\s*:{1,2}\s*$)",
    re.IGNORECASE | re.MULTILINE,
)
DIRECTIVE = re.compile(r"^([ \t]*)\.\. .*(?:\n(?:\1[ \t]+.*|[ \t]*))*", re.MULTILINE)
ROLE = re.compile(r":[\w:+-]+:`~?([^`<]*?)(?:\s*<[^`>]*>)?`")
LINK = re.compile(r"\[([^\]\n]+)\]\([^)\n]*\)|`([^`<\n]*)<[^>`]*>`__?")
MARKUP = re.compile(r"`+__?(?=[\s.,)]|$)|`+[~.!]?|\*\*|\$+|\[[\w*#-]+\]_|<?https?://\S+|<[^<>\n]{1,40}>|:(?=:(?:\s|$))")


class Row(TypedDict):
    """One text and its class. A list of rows is what `datasets.Dataset.from_list` takes."""

    text: str
    package: str


def docstrings(packages: Sequence[str] = DEFAULT, seed: int = 0, per_package: int = PER_PACKAGE) -> list[Row]:
    """The opening prose of docstrings, at most `per_package` of each package.

    Texts are 80 to 400 characters of plain prose, no two of them alike. The names of all the packages are
    removed from them.

    Args:
        packages: import names, which are the classes.
        seed: of the choice where a package has more than `per_package` texts.
        per_package: most texts of one class.

    Returns:
        Rows sorted by package, then by text.

    Raises:
        ModuleNotFoundError: if a package is not installed.
        ValueError: if fewer than two packages are given, or a package has no docstrings to read.
    """
    packages = sorted(set(packages))
    if len(packages) < 2:
        raise ValueError(f"packages={packages}: the packages are the classes, give two or more")
    names = _names_of(packages)
    found = {package: _candidates(package, names, seed, per_package * SURPLUS) for package in packages}
    rows: list[Row] = []
    for package, texts in found.items():
        elsewhere = {key for other, theirs in found.items() if other != package for key in theirs}
        own = sorted(text for key, text in texts.items() if key not in elsewhere)
        if not own:
            raise ValueError(f"{package!r} has no docstring of {MIN_CHARS} or more characters: leave it out")
        chosen = sorted(random.Random(f"{seed} {package}").sample(own, min(per_package, len(own))))
        rows += [Row(text=text, package=package) for text in chosen]
    return rows


def split(rows: Sequence[Row], dev_share: float = 0.2, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Rows for training and for development, both shuffled. Each has the same share of every class.

    Args:
        rows: as `docstrings` returns them.
        dev_share: share of each class that goes to development, rounded to whole rows.
        seed: of the choice and of the order.

    Raises:
        ValueError: if a class would be missing from one of the two.
    """
    chance = random.Random(seed)
    train: list[Row] = []
    dev: list[Row] = []
    for package in sorted({row["package"] for row in rows}):
        own = [row for row in rows if row["package"] == package]
        held_out = round(dev_share * len(own))
        if not 0 < held_out < len(own):
            raise ValueError(
                f"dev_share={dev_share} takes {held_out} of the {len(own)} rows of {package!r}: "
                "training and development need at least one each"
            )
        chance.shuffle(own)
        dev += own[:held_out]
        train += own[held_out:]
    chance.shuffle(train)
    chance.shuffle(dev)
    return train, dev


def _candidates(package: str, names: re.Pattern[str], seed: int, enough: int) -> dict[str, str]:
    """Distinct texts of a package, by what they begin with. Reading ends when there are enough."""
    files = _sources(package)
    random.Random(f"{seed} {package}").shuffle(files)
    texts: dict[str, str] = {}
    for file in files:
        for docstring in _docstrings_in(file):
            text = _clean(docstring, names)
            if _is_prose(text):
                texts.setdefault(_opening(text), text)
        if len(texts) >= enough:
            break
    return texts


def _sources(package: str) -> list[Path]:
    """The package's Python files, tests and vendored code left out, in an order of its own."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"package {package!r} is not installed, and the demo's corpus is made of its docstrings: "
            "pip install 'sidestep[demo]'",
            name=package,
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    files = {file.relative_to(root).as_posix(): file for file in root.rglob("*.py")}
    return [files[name] for name in sorted(files) if not SKIPPED & set(name.split("/"))]


def _docstrings_in(file: Path) -> Iterator[str]:
    """Docstrings of a file's module, classes and functions, in the order of the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's files
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # templates that only look like Python
        return
    yield from _docstrings_of(tree)


def _docstrings_of(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    if docstring := ast.get_docstring(node):
        yield docstring
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings_of(child)


def _names_of(packages: Sequence[str]) -> re.Pattern[str]:
    """Matches every word that holds a package's name, and the short aliases as whole words.

    What is joined to the word goes too: the dot of a dotted name, a genitive.
    """
    names = sorted({name for package in packages for name in [package, *ALIASES.get(package, [])]})
    long = "|".join(re.escape(name) for name in names if len(name) > 2)
    short = "|".join(re.escape(name) for name in names if len(name) <= 2)
    word = rf"\w*(?:{long})\w*|(?:{short})(?!\w)" if short else rf"\w*(?:{long})\w*"
    return re.compile(rf"(?<!\w)(?:{word})(?:['’]s\b|\.(?=\w))?", re.IGNORECASE)


def _clean(docstring: str, names: re.Pattern[str]) -> str:
    """The opening prose in one line, cut at a word's end, without markup and without the names."""
    if end := END_OF_PROSE.search(docstring, _after_title(docstring)):
        docstring = docstring[: end.start()]
        if end.group().strip()[:3] in {"---", "===", "~~~"}:
            docstring = docstring.rstrip().rpartition("\n")[0]  # the heading above the underline
    text = LINK.sub(r"\1\2", ROLE.sub(r"\1", DIRECTIVE.sub("", docstring)))
    text = names.sub(" ", MARKUP.sub(" ", text))
    text = re.sub(r" ([.,;:)])(?= |$)", r"\1", " ".join(text.split()))
    return text if len(text) <= MAX_CHARS else text[: MAX_CHARS + 1].rpartition(" ")[0]


def _after_title(docstring: str) -> int:
    """Where the text begins below a title that is itself over- or underlined."""
    title = re.match(r"(?:[-=~*#]{3,}[ \t]*\n)?.*\n[-=~*#]{3,}[ \t]*\n", docstring)
    return title.end() if title else 0


def _is_prose(text: str) -> bool:
    return len(text) >= MIN_CHARS and sum(map(str.isalpha, text)) >= MIN_LETTERS * len(text)


def _opening(text: str) -> str:
    return " ".join(re.findall(r"[a-z]+", text.lower())[:SAME_WORDS])
