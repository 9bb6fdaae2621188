"""The demo's corpus: clean, nameless, balanced, the same every time."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset

from sidestep.demo import corpus as demo_corpus
from sidestep.demo.corpus import ALIASES, DEFAULT, MAX_CHARS, MIN_CHARS, Row, docstrings, split

FILLER = "and explains itself in enough plain words to be counted as prose by anybody who reads the text"


def write(folder: Path, files: dict[str, str]) -> None:
    for name, source in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source, encoding="utf-8")


def function(name: str, docstring: str) -> str:
    return f"def {name}():\n    r'''{docstring}'''\n\n"


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Two packages that must not be imported: importing either raises."""
    never = "raise ImportError('the corpus must not import what it reads')\n"
    numbers = "".join(function(f"f{i}", f"Number {'abcdefghijkl'[i]} counts sheep {FILLER}.") for i in range(12))
    words = "".join(function(f"g{i}", f"Word {'abcdefghijkl'[i]} names sheep {FILLER}.") for i in range(12))
    write(tmp_path, {"alphapack/__init__.py": never, "alphapack/a.py": numbers})
    write(tmp_path, {"betapack/__init__.py": never, "betapack/b.py": words})
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def cleaned(packages: Path, docstring: str) -> str:
    """What becomes of the one docstring that begins with "This"."""
    write(packages, {"alphapack/one.py": function("one", docstring)})
    texts = [row["text"] for row in docstrings(["alphapack", "betapack"]) if row["text"].startswith("This")]
    assert len(texts) == 1
    return texts[0]


def test_every_class_and_every_text_is_found(packages):
    rows = docstrings(["betapack", "alphapack"])
    assert Counter(row["package"] for row in rows) == {"alphapack": 12, "betapack": 12}
    assert rows[0] == {"text": f"Number a counts sheep {FILLER}.", "package": "alphapack"}
    assert Dataset.from_list(list(rows)).column_names == ["text", "package"]


def test_classes_methods_and_modules_count_and_tests_do_not(packages):
    write(
        packages,
        {
            "alphapack/c.py": f'"""Module text {FILLER}."""\nclass C:\n    """Class text {FILLER}."""\n'
            f'    async def m(self):\n        """Method text {FILLER}."""\n',
            "alphapack/tests/t.py": f'"""Test text {FILLER}."""\n',
            "alphapack/externals/v.py": f'"""Vendored text {FILLER}."""\n',
            "alphapack/broken.py": "this is {{ a template }}\n",
        },
    )
    first = {row["text"].split()[0] for row in docstrings(["alphapack", "betapack"])}
    assert first == {"Number", "Word", "Module", "Class", "Method"}


@pytest.mark.parametrize(
    "end",
    [
        "Parameters\n----------\nx : int",
        "Args:\n    x: a number",
        ">>> f(1)\n2",
        ":param x: a number",
        "Returns:\n  y",
    ],
)
def test_the_text_ends_where_the_prose_ends(packages, end):
    assert cleaned(packages, f"This folds {FILLER}.\n\n{end}\n") == f"This folds {FILLER}."


def test_markup_goes_and_its_words_stay(packages):
    docstring = (
        "This uses :class:`~pkg.Graph`, ``code``, **bold**, :ref:`a guide <guide>`, "
        f"`a page <https://x.org>`_ and [a link](https://y.org) [1]_ {FILLER}.\n\n"
        ".. versionadded:: 1.2\n   Gone with its indented lines.\n\nLast line."
    )
    expected = f"This uses pkg.Graph, code, bold, a guide, a page and a link {FILLER}. Last line."
    assert cleaned(packages, docstring) == expected


def test_names_go_with_their_dots_compounds_and_genitives(packages):
    docstring = f"This AlphaPack's alphapack.linalg.norm of Betapack, alphapackrun {FILLER}."
    assert cleaned(packages, docstring) == f"This linalg.norm of, {FILLER}."


def test_a_text_is_cut_at_the_end_of_a_word(packages):
    text = cleaned(packages, "This " + "sentence " * 100)
    assert text == "This " + " ".join(["sentence"] * 44)
    assert len(text) <= MAX_CHARS < len(text) + len(" sentence")


def test_short_texts_and_tables_are_left_out(packages):
    table = "This 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 9 | 10 | 11 | 12 | 13 | 14 | 15 | 16 | 17 | 18 | 19 | 20 | 21"
    write(packages, {"alphapack/d.py": function("short", "This is short.") + function("table", table)})
    assert not [row for row in docstrings(["alphapack", "betapack"]) if row["text"].startswith("This")]


def test_a_text_that_two_packages_share_belongs_to_neither(packages):
    copy = function("copy", f"This was copied {FILLER}.")
    twice = function("x", f"Number Z was copied {FILLER}!") + function("y", f"Number z was copied {FILLER}.")
    write(packages, {"alphapack/copy.py": copy + twice, "betapack/copy.py": copy})
    rows = docstrings(["alphapack", "betapack"])
    assert not [row for row in rows if row["text"].startswith("This")]
    assert [row["text"] for row in rows if "Z was" in row["text"] or "z was" in row["text"]] == [
        f"Number Z was copied {FILLER}!"
    ]


def test_a_large_class_is_cut_to_a_seeded_choice(packages):
    def choice(seed: int) -> list[Row]:
        return docstrings(["alphapack", "betapack"], seed=seed, per_package=5)

    assert Counter(row["package"] for row in choice(0)) == {"alphapack": 5, "betapack": 5}
    assert choice(0) == choice(0)
    assert choice(0) != choice(1)


def test_neither_the_hash_seed_nor_the_order_of_packages_changes_the_corpus(packages):
    script = (  # the file alone: importing the whole of sidestep twice takes seconds
        "import runpy, sys; corpus = runpy.run_path(sys.argv[1]);"
        "print(corpus['split'](corpus['docstrings'](sys.argv[2:], per_package=6)))"
    )

    def corpus(hash_seed: str, *names: str) -> str:
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(packages)}
        command = [sys.executable, "-c", script, demo_corpus.__file__, *names]
        return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout

    assert corpus("1", "alphapack", "betapack") == corpus("2", "betapack", "alphapack")


def test_the_real_packages_give_clean_texts():
    rows = docstrings(["networkx", "numpy"], per_package=40)
    assert Counter(row["package"] for row in rows) == {"networkx": 40, "numpy": 40}
    assert len({row["text"] for row in rows}) == len(rows)
    for row in rows:
        assert MIN_CHARS <= len(row["text"]) <= MAX_CHARS
        assert "numpy" not in row["text"].lower()
        assert "networkx" not in row["text"].lower()
        assert not {"np", "nx"} & set(row["text"].lower().replace(".", " ").split())
        assert ">>>" not in row["text"]


def test_the_default_packages_are_enough_for_three_thousand_texts():
    assert len(DEFAULT) * 500 >= 3000
    assert set(ALIASES) <= set(DEFAULT)
    assert list(DEFAULT) == sorted(DEFAULT)


def test_the_split_is_stratified_disjoint_and_fixed():
    rows = [Row(text=f"{name} {i}", package=name) for name in "ab" for i in range(50)]
    train, dev = split(rows)
    assert Counter(row["package"] for row in dev) == {"a": 10, "b": 10}
    assert sorted(row["text"] for row in train + dev) == sorted(row["text"] for row in rows)
    assert (train, dev) == split(rows)
    assert dev != split(rows, seed=1)[1]
    assert {row["package"] for row in dev[:10]} == {"a", "b"}, "the parts are not shuffled"


def test_a_split_that_empties_a_class_is_refused():
    rows = [Row(text="one", package="a"), Row(text="two", package="a")]
    with pytest.raises(ValueError, match=r"dev_share=0.1 takes 0 of the 2 rows of 'a'"):
        split(rows, dev_share=0.1)


def test_a_missing_package_names_the_extra():
    with pytest.raises(ModuleNotFoundError, match=r"'nosuchpack' is not installed.*sidestep\[demo\]"):
        docstrings(["nosuchpack", "numpy"])


def test_one_package_is_no_task():
    with pytest.raises(ValueError, match="give two or more"):
        docstrings(["numpy"])


def test_a_package_without_prose_is_named(packages):
    write(packages, {"gammapack/__init__.py": ""})
    with pytest.raises(ValueError, match="'gammapack' has no docstring of 80 or more"):
        docstrings(["alphapack", "gammapack"])
