"""Pairs and answers on a decoder from the command line: what is said of their joins, and that commands join alike."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from typer.testing import CliRunner, Result

import sidestep as ss
from sidestep.cli import app
from sidestep.cli.values import unescaped
from sidestep.tasks.predict import predict
from small_backbone import character_tokenizer, decoder
from small_tasks import write

FAST = ["--set", "rank=2", "--epochs", "1", "--batch-size", "8", "--quiet"]
STUDY = """
seeds = [0]
epochs = 1
costs = false
[[backbone]]
model = "{model}"
[[task]]
train = "{train}"
text = "first"
text2 = "second"
{line}
[[contender]]
method = "probe"
rates = [0.01]
"""
PAIR = ["--text", "first", "--text2", "second"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder whose tokenizer glues texts, and rows of two texts, a class and an answer."""
    folder = tmp_path_factory.mktemp("joins")
    decoder().save_pretrained(folder / "decoder")
    character_tokenizer().save_pretrained(folder / "decoder")
    rows = [
        {"first": f"{what} film", "second": "was it good?", "label": label, "answer": label}
        for what, label in (("a good", "yes"), ("the bad", "no"))
        for _ in range(12)
    ]
    write(folder / "rows.csv", rows)
    write(folder / "new.csv", [{"first": row["first"], "second": row["second"]} for row in rows[::8]])
    return folder


def succeed(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


def train(place: Path, output: Path, *arguments: object) -> Result:
    source = ["--backbone", place / "decoder", "--train", place / "rows.csv", "--output", output]
    return succeed("train", *source, *FAST, *arguments)


def preprocessing(task: Path) -> dict[str, Any]:
    return json.loads((task / "sidestep.json").read_text())["preprocessing"]


def test_pairs_are_joined_alike_everywhere_and_it_is_said_once(place: Path, tmp_path: Path) -> None:
    said = train(place, tmp_path / "task", *PAIR).stderr
    assert said.count("between the two texts of a row stands '\\n' (--separator chooses another)") == 1
    assert preprocessing(tmp_path / "task")["separators"] == {"pair": "\n", "answer": ""}
    assert "pair='\\n'" in succeed("inspect", tmp_path / "task").stdout
    succeed("eval", tmp_path / "task", "--data", place / "rows.csv", "--quiet")
    rows = Dataset.from_list(table(place / "new.csv"))
    model = ss.load(tmp_path / "task")
    expected = predict(model, rows)
    joined = [{"first": f"{row['first']}\n{row['second']}", "second": ""} for row in table(place / "new.csv")]
    model.extras["preprocessing"] = {**model.extras["preprocessing"], "separators": {}}
    assert predict(model, Dataset.from_list(joined))["p_yes"][:] == pytest.approx(expected["p_yes"][:], abs=1e-6)
    succeed("predict", tmp_path / "task", "--data", place / "new.csv", "--output", tmp_path / "out.csv", "--quiet")
    succeed("bank", "add", tmp_path / "bank", "pairs", tmp_path / "task")
    given = ["--data", place / "new.csv", "--task", "pairs", "--output", tmp_path / "bank.csv", "--quiet"]
    succeed("bank", "run", tmp_path / "bank", *given)
    for name in ("out.csv", "bank.csv"):
        found = [float(row["p_yes"]) for row in table(tmp_path / name)]
        assert found == pytest.approx(expected["p_yes"][:], abs=1e-4)


def test_a_chosen_separator_and_none(place: Path, tmp_path: Path) -> None:
    train(place, tmp_path / "chosen", *PAIR, "--separator", " ? ")
    assert preprocessing(tmp_path / "chosen")["separators"]["pair"] == " ? "
    assert "between the two texts" not in train(place, tmp_path / "none", *PAIR, "--separator", "").stderr
    assert "separators" not in preprocessing(tmp_path / "none")


def test_a_separator_with_nothing_to_separate_is_refused(place: Path, tmp_path: Path) -> None:
    source = ["--backbone", place / "decoder", "--train", place / "rows.csv", "--output", tmp_path / "never"]
    given = [str(part) for part in ("train", *source, *FAST, "--text", "first", "--separator", " ")]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 2
    assert "separator=' ', but no texts are put behind each other" in result.stderr


@pytest.mark.filterwarnings("default::sidestep.data.DataWarning")
def test_answers_are_warned_of_shown_and_written_without_the_separator(place: Path, tmp_path: Path) -> None:
    answers = ["--task", "lm", "--prompt", "first", "--completion", "answer"]
    glued = train(place, tmp_path / "glued", *answers)
    assert "Warning: in 21 of 21 training rows no white space stands between prompt and answer" in glued.stderr
    assert "filmyes'" in glued.stderr
    spaced = train(place, tmp_path / "task", *answers, "--separator", "\\nso? ", "--lr", "0.05")
    assert "no white space" not in spaced.stderr
    assert re.search(r"what is read \+ what is written: '[a-z ]*film\\nso\?' \+ ' (yes|no)<end>'", spaced.stderr)
    assert "The first 3 dev rows" in spaced.stdout
    assert preprocessing(tmp_path / "task")["separators"] == {"pair": "", "answer": "\nso? "}
    succeed("predict", tmp_path / "task", "--data", place / "new.csv", "--output", tmp_path / "out.csv", "--quiet")
    assert not any(row["prediction"].startswith(" ") for row in table(tmp_path / "out.csv"))


def test_a_comparison_joins_and_says_so(place: Path, tmp_path: Path) -> None:
    lines = {"default": "", "chosen": 'separator = "\\t"', "none": 'separator = ""'}
    found = []
    for name, line in lines.items():
        study = tmp_path / f"{name}.toml"
        study.write_text(STUDY.format(model=place / "decoder", train=place / "rows.csv", line=line))
        said = succeed("compare", study).stderr
        assert ("between the two texts of a row of rows stands '\\n'" in said) is (name == "default")
        record = json.loads(study.with_suffix(".jsonl").read_text().splitlines()[-1])
        found.append(record["settings"].get("separators"))
    assert found == [{"pair": "\n", "answer": ""}, {"pair": "\t", "answer": ""}, None]


def test_newlines_and_tabs_may_be_typed() -> None:
    assert unescaped(None) is None
    assert unescaped("\\nAnswer:\\t") == "\nAnswer:\t"


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
