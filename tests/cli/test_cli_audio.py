"""Sounds from the command line: trained, scored, predicted, resumed, kept in a bank, compared and planned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import soundfile
from datasets import Audio, Dataset

import sidestep as ss
from commands import FAST, refusal, succeed, table
from sidestep.tasks.predict import predict
from small_sounds import BACKBONES, RATE, sound_folder, tone
from small_tasks import text_backbone, write

pytestmark = pytest.mark.filterwarnings("default::sidestep.data.DataWarning")
LEARNING = [*FAST, "--epochs", "6", "--lr", "0.05", "--dev-fraction", "0.25"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Backbones of sounds, a folder of tones at two rates, and a table of them."""
    folder = tmp_path_factory.mktemp("sounds")
    for name, make in BACKBONES.items():
        make(folder / name)
    tones = sound_folder(folder / "tones", per_class=12, rates=(RATE, 8000))
    rows = [{"file": str(file), "kind": file.parent.name} for file in sorted(tones.glob("*/*.wav"))]
    write(folder / "rows.csv", rows)
    return folder


@pytest.mark.parametrize("name", ["waves", "spectrograms"])
def test_a_task_of_sounds_is_trained_scored_and_used(place: Path, tmp_path: Path, name: str) -> None:
    source, task = ["--data", place / "tones"], tmp_path / "task"
    result = succeed(
        *("train", "--backbone", place / name, "--train", place / "tones", "--audio", "audio", "--output", task),
        *(*LEARNING, "--features", "off"),
    )
    if name == "waves":
        assert (
            "Warning: 9 of 18 sounds are resampled to the 4000 Hz that the backbone reads: 9 from 8000" in result.stderr
        )
    scores = json.loads((task / "results.json").read_text())["scores"]
    assert scores["accuracy"] == 1.0
    assert '"audio": "speech.wav"' in (task / "README.md").read_text()
    assert "accuracy" in succeed("eval", task, *source, "--quiet").output
    succeed("predict", task, *source, "--output", tmp_path / "found.csv", "--quiet")
    found = table(tmp_path / "found.csv")
    right = [row["prediction"] == Path(row["audio"]).parent.name for row in found]
    assert sum(right) / len(right) > 0.9
    # from Python, without labels, each row alone, as a column of sounds of the hub
    files = [row["audio"] for row in found[:2]]
    rows = Dataset.from_dict({"audio": files}).cast_column("audio", Audio())
    alone = predict(ss.load(task), rows, batch_size=1)
    assert alone["audio"] == files
    assert alone["p_low"] == pytest.approx([float(row["p_low"]) for row in found[:2]], abs=1e-3)


def test_the_own_head_and_stored_features_reach_what_a_live_run_does(place: Path, tmp_path: Path) -> None:
    losses = {}
    for name in ("waves", "spectrograms"):
        for features in ("off", "ram"):
            task = tmp_path / f"{name}-{features}"
            succeed(
                *("train", "--backbone", place / name, "--train", place / "rows.csv", "--audio", "file"),
                *("--label", "kind", "--output", task, *FAST, "--features", features),
            )
            losses[name, features] = json.loads((task / "results.json").read_text())["history"][-1]["dev_loss"]
        assert losses[name, "ram"] == pytest.approx(losses[name, "off"], rel=1e-4)
    succeed(
        *(
            "train",
            "--backbone",
            place / "whisper",
            "--train",
            place / "rows.csv",
            "--audio",
            "file",
            "--label",
            "kind",
        ),
        *("--own-head", "--output", tmp_path / "own", *FAST),
    )


def test_a_bank_and_a_table_of_other_names(place: Path, tmp_path: Path) -> None:
    train = [
        "train",
        "--backbone",
        place / "waves",
        "--train",
        place / "rows.csv",
        "--audio",
        "file",
        "--label",
        "kind",
    ]
    for name in ("one", "two"):
        succeed(*train, "--output", tmp_path / name, *FAST, "--seed", len(name))
        succeed("bank", "add", tmp_path / "bank", name, tmp_path / name)
    write(tmp_path / "new.csv", [{"sound": row["file"]} for row in table(place / "rows.csv")])
    both = ["--data", tmp_path / "new.csv", "--audio", "sound", "--tasks", "one,two", "--output", tmp_path / "both.csv"]
    succeed("bank", "run", tmp_path / "bank", *both, "--quiet")
    succeed("predict", tmp_path / "one", *both[:4], "--output", tmp_path / "one.csv", "--quiet")
    found, own = table(tmp_path / "both.csv"), table(tmp_path / "one.csv")
    assert [row["prediction_one"] for row in found] == [row["prediction"] for row in own]


def test_a_comparison_reads_sounds_by_the_backbone_that_hears(place: Path, tmp_path: Path) -> None:
    text_backbone(tmp_path / "bert")
    file = tmp_path / "study.toml"
    tasks = f'[[task]]\nname = "tones"\ntrain = "{place / "rows.csv"}"\naudio = "file"\nlabel = "kind"\n'
    models = f'[[backbone]]\nmodel = "{place / "waves"}"\n'
    file.write_text(f'methods = ["probe"]\nseeds = [0]\nepochs = 1\ncosts = false\n{models}{tasks}')
    succeed("compare", file, "--output", tmp_path / "results.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {line["status"] for line in lines if "status" in line} == {"ok"}
    file.write_text(f'methods = ["probe"]\n[[backbone]]\nmodel = "{tmp_path / "bert"}"\n{tasks}')
    assert "'bert' reads text, but no task has any" in refusal("compare", file, "--dry-run")


def test_plans_of_sounds(place: Path) -> None:
    assert "4 x 800 samples" in succeed("plan", "--backbone", place / "waves", "--batch", 4, "--length", 800).output
    assert "4 x spectrograms" in succeed("plan", "--backbone", place / "spectrograms", "--batch", 4).output
    assert "reads spectrograms of (32, 16)" in refusal("plan", "--backbone", place / "spectrograms", "--length", 800)


def test_what_is_refused_leaves_nothing_behind(place: Path, tmp_path: Path) -> None:
    rows = table(place / "rows.csv")
    train = [
        "train",
        "--backbone",
        place / "waves",
        "--audio",
        "file",
        "--label",
        "kind",
        "--output",
        tmp_path / "task",
    ]
    soundfile.write(tmp_path / "short.wav", tone(300, 10 / RATE), RATE)
    (tmp_path / "noise.wav").write_text("no sound")
    for name, said in (
        ("short.wav", "1 of 24 sounds are shorter than the 20 samples"),
        ("noise.wav", "1 of 24 sounds of column 'file' cannot be read: "),
        ("gone.wav", "1 of 24 sounds of column 'file' are not there or empty"),
    ):
        bad = [{**rows[0], "file": str(tmp_path / name)}, *rows[1:]]
        write(tmp_path / "bad.csv", bad)
        assert said in refusal(*train, "--train", tmp_path / "bad.csv", "--dev", place / "rows.csv", *FAST)
    assert not (tmp_path / "task").exists()
    assert "say --audio" in refusal(*train[:3], "--text", "file", *train[5:], "--train", place / "rows.csv", *FAST)
