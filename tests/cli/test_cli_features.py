"""What frozen blocks computed, from the command line: kept by `train`, used by `eval`, listed and cleared."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from commands import FAST, refusal, run, succeed
from sidestep.disk.features import MARK, FeatureStore
from sidestep.disk.features import name_of as name_of_key
from sidestep.measure.memory import format_bytes
from small_tasks import reviews, text_backbone, write

KEYS: list[dict[str, Any]] = [
    {"model": "BertModel", "tokens": "all", "precision": "float32"},
    {"model": "ViTModel", "tokens": "first", "precision": "bfloat16"},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a backbone, rows, and a task that was trained from features."""
    folder = tmp_path_factory.mktemp("features")
    text_backbone(folder / "bert")
    write(folder / "train.tsv", reviews(40))
    write(folder / "dev.tsv", reviews(16, 1))
    succeed(*training(folder, "task", "--features", "disk", "--features-folder", folder / "kept"))
    return folder


def training(place: Path, output: str, *more: object) -> list[object]:
    rows = ["--train", place / "train.tsv", "--dev", place / "dev.tsv", "--text", "text"]
    return ["train", "--backbone", place / "bert", *rows, "--output", place / output, *FAST, *more]


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A store with an entry for each key."""
    import torch

    for number, key in enumerate(KEYS):
        entry = FeatureStore(tmp_path, 2**30).entry(key)
        ids = [bytes([row]) * 16 for row in range(3 + number)]
        entry.add(ids, {"encoder.block.0": [torch.randn(2, 4) for _ in ids]}, 1.0)
    return tmp_path


def listed(folder: Path) -> list[dict[str, Any]]:
    return json.loads(succeed("features", "list", "--features-folder", folder, "--json").stdout)


def results(place: Path, task: str) -> dict[str, Any]:
    return json.loads((place / task / "results.json").read_text())


# --- training and scoring ----------------------------------------------------------------------------------------


def test_a_run_tells_what_it_keeps_and_the_next_one_what_is_there(place: Path) -> None:
    assert results(place, "task")["features"]["computed"] == 56
    again = succeed(*training(place, "again", "--features", "disk", "--features-folder", place / "kept", "--seed", 2))
    assert results(place, "again")["features"]["computed"] == 0
    said = " ".join(again.stderr.split())
    assert f"features: all 56 rows are stored in {place / 'kept'}" in said


def test_a_small_run_is_live_unless_it_is_asked_and_says_why(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIDESTEP_FEATURES", str(tmp_path / "none"))
    found = succeed(*training(place, "live"))
    assert results(place, "live")["features"] is None
    assert re.search(r"features: none, as all [\d.]+ frozen passes take less than 10 s", " ".join(found.stderr.split()))
    assert not (tmp_path / "none").exists()


def test_the_folder_of_features_can_be_set_by_a_variable(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIDESTEP_FEATURES", str(tmp_path / "mine"))
    succeed(*training(place, "elsewhere", "--features", "disk"))
    assert [entry["rows"] for entry in json.loads(succeed("features", "list", "--json").stdout)] == [56]
    assert str(tmp_path / "mine") in succeed("features", "list").stdout


def test_eval_scores_from_features(place: Path) -> None:
    rows = ["eval", place / "task", "--data", place / "dev.tsv", "--quiet"]
    live = succeed(*rows, "--features", "off")
    for where, said in (("disk", "all 16 rows are stored"), ("ram", "16 rows are computed once and kept in memory")):
        kept = succeed(*rows, "--features", where, "--features-folder", place / "kept")
        assert kept.stdout == live.stdout
        assert said in " ".join(kept.stderr.split())


@pytest.mark.parametrize("command", ["train", "eval"])
def test_an_unknown_place_for_features_is_refused_with_those_there_are(place: Path, command: str) -> None:
    given = training(place, "never") if command == "train" else ["eval", place / "task", "--data", place / "dev.tsv"]
    said = refusal(*given, "--features", "disc")
    assert "features='disc'" in said
    for choice in ("auto", "ram", "disk", "off"):
        assert choice in said
    assert not (place / "never").exists()


def test_odd_options_of_features_are_refused(place: Path) -> None:
    for option, value, expected in (
        ("--features-precision", "int8", 'features_precision=\'int8\', but it must be "same" or "bf16"'),
        ("--features-limit", "much", "'much' is no size of memory: write for example 16GB"),
        ("--features-limit", "0", "'0' is no size of memory"),
    ):
        assert expected in refusal(*training(place, "never"), "--features", "disk", option, value)
    assert not (place / "never").exists()


@pytest.mark.parametrize("where", ["ram", "disk"])
def test_a_limit_that_is_too_low_is_refused_before_training(place: Path, tmp_path: Path, where: str) -> None:
    kept = ["--features", where, "--features-folder", tmp_path / "kept", "--features-limit", "1KB"]
    said = refusal(*training(place, f"low {where}"), *kept)
    assert "more than the limit of" in said
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_low_limit_is_told_as_it_was_given(place: Path, tmp_path: Path) -> None:
    kept = ["--features", "disk", "--features-folder", tmp_path / "kept", "--features-limit", "1KB"]
    assert re.search(r"the limit of (1 KiB|1\.0 KiB|1 KB|1024 bytes)", refusal(*training(place, "low"), *kept))


def test_what_cannot_be_kept_is_refused_with_the_reason(place: Path, tmp_path: Path) -> None:
    kept = ["--features", "disk", "--features-folder", tmp_path / "kept"]
    given = [argument for argument in training(place, "full", *kept) if argument not in ("--set", "rank=8")]
    assert "--features disk: full changes the backbone's weights" in refusal(*given, "--method", "full")
    (tmp_path / "thesis.txt").write_text("mine")
    others = ["--features", "disk", "--features-folder", tmp_path]
    assert "holds other files, and no features" in refusal(*training(place, "others"), *others)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


# --- listing -----------------------------------------------------------------------------------------------------


def test_the_list_shows_each_entry_with_what_it_takes(stored: Path) -> None:
    shown = succeed("features", "list", "--features-folder", stored).stdout
    for key, rows in zip(KEYS, (3, 4), strict=True):
        line = next(line for line in shown.splitlines() if name_of_key(key)[:8] in line)
        for part in (key["model"], key["tokens"], key["precision"], f" {rows} ", time.strftime("%Y-%m-%d")):
            assert part in line
    assert re.search(r"[\d.]+ KiB", shown)


def test_the_list_as_json_is_what_is_in_the_folder(stored: Path) -> None:
    found = {entry["name"]: entry for entry in listed(stored)}
    assert found.keys() == {name_of_key(key) for key in KEYS}
    for key, rows in zip(KEYS, (3, 4), strict=True):
        entry = found[name_of_key(key)]
        assert (entry["key"], entry["rows"]) == (key, rows)
        assert entry["size"] == sum(file.stat().st_size for file in (stored / entry["name"]).iterdir())
        assert abs(entry["used"] - time.time()) < 60


def test_an_entry_that_cannot_be_read_is_listed_too(stored: Path) -> None:
    (stored / name_of_key(KEYS[0]) / "key.json").write_text("{")
    assert "cannot be read" in succeed("features", "list", "--features-folder", stored).stdout
    assert sorted(entry["key"] is None for entry in listed(stored)) == [False, True]


def test_listing_is_not_using(stored: Path) -> None:
    before = listed(stored)
    succeed("features", "list", "--features-folder", stored)
    assert listed(stored) == before


def test_what_training_has_kept_is_listed(place: Path) -> None:
    (entry,) = listed(place / "kept")
    assert entry["rows"] == 56
    assert entry["key"]["model"] == "BertModel"


# --- clearing ----------------------------------------------------------------------------------------------------


def test_all_is_cleared(stored: Path) -> None:
    assert "removed from" in succeed("features", "clear", "--features-folder", stored).stderr
    assert listed(stored) == []
    assert (stored / MARK).exists()


def test_an_entry_is_cleared_by_the_beginning_of_its_name(stored: Path) -> None:
    first, second = map(name_of_key, KEYS)
    size = {entry["name"]: entry["size"] for entry in listed(stored)}[first]
    said = succeed("features", "clear", first[:8], "--features-folder", stored).stderr
    assert f"{format_bytes(size)} removed from {stored}" in " ".join(said.split())
    assert [entry["name"] for entry in listed(stored)] == [second]


def test_an_unknown_name_is_an_error_and_nothing_is_cleared(stored: Path) -> None:
    first = name_of_key(KEYS[0])
    said = refusal("features", "clear", first[:8], "zzzz", "--features-folder", stored)
    assert "nothing is stored under zzzz: see `sidestep features list`" in said
    assert len(listed(stored)) == 2


@pytest.mark.parametrize("command", ["list", "clear"])
def test_a_folder_that_is_not_there_or_holds_something_else_is_an_error(tmp_path: Path, command: str) -> None:
    said = refusal("features", command, "--features-folder", tmp_path / "none")
    assert f"there are no features in {tmp_path / 'none'}" in said
    assert "`sidestep train --features disk` stores some" in said
    assert not (tmp_path / "none").exists()
    (tmp_path / "thesis.txt").write_text("mine")
    assert "holds other files" in refusal("features", command, "--features-folder", tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_the_commands_are_told_by_their_help() -> None:
    said = run("features").output
    assert "list" in said
    assert "clear" in said
    assert "--features" in succeed("train", "--help").stdout
