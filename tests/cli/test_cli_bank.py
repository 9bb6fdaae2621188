"""`sidestep bank`: tasks of one backbone added, listed, run on rows of several tasks, and removed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from commands import refusal, run, succeed, table
from sidestep.disk.task_folder import CONFIG, WEIGHTS
from sidestep.tasks.bank_folder import LOCK
from small_tasks import reviews, text_backbone, write

TRAINED = ["--epochs", "1", "--batch-size", "8", "--lr", "0.02", "--quiet"]
KEPT = {"length": "sparse", "reviews": "read"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three tasks of one backbone and one of another."""
    folder = tmp_path_factory.mktemp("bank")
    text_backbone(folder / "bert")
    text_backbone(folder / "other", seed=1)
    rows = reviews(40)
    write(folder / "rows.csv", rows)
    write(folder / "judged.csv", [{**row, "label": ("bad", "good", "fair")[n % 3]} for n, row in enumerate(rows)])
    sparse = ["--method", "sparse", "--set", "density=0.05", "--set", "select=random"]
    for name, backbone, file, more in (
        ("reviews", "bert", "rows.csv", ["--set", "rank=8"]),
        ("judged", "bert", "judged.csv", sparse),
        ("length", "bert", "rows.csv", [*sparse, "--label", "score", "--problem", "regress"]),
        ("stranger", "other", "rows.csv", ["--set", "rank=8"]),
    ):
        source = ["--backbone", folder / backbone, "--train", folder / file, "--text", "text"]
        succeed("train", *source, "--output", folder / name, *TRAINED, *more)
    for name in ("reviews", "judged", "length"):
        assert f"{name} added to" in succeed("bank", "add", folder / "bank", name, folder / name).stderr
    return folder


def test_rows_of_several_tasks_are_labelled_in_their_order(place: Path, tmp_path: Path) -> None:
    rows, tasks = reviews(10, 3), ("judged", "reviews", "length")
    mixed = [{"id": n, "text": row["text"], "task": tasks[n % 3]} for n, row in enumerate(rows)]
    write(tmp_path / "rows.csv", mixed)
    data = ["--data", tmp_path / "rows.csv", "--task-column", "task", "--probabilities", "all"]
    said = succeed("bank", "run", place / "bank", *data, "--output", tmp_path / "out.csv", "--quiet").stderr
    assert "judged: 4 rows; switched to in" in said
    found = table(tmp_path / "out.csv")
    assert [int(row["id"]) for row in found] == list(range(10))
    for name in tasks:
        succeed(
            "predict", place / name, "--data", tmp_path / "rows.csv", "--output", tmp_path / f"{name}.csv", "--quiet"
        )
        alone = table(tmp_path / f"{name}.csv")
        for row in found:
            if row["task"] != name:
                continue
            for column, value in alone[int(row["id"])].items():
                own = row[column]
                # other batches, so other padding; a probability has four digits
                assert own == value or float(own) == pytest.approx(float(value), rel=1e-4, abs=2e-4)
            others = {"p_bad", "p_good", "p_fair", "p_neg", "p_pos"} - set(alone[0])
            assert not any(row[column] for column in others)


def test_rows_of_several_tasks_have_one_column_of_probabilities(place: Path, tmp_path: Path) -> None:
    tasks = ("judged", "reviews", "length")
    rows = [{"text": row["text"], "task": tasks[n % 3]} for n, row in enumerate(reviews(9, 3))]
    write(tmp_path / "rows.csv", rows)
    data = ["--data", tmp_path / "rows.csv", "--task-column", "task", "--quiet"]
    succeed("bank", "run", place / "bank", *data, "--output", tmp_path / "out.csv")
    succeed("bank", "run", place / "bank", *data, "--output", tmp_path / "all.csv", "--probabilities", "all")
    succeed("bank", "run", place / "bank", *data, "--output", tmp_path / "none.csv", "--probabilities", "none")
    found, every = table(tmp_path / "out.csv"), table(tmp_path / "all.csv")
    assert list(found[0]) == ["text", "task", "prediction", "probability"]
    assert list(table(tmp_path / "none.csv")[0]) == ["text", "task", "prediction"]
    for row, whole in zip(found, every, strict=True):
        assert row["probability"] == whole.get(f"p_{row['prediction']}", "")
        assert bool(row["probability"]) == (row["task"] != "length")
    # a column that no row fills does not appear
    write(tmp_path / "rows.csv", [row for row in rows if row["task"] != "judged"])
    more = ["--output", tmp_path / "all.csv", "--probabilities", "all", "--overwrite"]
    succeed("bank", "run", place / "bank", *data, *more)
    assert list(table(tmp_path / "all.csv")[0]) == ["text", "task", "prediction", "p_neg", "p_pos"]


def test_a_column_is_named_for_all_tasks(place: Path, tmp_path: Path) -> None:
    """Tasks that were trained on columns of other names run on one file; a second text goes to those that read one."""
    rows = [{"says": row["text"], "more": row["other"]} for row in reviews(40)]
    write(tmp_path / "other.csv", [{**new, "label": old["label"]} for new, old in zip(rows, reviews(40), strict=True)])
    source = ["--backbone", place / "bert", "--train", tmp_path / "other.csv", "--set", "rank=8", *TRAINED]
    succeed("train", *source, "--text", "more", "--text2", "says", "--output", tmp_path / "pair")
    shutil.copytree(place / "bank", tmp_path / "bank")
    succeed("bank", "add", tmp_path / "bank", "pair", tmp_path / "pair")
    mixed = [{**row, "task": ("pair", "reviews", "judged")[n % 3]} for n, row in enumerate(rows[:9])]
    write(tmp_path / "rows.csv", mixed)
    command = ["bank", "run", tmp_path / "bank", "--data", tmp_path / "rows.csv", "--output", tmp_path / "out.csv"]
    by_column = [*command, "--task-column", "task", "--quiet"]
    said = (
        "no column 'text' (read by reviews), 'text' (read by judged): the columns are 'says', 'more', 'task'. Name the"
    )
    assert said in refusal(*by_column)
    succeed(*by_column, "--text", "says", "--text2", "more")
    found = table(tmp_path / "out.csv")
    for name, columns in (("pair", ["--text", "says", "--text2", "more"]), ("reviews", ["--text", "says"])):
        alone = ["--data", tmp_path / "rows.csv", "--output", tmp_path / f"{name}.csv", "--probabilities", "one"]
        succeed("predict", tmp_path / "bank" / name, *alone, *columns, "--quiet")
        for row, own in zip(found, table(tmp_path / f"{name}.csv"), strict=True):
            if row["task"] == name:
                assert row["prediction"] == own["prediction"]
                assert float(row["probability"]) == pytest.approx(float(own["probability"]), abs=2e-4)
    one = [*command, "--task", "reviews", "--overwrite", "--quiet", "--text", "says"]
    assert "text2='more', but none of these tasks reads a second text" in refusal(*one, "--text2", "more")
    assert "there is no column 'nowhere'" in refusal(*one[:-1], "nowhere")
    assert "probabilities='some': choose all, one, none" in refusal(*one, "--probabilities", "some")


def test_one_task_for_all_rows(place: Path, tmp_path: Path) -> None:
    for command in (["bank", "run", place / "bank", "--task", "judged"], ["predict", place / "judged"]):
        output = tmp_path / f"{command[0]}.csv"
        succeed(*command, "--data", place / "rows.csv", "--output", output, "--quiet")
    assert table(tmp_path / "bank.csv") == table(tmp_path / "predict.csv")


def test_all_tasks_answer_each_row_from_few_passes(place: Path, tmp_path: Path) -> None:
    data = ["--data", place / "rows.csv", "--output", tmp_path / "out.csv", "--batch-size", "16"]
    said = succeed("bank", "run", place / "bank", *data, "--tasks", "reviews, judged,length", "--quiet").stderr
    assert "3 tasks, 120 answers for 40 rows: " in said
    assert "passes of the backbone over 3 batches" in said
    found = table(tmp_path / "out.csv")
    columns = ["prediction_reviews", "probability_reviews", "prediction_judged", "probability_judged"]
    assert list(found[0])[-5:] == [*columns, "prediction_length"]
    for name in ("reviews", "judged", "length"):
        alone = ["--data", place / "rows.csv", "--output", tmp_path / f"{name}.csv", "--probabilities", "one"]
        succeed("predict", place / name, *alone, "--quiet")
        for row, own in zip(found, table(tmp_path / f"{name}.csv"), strict=True):
            ours, theirs = row[f"prediction_{name}"], own["prediction"]
            assert ours == theirs or float(ours) == pytest.approx(float(theirs), rel=1e-4)
            if name != "length":  # four digits, as everywhere
                assert float(row[f"probability_{name}"]) == pytest.approx(float(own["probability"]), abs=2e-4)
                assert len(row[f"probability_{name}"]) <= len("0.1234")
    one = ["--data", place / "rows.csv", "--output", tmp_path / "one.csv", "--tasks", "reviews", "--quiet"]
    succeed("bank", "run", place / "bank", *one)
    assert "prediction_reviews" in table(tmp_path / "one.csv")[0]
    said = refusal("bank", "run", place / "bank", *one, "--overwrite", "--probabilities", "all")
    assert "--probabilities all is for rows of one task each" in said
    said = refusal("bank", "run", place / "bank", *one, "--overwrite", "--text2", "other")
    assert "none of these tasks reads a second text" in said


def test_predict_takes_tasks_of_a_bank_and_rows_run_from_stored_features(place: Path, tmp_path: Path) -> None:
    data = ["--data", place / "rows.csv", "--tasks", "reviews,judged"]
    succeed("predict", place / "bank", *data, "--output", tmp_path / "out.csv", "--quiet")
    kept = ["--features", "disk", "--features-folder", tmp_path / "kept"]
    said = succeed("bank", "run", place / "bank", *data, *kept, "--output", tmp_path / "stored.csv").stderr
    assert "80 answers for 40 rows: 1 passes of the backbone over 1 batches" in said  # "judged" changes the weights
    assert list((tmp_path / "kept").iterdir())
    for ours, theirs in zip(table(tmp_path / "out.csv"), table(tmp_path / "stored.csv"), strict=True):
        assert ours["prediction_reviews"] == theirs["prediction_reviews"]
    one = ["--data", place / "rows.csv", "--task", "reviews", "--output", tmp_path / "one.csv"]
    said = refusal("bank", "run", place / "bank", *one, *kept)
    assert "--features disk is for rows that several tasks answer" in said


def test_a_damaged_task_fails_behind_the_others(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "bank", tmp_path / "bank")
    file = tmp_path / "bank" / "judged" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1])
    data = ["--data", place / "rows.csv", "--output", tmp_path / "out.csv", "--tasks", "reviews,judged", "--quiet"]
    assert "judged gave no answers: " in refusal("bank", "run", tmp_path / "bank", *data)
    assert "prediction_judged" not in table(tmp_path / "out.csv")[0]
    assert table(tmp_path / "out.csv")[0]["prediction_reviews"]


def test_a_column_names_several_tasks_of_a_row(place: Path, tmp_path: Path) -> None:
    asked = ("judged|reviews", "reviews", "length | judged")
    write(tmp_path / "rows.csv", [{"text": row["text"], "task": asked[n % 3]} for n, row in enumerate(reviews(9, 3))])
    data = ["--data", tmp_path / "rows.csv", "--output", tmp_path / "out.csv", "--quiet"]
    succeed("bank", "run", place / "bank", *data, "--task-column", "task")
    for row in table(tmp_path / "out.csv"):
        for name in ("judged", "reviews", "length"):
            assert bool(row[f"prediction_{name}"]) == (name in row["task"])
    write(tmp_path / "rows.csv", [{"text": "good", "task": "reviews"}, {"text": "bad", "task": ""}])
    said = refusal("bank", "run", place / "bank", *data, "--task-column", "task", "--overwrite")
    assert "row 2 of" in said
    assert "names no task: 1 of 2 rows do not" in said


def test_a_list_says_what_is_there_and_what_it_takes(place: Path) -> None:
    shown = succeed("bank", "list", place / "bank")
    for word in ("judged", "sparse", "bad, fair, good", "length", "1 outputs", "reviews", "read"):
        assert word in shown.stdout
    assert "3 tasks," in shown.stderr
    entries = json.loads(succeed("bank", "list", place / "bank", "--json").stdout)
    assert [entry["name"] for entry in entries] == ["judged", "length", "reviews"]
    files = [file for file in (place / "bank" / "judged").rglob("*") if file.is_file()]
    assert entries[0]["bytes"] == sum(file.stat().st_size for file in files)


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_damaged_task_stops_no_other(place: Path, tmp_path: Path, file: str) -> None:
    bank = tmp_path / "bank"
    shutil.copytree(place / "bank", bank)
    # judged is the first in the order of names, length the second
    damaged = bank / "judged" / file
    damaged.write_bytes(damaged.read_bytes()[:-9] if file == WEIGHTS else b"{")
    shown, remedy = run("bank", "list", bank), "remove 'judged' (`sidestep bank remove`) and add it again"
    assert shown.exit_code == 2
    assert "2 tasks," in shown.stderr
    assert f"Error: judged: {damaged} " in shown.stderr
    assert remedy in shown.stderr
    lines = shown.stdout.splitlines()
    assert any("judged" in line and "unreadable" in line for line in lines)
    assert all(any(name in line and method in line for line in lines) for name, method in KEPT.items())
    listed = run("bank", "list", bank, "--json")
    assert listed.exit_code == 2
    entries = {entry["name"]: entry for entry in json.loads(listed.stdout)}
    assert {name: entry.get("method") for name, entry in entries.items()} == {**KEPT, "judged": None}
    assert remedy in entries["judged"]["unreadable"]

    data = ["--data", place / "rows.csv", "--quiet"]
    succeed("bank", "run", bank, "--task", "reviews", *data, "--output", tmp_path / "bank.csv")
    succeed("predict", place / "reviews", *data, "--output", tmp_path / "alone.csv")
    assert table(tmp_path / "bank.csv") == table(tmp_path / "alone.csv")
    assert remedy in refusal("bank", "run", bank, "--task", "judged", *data, "--output", tmp_path / "none.csv")
    succeed("bank", "remove", bank, "judged")
    succeed("bank", "add", bank, "judged", place / "judged")
    assert "3 tasks," in succeed("bank", "list", bank).stderr


def test_a_task_is_removed_and_its_name_free_again(place: Path) -> None:
    succeed("bank", "add", place / "bank", "twice", place / "reviews")
    assert "holds 'twice' already" in refusal("bank", "add", place / "bank", "twice", place / "judged")
    succeed("bank", "remove", place / "bank", "twice")
    assert "holds no task 'twice'" in refusal("bank", "remove", place / "bank", "twice")


def test_mistakes_are_one_message(place: Path, tmp_path: Path) -> None:
    bank, rows = place / "bank", place / "rows.csv"
    assert "a bank has one backbone" in refusal("bank", "add", bank, "stranger", place / "stranger")
    assert "no task folder" in refusal("bank", "add", bank, "new", place / "bert")
    for command in (["list"], ["remove", "x"], ["run", "--task", "x", "--data", rows, "--output", "x.csv"]):
        assert "there is no bank" in refusal("bank", command[0], tmp_path / "none", *command[1:])
    output = ["--output", tmp_path / "out.csv"]
    for given, message in (
        (["--tasks", "judged,judged"], "names a task twice"),
        (["--tasks", "judged,nobody"], "holds no task 'nobody'"),
        ([], "one of --task NAME, --tasks NAME,NAME and --task-column COLUMN"),
        (
            ["--task", "judged", "--task-column", "label"],
            "one of --task NAME, --tasks NAME,NAME and --task-column COLUMN",
        ),
        (["--task", "nobody"], "holds no task 'nobody': it holds judged, length, reviews"),
        (["--task-column", "nowhere"], "there is no column 'nowhere': the rows have text"),
        (["--task-column", "label"], "holds no task"),
        (["--task", "judged", "--batch-size", "0"], "batch_size=0"),
    ):
        assert message in refusal("bank", "run", bank, "--data", rows, *output, *given)
    assert not (tmp_path / "out.csv").exists()
    with FileLock(bank / LOCK):
        assert "another process is writing" in refusal("bank", "add", bank, "new", place / "reviews")
