"""The command: a file or flags, a list of the runs, a table at the end, and what mistakes are answered with."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from sidestep.cli import app
from sidestep.compare.bench import Bench
from sidestep.compare.records import read
from small_tasks import reviews, text_backbone, write

FILE = """
seeds = [0, 1]
epochs = 2
batch_size = 8
methods = ["probe", "lora", "lora+checkpoint"]
costs = { batch = 2, repeats = 1, warmup = 0 }
[[backbone]]
model = "bert"
[[task]]
name = "reviews"
train = "train.tsv"
text = "text"
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A comparison file beside a backbone and rows."""
    text_backbone(tmp_path / "bert")
    write(tmp_path / "train.tsv", reviews(40))
    (tmp_path / "study.toml").write_text(FILE)
    return tmp_path / "study.toml"


def compare(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def test_a_dry_run_lists_the_runs_and_writes_nothing(study: Path) -> None:
    result = compare(study, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "10 runs of 2 epochs" in result.output  # 2 contenders with 3 trials and 2 seeds each
    assert "0.0005, 0.002, 0.005" in result.output
    assert "lora+checkpoint: costs only; its scores are those of lora" in result.output
    assert not study.with_suffix(".jsonl").exists()


def test_a_quick_comparison_ends_with_a_table_and_says_what_was_cut(study: Path) -> None:
    result = compare(study, "--quick")
    assert result.exit_code == 0, result.output
    assert "quick: seeds 0, 1 -> 0; rows all -> 128; dev_rows all -> 128; rates 3 -> 2 a contender" in result.output
    output = study.with_name("study-quick.jsonl")
    found, broken = read(output)
    assert ([one.kind for one in found].count("cost"), len(found), broken) == (3, 9, 0)
    assert [line for line in result.output.splitlines() if "lora+checkpoint" in line and "KiB" in line]
    assert f"sidestep report {output}" in result.output


def test_flags_in_place_of_a_file(study: Path, tmp_path: Path) -> None:
    output = tmp_path / "flags.jsonl"
    flags = ["--backbone", tmp_path / "bert", "--train", tmp_path / "train.tsv", "--text", "text", "--no-costs"]
    flags += ["--methods", "probe,bitfit", "--only", "probe", "--seeds", 1, "--rows", 20, "--epochs", 1]
    result = compare(*flags, "--batch-size", 8, "--output", output)
    assert result.exit_code == 0, result.output
    scores = [one for one in read(output)[0] if one.kind == "score"]
    assert [(one.settings["contender"], one.settings["rows"], one.settings["epochs"]) for one in scores] == [
        ("probe", 20, 1)
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Error: give a comparison file (sidestep compare study.toml), or --backbone, --train and --text"),
        (["STUDY", "--backbone", "bert"], "Error: give a comparison file"),
        (["STUDY", "--epochs", "9", "--text", "x"], "Error: --text, --epochs with"),
        (["STUDY", "--no-costs"], "the file says what is compared. Set it there"),
        (["none.toml"], "Error: none.toml does not exist: check the path of the comparison"),
        (["STUDY", "--only", "lorra"], "Error: unknown contender 'lorra' (did you mean 'lora'?): choose one of probe"),
        (
            ["--backbone", "bert", "--train", "a.tsv"],
            "name one column, of texts (text), of images (image) or of sounds",
        ),
    ],
)
def test_mistakes_are_answered_with_one_message(study: Path, arguments: list[str], said: str) -> None:
    result = compare(*(str(study) if part == "STUDY" else part for part in arguments))
    assert result.exit_code == 2
    assert said in result.output
    assert "Traceback" not in result.output


def test_a_stopped_comparison_says_that_it_continues(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*args: object, **how: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sidestep.compare.runs.run", stopped)
    result = compare(study)
    assert result.exit_code == 130
    assert "the same command continues" in result.output


@pytest.mark.parametrize("status", ["failed", "refused"])
def test_a_comparison_without_a_score_is_an_error(study: Path, monkeypatch: pytest.MonkeyPatch, status: str) -> None:
    def broken(*args: object, **how: object) -> None:
        raise RuntimeError("out of memory")

    if status == "failed":
        monkeypatch.setattr("sidestep.compare.runs.train", broken)
    else:
        monkeypatch.setattr("sidestep.compare.bench.Bench.refusal", lambda self, one: "out of memory")
    result = compare(study, "--quick")
    assert result.exit_code == 2
    assert f"{status}: score of bert, reviews, probe: " in result.stderr
    assert "Error: no run came to a score, for the reasons above, which" in result.stderr
    assert "Traceback" not in result.output


def test_a_comparison_with_one_score_is_none(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = Bench.refusal
    monkeypatch.setattr(Bench, "refusal", lambda self, one: refusal(self, one) if one.name == "probe" else "no")
    result = compare(study, "--quick")
    assert result.exit_code == 0, result.output
    assert "refused: score of bert, reviews, lora: no" in result.stderr
