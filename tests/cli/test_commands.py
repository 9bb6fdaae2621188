"""The commands: train, eval, predict, inspect, methods end to end, and what a user's mistakes are answered with."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from typer.testing import Result

import sidestep as ss
from commands import FAST, refusal, run, succeed, table
from sidestep.backbone.load import load_backbone
from sidestep.backbone.processors import load_processor
from sidestep.cli.values import config_from
from sidestep.disk import task_folder
from sidestep.tasks import load as loading
from sidestep.training import train as training
from small_tasks import image_backbone, image_folder, padless_backbone, reviews, text_backbone, write


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a backbone, rows, and a task that was trained by the command."""
    folder = tmp_path_factory.mktemp("cli")
    text_backbone(folder / "bert")
    write(folder / "train.tsv", reviews(64))
    write(folder / "dev.tsv", reviews(24, 1))
    write(folder / "new.csv", [{"id": index, "text": row["text"]} for index, row in enumerate(reviews(9, 2))])
    train(folder, "--dev", folder / "dev.tsv", "--output", folder / "task")
    return folder


def train(place: Path, *arguments: object, rows: Path | None = None) -> Result:
    source = ["--backbone", place / "bert", "--train", rows or place / "train.tsv", "--text", "text"]
    return succeed("train", *source, *FAST, *arguments)


def refused_training(place: Path, *arguments: object, rows: Path | None = None) -> str:
    source = ["--backbone", place / "bert", "--train", rows or place / "train.tsv"]
    text = [] if "--image" in arguments or "--text" in arguments else ["--text", "text"]
    output = [] if "--output" in arguments else ["--output", place / "never"]
    said = refusal("train", *source, *text, *output, *FAST, *arguments)
    assert not (place / "never").exists()
    return said


# --- end to end -------------------------------------------------------------------------------------------


def test_train_shows_and_writes_its_results(place: Path) -> None:
    result = train(place, "--dev", place / "dev.tsv", "--output", place / "task", "--overwrite")
    found = json.loads((place / "task" / "results.json").read_text())
    accuracy, constant = (f"{found[name]['accuracy']:.4g}" for name in ("scores", "constant"))
    assert f"│ dev accuracy       │ {accuracy} (one answer for all: {constant})" in result.stdout
    assert "│ dev rows           │ 24 rows of their own" in result.stdout
    assert "the best of 2 by accuracy on these same rows" in result.stdout
    assert found["classes"].keys() == {"neg", "pos"}
    for name, each in found["classes"].items():
        assert f"recall of {name}      │ {each['recall']:.4g} of {each['rows']} rows" in result.stdout
    assert "read on BertModel: 818 parameters are trained" in result.stderr
    assert "dev: 24 rows of their own" in result.stderr


def test_eval_gives_the_scores_of_training(place: Path) -> None:
    found = json.loads((place / "task" / "results.json").read_text())
    shown = succeed("eval", place / "task", "--data", place / "dev.tsv", "--quiet").stdout
    for name, value in found["scores"].items():
        beside = f"{value:.4g} (one answer for all: {found['constant'][name]:.4g})"
        assert [line for line in shown.splitlines() if f" {name} " in line and beside in line]
    for name, each in found["classes"].items():
        assert f"recall of {name} │ {each['recall']:.4g} of {each['rows']} rows" in shown
    assert "rows          │ 24 " in shown


def test_predict_adds_names_and_probabilities_to_the_rows(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out.csv"
    succeed("predict", place / "task", "--data", place / "new.csv", "--output", out)
    rows = table(out)
    assert list(rows[0]) == ["id", "text", "prediction", "p_neg", "p_pos"]
    assert [row["id"] for row in rows] == [str(index) for index in range(9)]
    for row in rows:
        shares = {name: float(row[f"p_{name}"]) for name in ("neg", "pos")}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-4)
        assert row["prediction"] == max(shares, key=lambda name: shares[name])


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_probabilities_are_written_as_asked(place: Path, tmp_path: Path, ending: str) -> None:
    def predict(*options: object) -> list[dict[str, Any]]:
        out = tmp_path / f"out.{ending}"
        data = ["--data", place / "new.csv", "--output", out, "--overwrite", "--quiet"]
        succeed("predict", place / "task", *data, *options)
        return table(out) if ending == "csv" else [json.loads(line) for line in out.read_text().splitlines()]

    every, one, none = predict(), predict("--probabilities", "one"), predict("--probabilities", "none")
    assert list(one[0]) == ["id", "text", "prediction", "probability"]
    assert list(none[0]) == ["id", "text", "prediction"]
    for whole, own in zip(every, one, strict=True):
        assert own["probability"] == whole[f"p_{own['prediction']}"]
        if ending == "csv":
            assert all(len(whole[name]) == len("0.1234") for name in ("p_neg", "p_pos"))
        else:
            assert len(str(whole["p_neg"])) > 10


def test_columns_of_the_users_own_are_written_whole(place: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "own.csv", [{"text": "good film", "p_value": "0.123456789", "p_neg": "x"}])
    data = ["--data", rows, "--output", tmp_path / "out.csv", "--quiet"]
    assert "the rows have columns named p_neg already" in refusal("predict", place / "task", *data)
    succeed("predict", place / "task", *data, "--probabilities", "one")
    assert table(tmp_path / "out.csv")[0]["p_value"] == "0.123456789"


def test_classes_that_are_numbers_are_remarked_on(place: Path, tmp_path: Path) -> None:
    numbered = [{**row, "label": int(row["label"] == "pos")} for row in reviews(24)]
    train(place, "--output", tmp_path / "task", rows=write(tmp_path / "rows.csv", numbered))
    data = ["--data", place / "new.csv", "--output", tmp_path / "out.csv", "--overwrite"]
    said = succeed("predict", tmp_path / "task", *data, "--quiet").stderr
    assert "note: the classes have no names, only numbers (0, 1). For predictions in words, train with" in said
    assert "no names" not in succeed("predict", place / "task", *data, "--quiet").stderr


def test_several_labels_have_their_probabilities_joined(place: Path, tmp_path: Path) -> None:
    lists = [{**row, "label": [row["label"], "any"]} for row in reviews(40)]
    train(place, "--output", tmp_path / "multi", rows=write(tmp_path / "lists.jsonl", lists))
    data = ["--data", place / "new.csv", "--output", tmp_path / "out.csv", "--quiet"]
    succeed("predict", tmp_path / "multi", *data, "--probabilities", "one")
    for row in table(tmp_path / "out.csv"):
        names, shares = (row[column].split("|") for column in ("prediction", "probability"))
        assert len(names) == len(shares)
        assert all(float(share) > 0.5 for share in shares if share)


def test_a_run_says_when_it_stops_and_that_it_did(place: Path, tmp_path: Path) -> None:
    """At a learning rate near 0 no epoch is better than the first."""
    more = ["--epochs", "9", "--lr", "1e-9", "--patience", "2", "--output", tmp_path / "task"]
    result = train(place, *more)
    assert "at most 9 epochs: training stops after 2 without a better dev accuracy (--patience 0: " in result.stderr
    assert re.search(r"\ntime: (less than|about) \d+ s for 9 epochs, less if training stops early\n", result.stderr)
    assert "│ 1, the best of 3 by accuracy on these same rows" in result.stdout
    assert "│ stopped after 3 of 9: no better accuracy for 2 epochs" in result.stdout
    whole = train(place, *more[:4], "--patience", "0", "--output", tmp_path / "whole")
    assert "\n9 epochs\n" in whole.stderr
    assert "of 9 by accuracy" in whole.stdout
    assert "stopped" not in whole.stdout
    last = train(place, *more[:4], "--keep", "last", "--output", tmp_path / "last")
    assert "│ 9, the last: none was chosen on these rows" in last.stdout
    resumed = train(place, *more[:4], "--keep-epoch", "last", "--output", tmp_path / "last", "--resume")
    assert resumed.stdout.splitlines()[:8] == last.stdout.splitlines()[:8]


def test_how_taps_inputs_are_kept_changes_no_score(place: Path, tmp_path: Path) -> None:
    found = {}
    for keep in ("full", "replay", "auto"):
        more = ["--epochs", "2", "--pool", "mean", "--set", "rank=2", "--keep", keep, "--output", tmp_path / keep]
        shown = train(place, *more)
        found[keep] = json.loads((tmp_path / keep / "results.json").read_text())
        assert ("\nkeep: full, because full fits" in shown.stderr) == (keep == "auto")
    assert found["replay"]["scores"] == found["full"]["scores"]
    assert [found[keep]["keep"] for keep in found] == ["full", "replay", "full"]
    kept = {keep: found[keep]["step"]["kept_bytes"] for keep in found}
    assert kept["replay"] < kept["full"] == kept["auto"]


@pytest.mark.parametrize("classes", [3, 10, 11])
def test_the_table_fits_in_a_hundred_columns(classes: int, place: Path, tmp_path: Path) -> None:
    long = [{**row, "label": f"class {n % classes} with a long name of its own"} for n, row in enumerate(reviews(110))]
    more = ["--epochs", "1", "--output", tmp_path / "task", "--dev-fraction", "0.4"]
    shown = train(place, *more, rows=write(tmp_path / "rows.csv", long)).stdout
    assert max(map(len, shown.splitlines())) <= 100
    assert shown.count("recall of class") == (classes if classes <= 10 else 0)
    found = json.loads((tmp_path / "task" / "results.json").read_text())
    assert len(found["classes"]) == classes


def test_a_fresh_process_predicts_the_same(place: Path, tmp_path: Path) -> None:
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    arguments = ["predict", place / "task", "--data", place / "new.csv", "--output"]
    succeed(*arguments, here)
    command = [sys.executable, "-m", "sidestep.cli", *map(str, arguments), str(there)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    assert here.read_text() == there.read_text()


def test_a_pair_a_number_and_several_labels(place: Path, tmp_path: Path) -> None:
    train(place, "--text2", "other", "--output", tmp_path / "pair")
    train(place, "--problem", "regress", "--label", "score", "--output", tmp_path / "number")
    lists = [{**row, "label": [row["label"], "any"]} for row in reviews(40)]
    train(place, "--output", tmp_path / "multi", rows=write(tmp_path / "lists.jsonl", lists))
    for task in ("pair", "number", "multi"):
        source = write(tmp_path / f"{task}_new.jsonl", reviews(5, 3))
        out = tmp_path / f"{task}.jsonl"
        succeed("predict", tmp_path / task, "--data", source, "--output", out)
        row = json.loads(out.read_text().splitlines()[0])
        expected: dict[str, Any] = {"pair": str, "number": float, "multi": str}
        assert isinstance(row["prediction"], expected[task])
    assert "any" in row["prediction"].split("|")
    assert row["p_any"] > 0.5


def test_images_from_a_folder(tmp_path: Path) -> None:
    vit, folder, task = image_backbone(tmp_path / "vit"), image_folder(tmp_path / "data"), tmp_path / "task"
    source = ["--backbone", vit, "--train", folder, "--image", "image", "--output", task]
    succeed("train", *source, *FAST, "--dev-fraction", "0.25")
    succeed("predict", task, "--data", folder, "--output", tmp_path / "out.csv")
    rows = table(tmp_path / "out.csv")
    assert {row["label"] for row in rows} == {"bright", "dark"}
    assert all(Path(row["image"]).parent.name == row["label"] for row in rows)
    never = [*FAST, "--output", tmp_path / "never"]
    said = refusal("train", *source[:4], "--text", "label", *never)
    assert "the backbone reads images (ViTImageProcessor" in said
    text = ["--backbone", text_backbone(tmp_path / "bert"), "--train", folder, "--image", "image"]
    assert "the backbone reads text (" in refusal("train", *text, *never)


def test_tables_without_header_or_quotes_in_another_encoding(place: Path, tmp_path: Path) -> None:
    lines = [f"{row['label']}\tfilm\xe9 {row['text']}" for row in reviews(40)]
    lines[3] = lines[3] + ' "'
    rows = tmp_path / "plain.tsv"
    rows.write_bytes("\n".join(lines).encode("latin-1"))
    options = ["--columns", "label,text", "--no-header", "--no-quoting", "--encoding", "latin-1"]
    train(place, *options, "--output", tmp_path / "task", rows=rows)
    succeed("eval", tmp_path / "task", "--data", rows, *options)


def test_an_own_head_and_a_model_without_pad_token(tmp_path: Path) -> None:
    llama = padless_backbone(tmp_path / "llama")
    rows = write(tmp_path / "train.csv", reviews(40))
    source = ["train", "--backbone", llama, "--train", rows, "--text", "text", *FAST]
    for name, own in (("own", ["--own-head"]), ("ours", [])):
        succeed(*source, *own, "--output", tmp_path / name)
        moved = ["--backbone", llama]
        shown = succeed("eval", tmp_path / name, "--data", rows, *moved).stdout
        assert shown.splitlines()[1:] == succeed("eval", tmp_path / name, "--data", rows).stdout.splitlines()[1:]
        assert "token 0, masked" in succeed("inspect", tmp_path / name).stdout


def test_a_moved_backbone_is_found_where_the_user_says(place: Path, tmp_path: Path) -> None:
    backbone = text_backbone(tmp_path / "old")
    source = ["--backbone", backbone, "--train", place / "train.tsv", "--text", "text"]
    succeed("train", *source, *FAST, "--output", tmp_path / "task")
    backbone.rename(tmp_path / "new")
    evaluation = ["eval", tmp_path / "task", "--data", place / "dev.tsv"]
    assert "old" in refusal(*evaluation)
    succeed(*evaluation, "--backbone", tmp_path / "new")


def test_inspect_says_what_is_stored(place: Path) -> None:
    shown = succeed("inspect", place / "task")
    about = json.loads(succeed("inspect", place / "task", "--json").stdout)
    for part in ("read", "rank=8", "neg, pos", about["digest"], "side.out.weight", "text=text", "818"):
        assert part in shown.stdout
    assert "no final norm" in shown.stderr
    assert about["tensors"]["side.out.weight"]["trained"] is True


def test_methods_lists_settings_with_their_defaults() -> None:
    shown = succeed("methods").stdout
    for part in ("bitfit", "probe", "full", "rank=128", "cell=gru", "READ: a recurrent network over depth"):
        assert part in shown


def test_help_needs_no_torch() -> None:
    code = "import sys; from sidestep.cli import app; app(['train', '--help'], standalone_mode=False); "
    code += "sys.exit(bool({'torch', 'transformers', 'datasets', 'sklearn'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_early_stopping_metric_and_resume_are_options(place: Path, tmp_path: Path) -> None:
    options = ["--patience", "1", "--metric", "f1_macro", "--output", tmp_path / "task"]
    train(place, *options)
    found = json.loads((tmp_path / "task" / "results.json").read_text())
    assert found["metric"] == "f1_macro"
    again = train(place, *options, "--resume")
    assert f"{found['scores']['f1_macro']:.4g}" in again.stdout


# --- bad input: one message on stderr, nothing lost --------------------------------------------------------


def test_data_that_cannot_be_read(place: Path, tmp_path: Path) -> None:
    assert "nowhere.tsv does not exist: check the path" in refused_training(place, rows=tmp_path / "nowhere.tsv")
    empty = tmp_path / "empty.tsv"
    empty.touch()
    assert "empty.tsv is empty: give a file with at least one row" in refused_training(place, rows=empty)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no parquet")
    assert "cannot be read as parquet" in refused_training(place, rows=tmp_path / "bad.parquet")
    said = refusal("eval", place / "task", "--data", tmp_path / "nowhere.tsv")
    assert "nowhere.tsv does not exist" in said


def test_columns_that_do_not_exist(place: Path) -> None:
    said = refused_training(place, "--text", "txt")
    assert "there is no column 'txt' (did you mean 'text'?)" in said
    assert "the columns are 'text', 'other', 'label', 'score'" in said
    assert "there is no column 'gold'" in refused_training(place, "--label", "gold")
    said = refused_training(place, "--image", "a", "--text", "b")
    assert "the backbone reads text (TokenizersBackend), but 'b' is named as text and 'a' as images. Leave" in said


def test_labels_that_training_never_had(place: Path, tmp_path: Path) -> None:
    dev = write(tmp_path / "dev.csv", [*reviews(5), {**reviews(1)[0], "label": "meh"}])
    for said in (
        refused_training(place, "--dev", dev),
        refusal("eval", place / "task", "--data", dev),
    ):
        assert "holds labels that training never had: 'meh', in row 6" in said
        assert "Training had 'neg', 'pos'" in said


def test_targets_that_are_no_numbers(place: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "nan.csv", [{**row, "score": "nan" if i == 2 else 1} for i, row in enumerate(reviews(9))])
    said = refused_training(place, "--problem", "regress", "--label", "score", rows=rows)
    assert "holds targets that are no finite numbers: 'nan', in row 3" in said


def test_a_text_column_of_numbers(place: Path) -> None:
    said = refused_training(place, "--text", "score")
    assert "text column 'score' holds only numbers" in said
    assert "choose a text column of 'text', 'other', 'label', 'score'" in said


def test_a_backbone_without_weights(place: Path, tmp_path: Path) -> None:
    folder = text_backbone(tmp_path / "bare")
    (folder / "model.safetensors").unlink()
    said = refused_training(place, "--backbone", folder)
    assert "bare has no weights: looked for model.safetensors" in said


def test_an_unknown_method_or_setting(place: Path) -> None:
    assert "unknown method 'lore': choose one of bitfit, " in refused_training(place, "--method", "lore")
    said = refused_training(place, "--set", "rnk=4")
    assert "ReadConfig has no field 'rnk' (did you mean 'rank'?): it has rank, cell, aggregate" in said
    assert "--set rank=few: 'few' is not a whole number" in refused_training(place, "--set", "rank=few")
    assert "ReadConfig: rank=0, but it must be" in refused_training(place, "--set", "rank=0")
    assert """cell='lstm', but it must be "gru" or "rnn\"""" in refused_training(place, "--set", "cell=lstm")
    assert "--set rank: write name=value" in refused_training(place, "--set", "rank")
    assert "has no field 'rank': it has none" in refused_training(place, "--method", "probe")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--epochs", "0"], "epochs=0, but it must be at least 1"),
        (["--lr", "-1"], "learning_rate=-1.0, but it must be a number above 0"),
        (["--pool", "max"], "pool='max': choose None or one of cls, mean, mean_pre_norm, last"),
        (["--checkpoint", "all"], "checkpoint='all': choose None or"),
        (["--backbone-noise", "some"], "backbone_noise='some': choose None or one of"),
        (["--dtype", "int8"], "dtype='int8': choose float32, bfloat16"),
        (["--metric", "bleu"], "metric='bleu': two-class single problems have accuracy"),
        (["--max-length", "1"], "max_length=1, but 2 tokens are special: choose at least 3"),
        (["--dev-fraction", "2"], "fraction=2.0: choose a share between 0 and 1"),
        (["--own-head", "--pool", "cls"], "--pool cls with --own-head"),
        (["--resume"], "holds no run to resume"),
        (["--problem", "rank"], "kind='rank': choose single, multi, "),
        (["--budget", "5m"], "--budget 5m is for --method auto: leave it out"),
        (["--method", "auto", "--lr", "1"], "with --method auto: its candidates have their own"),
    ],
)
def test_values_out_of_range(place: Path, options: list[str], said: str) -> None:
    assert said in refused_training(place, *options)


@pytest.mark.parametrize("name", ["token", "ner", "token-classification"])
def test_other_names_of_a_kind_are_told_its_own(place: Path, name: str) -> None:
    assert f"kind={name!r}: 'tokens' is what you mean" in refused_training(place, "--task", name)


def test_an_output_folder_with_another_task_is_left_alone(place: Path) -> None:
    before = (place / "task" / task_folder.WEIGHTS).read_bytes()
    said = refused_training(place, "--output", place / "task", "--seed", "5")
    assert "task holds another task: choose another folder, or replace it with --overwrite" in said
    assert (place / "task" / task_folder.WEIGHTS).read_bytes() == before


def test_predictions_do_not_replace_a_file(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    out.write_text("mine")
    arguments = ["predict", place / "task", "--data", place / "new.csv", "--output"]
    assert "exists already: choose another file, or replace it with --overwrite" in refusal(*arguments, out)
    assert out.read_text() == "mine"
    assert "ends in '.txt': choose a file that ends in .csv" in refusal(*arguments, tmp_path / "out.txt")
    succeed(*arguments, out, "--overwrite")
    renamed = tmp_path / "taken.csv"
    renamed.write_text("text,prediction\ngood film,x\n")
    said = refusal("predict", place / "task", "--data", renamed, "--output", tmp_path / "new.csv")
    assert "the rows have columns named prediction already: rename them" in said


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 255
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("file", "spoil", "said"),
    [
        (task_folder.WEIGHTS, _cut, "is damaged"),
        (task_folder.WEIGHTS, _flip, "is damaged (its checksum differs): copy the task again"),
        (task_folder.WEIGHTS, Path.unlink, "task.safetensors is missing"),
        (task_folder.CONFIG, _cut, "cannot be read"),
        (task_folder.CONFIG, Path.unlink, "is no task folder: sidestep.json is missing"),
    ],
)
def test_a_damaged_task(place: Path, tmp_path: Path, file: str, spoil: Callable[[Path], object], said: str) -> None:
    loading.load(place / "task").save_pretrained(tmp_path / "task")
    spoil(tmp_path / "task" / file)
    assert said in refusal("eval", tmp_path / "task", "--data", place / "dev.tsv")


def test_a_task_for_another_backbone(place: Path, tmp_path: Path) -> None:
    other = text_backbone(tmp_path / "other", seed=1)
    said = refusal("eval", place / "task", "--data", place / "dev.tsv", "--backbone", other)
    assert task_folder.inspect_task(place / "task")["digest"][:16] in said
    assert "but this backbone is BertModel" in said
    assert "load the task's own backbone" in said


def test_a_task_of_a_newer_format(place: Path, tmp_path: Path) -> None:
    loading.load(place / "task").save_pretrained(tmp_path / "task")
    config = json.loads((tmp_path / "task" / task_folder.CONFIG).read_text())
    (tmp_path / "task" / task_folder.CONFIG).write_text(json.dumps({**config, "format": 99}))
    assert "in format 99, and this version" in refusal("inspect", tmp_path / "task")


def test_a_task_without_preprocessing_says_so(place: Path, tmp_path: Path) -> None:
    model = ss.attach(load_backbone(place / "bert"), ss.ReadConfig(rank=4), head=ss.Classify(num_labels=2))
    model.save_pretrained(tmp_path / "task")
    said = refusal("eval", tmp_path / "task", "--data", place / "dev.tsv")
    assert "this task does not say which columns it reads" in said


def test_a_task_saved_from_python_predicts_with_the_columns_that_are_named(place: Path, tmp_path: Path) -> None:
    head = ss.Classify(num_labels=2, labels=("bad", "good"))
    model = ss.attach(load_backbone(place / "bert"), ss.ReadConfig(rank=4), head=head)
    model.extras["processor"] = load_processor(place / "bert")
    model.save_pretrained(tmp_path / "task")
    asked = ("predict", tmp_path / "task", "--data", place / "dev.tsv", "--output", tmp_path / "out.csv")
    assert "this task does not say which columns it reads: name them (--text, --image, --audio or --video)" in refusal(
        *asked
    )
    succeed(*asked, "--text", "text")
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["prediction"] for row in rows} <= {"bad", "good"}
    assert all(float(row["p_bad"]) + float(row["p_good"]) == pytest.approx(1) for row in rows)


def test_divergence_is_one_message(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "task"
    said = refused_training(place, "--output", output, "--lr", "1e30", "--max-grad-norm", "0", "--weight-decay", "1e9")
    assert "training diverged (" in said
    assert "choose a lower learning rate (--lr)" in said
    assert not (output / task_folder.CONFIG).exists()


def test_out_of_memory_is_one_message(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(training, "measure_step", fail)
    said = refused_training(place, "--output", tmp_path / "task")
    assert "out of memory (CUDA out of memory. Tried to allocate 20.00 GiB): lower --batch-size" in said
    assert said.endswith("No checkpoint had been written")


def test_debug_shows_the_traceback(place: Path) -> None:
    result = run("eval", place / "nowhere", "--data", place / "dev.tsv", "--debug")
    assert isinstance(result.exception, task_folder.TaskError)


def test_a_program_error_is_not_hidden(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AttributeError("a bug")

    monkeypatch.setattr(task_folder, "inspect_task", fail)
    assert isinstance(run("inspect", place / "task").exception, AttributeError)


def test_ctrl_c_says_how_to_go_on(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "_run", stop)
    source = ["--backbone", place / "bert", "--train", place / "train.tsv", "--text", "text"]
    result = run("train", *source, *FAST, "--output", tmp_path / "task")
    assert result.exit_code == 130
    assert "continues with --resume" in result.stderr


def test_warnings_are_lines(place: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        result = train(place, "--max-length", "5", "--output", tmp_path / "task")
    lines = [line for line in result.stderr.splitlines() if line.startswith("Warning: ")]
    assert any("have more than 5 tokens and were truncated" in line for line in lines)
    found = json.loads((tmp_path / "task" / "results.json").read_text())
    assert found["data"]["truncated"] > 0


# --- values -----------------------------------------------------------------------------------------------


def test_settings_take_the_type_of_their_field() -> None:
    config = config_from(ss.ReadConfig, ["rank=4", "cell = rnn", "aggregate=mean"])
    assert config == ss.ReadConfig(rank=4, cell="rnn", aggregate="mean")


def test_settings_of_other_types() -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True, kw_only=True)
    class Config:
        share: float = 0.5
        on: bool = True
        depth: int | None = 3
        blocks: tuple[int, ...] = ()

    found = config_from(Config, ["share=1e-3", "on=no", "depth=none", "blocks=1, 2"])
    assert found == Config(share=1e-3, on=False, depth=None, blocks=(1, 2))
    with pytest.raises(ValueError, match="--set on=maybe: 'maybe' is neither true nor false"):
        config_from(Config, ["on=maybe"])
    with pytest.raises(ValueError, match="--set depth=deep: 'deep' is not a whole number"):
        config_from(Config, ["depth=deep"])


def test_hub_rows_keep_their_class_names(place: Path, tmp_path: Path) -> None:
    """A saved dataset with a ClassLabel column, as the hub's are."""
    rows = Dataset.from_list(reviews(20)).class_encode_column("label")
    rows.save_to_disk(tmp_path / "rows")
    succeed("predict", place / "task", "--data", tmp_path / "rows", "--output", tmp_path / "out.csv")
    assert {row["label"] for row in table(tmp_path / "out.csv")} == {"neg", "pos"}
