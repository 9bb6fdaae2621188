"""Answers that stand in texts from the command line: trained, scored, predicted, compared and planned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from commands import refusal, succeed, table
from sidestep.compare.records import read
from small_tasks import text_backbone, write
from span_tasks import asked

COLUMNS = ["--text", "question", "--text2", "context", "--label", "answers", "--kind", "spans", "--max-length", 12]
FAST = ["--set", "rank=8", "--epochs", 2, "--batch-size", 16, "--lr", 0.05, "--quiet"]
STUDY = """
seeds = [0]
epochs = 1
batch_size = 16
max_length = 12
methods = ["probe"]
costs = { batch = 2, length = 16, repeats = 1, warmup = 0 }
[[backbone]]
model = "bert"
[[task]]
name = "questions"
train = "train.jsonl"
dev = "dev.jsonl"
text = "question"
text2 = "context"
label = "answers"
problem = "spans"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spans")
    text_backbone(folder / "bert")
    write(folder / "train.jsonl", asked(48, 0, longest=14, without=0.25))
    write(folder / "dev.jsonl", asked(16, 1, longest=14, without=0.25))
    return folder


def training(place: Path, output: object, *more: object, train: str = "train.jsonl") -> list[object]:
    rows = ["--train", place / train, "--dev", place / "dev.jsonl"]
    return ["train", "--backbone", place / "bert", *rows, *COLUMNS, "--output", output, *FAST, *more]


def test_a_task_is_trained_scored_and_used(place: Path, tmp_path: Path) -> None:
    shown = succeed(*training(place, tmp_path / "task"))
    assert "each with a question whose answer stands in its context" in shown.stderr
    results = json.loads((tmp_path / "task" / "results.json").read_text())
    assert results["metric"] == "f1"
    assert results["scores"].keys() == results["constant"].keys() == {"exact_match", "f1"}
    scored = succeed("eval", tmp_path / "task", "--data", place / "dev.jsonl", "--quiet").stdout
    assert "exact_match" in scored
    assert "recall of unanswerable" in scored
    files = {ending: tmp_path / f"found{ending}" for ending in (".jsonl", ".csv")}
    for file in files.values():
        succeed("predict", tmp_path / "task", "--data", place / "dev.jsonl", "--output", file, "--quiet")
    lines = [json.loads(line) for line in files[".jsonl"].read_text().splitlines()]
    assert len(lines) == 16
    for line, cells in zip(lines, table(files[".csv"]), strict=True):
        assert line["prediction"] == ("" if line["start"] is None else line["context"][line["start"] : line["end"]])
        assert cells["prediction"] == line["prediction"]
        assert cells["start"] == ("" if line["start"] is None else str(line["start"]))
        assert float(cells["probability"]) == pytest.approx(line["probability"], abs=1e-4)
        assert json.loads(cells["nbest"]) == line["nbest"]


def test_mistakes_are_answered_in_words(place: Path, tmp_path: Path) -> None:
    wrong = asked(8)
    wrong[4]["answers"]["answer_start"][0] += 1
    write(place / "wrong.jsonl", wrong)
    said = refusal(*training(place, tmp_path / "task", train="wrong.jsonl"))
    assert "1 answers do not stand in 'context' at their place, and 1 of them stand elsewhere in it" in said
    assert "in row 5" in said
    assert "shots=2: kind='spans' has no classes" in refusal(*training(place, tmp_path / "task", "--shots", 2))


def test_methods_are_compared(place: Path) -> None:
    (place / "study.toml").write_text(STUDY)
    succeed("compare", place / "study.toml", "--output", place / "study.jsonl")
    found, _ = read(place / "study.jsonl")
    assert [one.status for one in found] == ["ok"] * len(found)
    scores, costs = ([one for one in found if one.kind == kind] for kind in ("score", "cost"))
    assert scores[0].measured["scores"].keys() == {"exact_match", "f1"}
    assert costs[0].settings["head"].startswith("Span")


def test_a_step_is_planned(place: Path) -> None:
    options = ["--backbone", place / "bert", "--batch", 4, "--length", 16, "--kind", "spans"]
    found = json.loads(succeed("plan", *options, "--method", "read", "--json").stdout)
    assert found["plan"]["head"] == {"head": "Span", "pool": "all"}
