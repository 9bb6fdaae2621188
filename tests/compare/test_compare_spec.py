"""What a comparison is asked to do: from files and flags, with equal effort for all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import sidestep as ss
from sidestep.compare.files import comparison_file, comparison_from
from sidestep.compare.spec import (
    Backbone,
    Comparison,
    Contender,
    Task,
    default_contenders,
    quick,
)
from sidestep.data import DataError, Fields

BACKBONE = Backbone(name="tiny", model="tiny")
TASK = Task(name="reviews", train="train.tsv", fields=Fields(text="text", label="label"))
FILE = """
seeds = [0, 1]
epochs = 4
batch_size = 16
max_length = 64
methods = ["read", "lora+checkpoint"]

[[backbone]]
name = "base"
model = "models/base"
pool = "cls"

[[backbone]]
model = "timm:vit_base@weights.safetensors"

[[backbone]]
name = "original"
model = "vit:ViT-B_16.npz"

[[task]]
name = "rte"
train = "${DATA}/rte/train.tsv"
dev = "rte/dev.tsv"
text = "sentence1"
text2 = "sentence2"
quoting = false
rows = 100

[[task]]
train = "photos"
image = "image"

[[contender]]
name = "read-8"
method = "read"
set = { rank = 8 }
rates = [1, 0.1, 0.01]
"""


def comparison(**changes: Any) -> Comparison:
    contenders = (Contender.named("read"), Contender.named("full"))
    given: dict[str, Any] = {"backbones": (BACKBONE,), "tasks": (TASK,), "contenders": contenders}
    return Comparison(**{**given, **changes})


def values(**changes: Any) -> dict[str, Any]:
    given = {"backbone": [{"model": "tiny"}], "task": [{"train": "train.tsv", "text": "text"}]}
    return {**given, **changes}


def test_every_registered_method_is_a_contender_by_default_one_of_a_third_party_too() -> None:
    names = [one.name for one in default_contenders()]
    assert set(ss.methods()) <= set(names)
    assert "late_writer" in names
    assert {"lora+checkpoint", "full+checkpoint"} <= set(names)
    assert Contender.named("late_writer").rates == ss.MethodConfig.rates
    assert comparison_from(values(), Path(), "here").contenders == default_contenders()


def test_equal_effort_is_the_default_and_unequal_effort_is_refused() -> None:
    assert len({len(one.rates) for one in default_contenders()}) == 1
    odd = replace(Contender.named("full"), rates=(1e-5,))
    with pytest.raises(ValueError, match=r"unequal tuning effort: read has 3 rates, full has 1 rates\. Give every"):
        comparison(contenders=(Contender.named("read"), odd))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": ()}, "no tasks: a comparison needs at least one"),
        ({"backbones": (BACKBONE, BACKBONE)}, "backbone tiny stands there twice"),
        ({"seeds": (1, 1)}, "seed 1 stands there twice"),
        ({"rows": 1}, "rows=1, but it must be at least 2, or not given"),
        ({"holdout": 1.0}, "holdout=1.0, but it must be a share between 0 and 1"),
        ({"attention": "flash"}, "attention='flash', but it must be sdpa or eager"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=r"no tasks|twice|must be") as caught:
        comparison(**changes)
    assert said in str(caught.value)


@pytest.mark.parametrize("rates", [(), (0.0,), (float("nan"),), (1e-3, 1e-3)])
def test_rates_are_different_numbers_above_zero(rates: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="rates="):
        replace(Contender.named("read"), rates=rates)


def test_a_way_of_keeping_is_part_of_a_contenders_name() -> None:
    replayed, rounded, both = (Contender.named(name) for name in ("read+replay", "read+int8", "dtl+checkpoint+replay"))
    assert (replayed.method, replayed.keep, rounded.keep) == ("read", "replay", "int8")
    assert (both.keep, both.checkpoint) == ("replay", True)
    plain = comparison(contenders=(Contender.named("read"), replayed, rounded))
    assert plain.score_of(replayed) == "read"
    assert plain.score_of(rounded) is None  # its gradients are others
    with pytest.raises(ValueError, match="keep='fuzzy': choose one of full, bf16"):
        Contender.named("read+fuzzy")


def test_recomputing_blocks_has_the_score_of_the_plain_contender() -> None:
    plain, recomputed, own = (Contender.named(name) for name in ("lora", "lora+checkpoint", "full+checkpoint"))
    both = comparison(contenders=(plain, recomputed, own))
    assert both.score_of(recomputed) == "lora"
    assert both.scored == (plain, own)  # nothing else in the comparison computes what `own` computes
    noisy = replace(recomputed, name="noisy", noise="all")
    assert comparison(contenders=(plain, noisy)).score_of(noisy) is None
    elsewhere = replace(recomputed, name="elsewhere", pool="cls")
    assert comparison(contenders=(plain, elsewhere)).score_of(elsewhere) is None


def test_quick_says_what_it_leaves_out_and_never_adds() -> None:
    small, cut = quick(comparison(rows=1000, epochs=1, tasks=(replace(TASK, rows=900),)))
    assert (small.seeds, small.rows, small.dev_rows, small.epochs) == ((0,), 128, 128, 1)
    assert small.tasks[0].rows is None
    assert [one.rates for one in small.contenders] == [one.rates[-2:] for one in comparison().contenders]
    assert cut[:3] == ["seeds 0, 1, 2 -> 0", "rows 1000 -> 128", "dev_rows all -> 128"]
    assert not any("epochs" in part for part in cut)
    assert quick(comparison(rows=8))[0].rows == 8


def test_only_some_contenders() -> None:
    assert [one.name for one in comparison().only(["full"]).contenders] == ["full"]
    with pytest.raises(
        ValueError, match=r"unknown contender 'ful' \(did you mean 'full'\?\): choose one of read, full"
    ):
        comparison().only(["ful"])


def test_a_file_with_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", "/data")
    (tmp_path / "photos").mkdir()
    (tmp_path / "models" / "base").mkdir(parents=True)
    (tmp_path / "study.toml").write_text(FILE)
    found, results = comparison_file(tmp_path / "study.toml")
    assert results == tmp_path / "study.jsonl"
    assert [one.name for one in found.backbones] == ["base", "timm:vit_base", "original"]
    assert found.backbones[0].model == str(tmp_path / "models" / "base")
    assert found.backbones[1].model == f"timm:vit_base@{tmp_path / 'weights.safetensors'}"
    assert found.backbones[2].model == f"vit:{tmp_path / 'ViT-B_16.npz'}"
    text, photos = found.tasks
    assert (text.train, text.dev) == ("/data/rte/train.tsv", str(tmp_path / "rte" / "dev.tsv"))
    assert (text.options.quoting, text.rows, text.fields.text2) == (False, 100, "sentence2")
    assert (photos.name, photos.fields.image, photos.train) == ("photos", "image", str(tmp_path / "photos"))
    assert [one.name for one in found.contenders] == ["read", "lora+checkpoint", "read-8"]
    assert found.contenders[2].config == ss.ReadConfig(rank=8)
    assert found.contenders[2].rates == (1.0, 0.1, 0.01)
    assert found.costs is not None
    assert (found.costs.batch, found.costs.length) == (16, 64)


def test_the_results_go_where_the_file_says(tmp_path: Path) -> None:
    lines = 'output = "out/all.jsonl"\ncosts = false\n[[backbone]]\nmodel = "org/name"\n'
    (tmp_path / "study.toml").write_text(lines + '[[task]]\ntrain = "org/rows"\ntext = "text"\n')
    found, results = comparison_file(tmp_path / "study.toml")
    assert results == tmp_path / "out" / "all.jsonl"
    assert found.costs is None
    assert (found.backbones[0].model, found.tasks[0].train) == ("org/name", "org/rows")  # hub ids


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epoch": 3}, r"here: unknown field 'epoch' \(did you mean 'epochs'\?\): choose one of backbone, task"),
        ({"methods": ["raed"]}, r"unknown method 'raed' \(did you mean 'read'\?\): choose one of bitfit"),
        ({"contender": [{"method": "lorra"}]}, r"unknown method 'lorra' \(did you mean 'lora'\?\)"),
        (
            {"contender": [{"method": "read", "set": {"rnk": 3}}]},
            r"\[\[contender\]\] 1: ReadConfig has no field rnk",
        ),
        ({"contender": [{"method": "read", "set": {"rank": "8"}}]}, r"here, \[\[contender\]\] 1: "),
        ({"contender": [{"method": "read", "noise": "loud"}]}, "backbone_noise='loud'"),
        ({"task": [{"train": "a.tsv"}]}, r"\[\[task\]\] 1: name one column, of texts \(text\), of images"),
        ({"task": [{"train": "a.tsv", "text": "t", "shots": 0}]}, "shots=0, but it must be at least 1"),
        ({"task": [{"text": "text"}]}, r"\[\[task\]\] 1: train is missing"),
        ({"task": [{"train": "a.tsv", "text": "t", "split": "x"}]}, r"\[\[task\]\] 1: unknown field 'split'"),
        ({"backbone": []}, r"here: backbone=\[\] is empty: give at least one"),
        ({"backbone": [{"model": "a", "pool": "max"}]}, "pool='max' of backbone 'a': choose cls, mean, "),
        ({"contender": [{"method": "read", "pool": "max"}]}, "pool='max' of contender 'read': choose cls, mean, "),
        ({"seeds": 3}, "here: seeds=3 is not a list"),
        ({"seeds": [True]}, "here: seeds=True is not a whole number"),
        ({"bf16": 1}, "here: bf16=1 is not true or false"),
        ({"costs": 3}, r"here: costs=3: write a table \[costs\], or costs = false"),
        ({"costs": {"repeat": 3}}, r"here, \[costs\]: unknown field 'repeat' \(did you mean 'repeats'\?\)"),
        ({"task": [{"train": "${NO_SUCH_PLACE}/a.tsv", "text": "t"}]}, "NO_SUCH_PLACE.* is no environment variable"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        comparison_from(values(**changes), Path(), "here")


def test_a_problem_that_is_not_supported_is_refused() -> None:
    with pytest.raises(DataError, match=r"kind=.ner.: .tokens. is what you mean"):
        comparison_from(values(task=[{"train": "a", "text": "t", "problem": "ner"}]), Path(), "here")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.toml does not exist"):
        comparison_file(tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("seeds = [")
    with pytest.raises(ValueError, match=r"broken\.toml cannot be read as TOML"):
        comparison_file(tmp_path / "broken.toml")


NAN, INF = float("nan"), float("inf")
CONTENDER = {"method": "probe", "rates": [1e-3]}
BAD: list[tuple[dict[str, Any], str]] = [
    *(({"warmup": value}, "warmup=") for value in (2.0, 1.0, -1, -0.1, NAN, INF, "x", True)),
    *(({"weight_decay": value}, "weight_decay=") for value in (-1, NAN, INF, "x", 10**400)),
    *(({"schedule": value}, "schedule=") for value in ("cosin", "Linear", "step", 1)),
    *(({"seeds": value}, "seed") for value in ([-1], [2**32], [0.5], [0, 0], ["a"], [], [NAN])),
    *(({"epochs": value}, "epochs=") for value in (0, -1, 1.5, "x", True)),
    *(({"batch_size": value}, "batch_size=") for value in (0, -8, 1.5)),
    *(({name: value}, f"{name}=") for name in ("rows", "dev_rows", "max_length") for value in (1, 0, -5, 2.5)),
    *(({"holdout": value}, "holdout=") for value in (0.0, 1.0, -0.2, NAN)),
    ({"attention": "flash"}, "attention='flash'"),
    *(({"contender": [{**CONTENDER, "rates": value}]}, "rates=") for value in ([], [0], [-1e-3], [NAN], [INF], ["x"])),
    ({"contender": [{**CONTENDER, "rates": [1e-3, 1e-3]}]}, "one stands there twice"),
    ({"contender": [{**CONTENDER, "rates": [10**400]}]}, "is not a number"),
    *(({"contender": [{**CONTENDER, "pool": value}]}, "pool=") for value in ("max", "own", "gpo")),
    *(({"backbone": [{"model": "a", "dtype": value}]}, "dtype=") for value in ("int8", "float", "fp16", "nonsense")),
    ({"backbone": [{"model": "a", "pool": "own"}]}, "pool='own'"),
    *(({"task": [{"train": "a.csv", "text": "t", "rows": value}]}, "rows=") for value in (1, 0, -3)),
    ({"task": [{"train": "a.csv", "text": "t", "problem": "retrieval"}]}, "retrieval reads pairs"),
    ({"task": [{"train": "a.csv", "text": "t", "video": "v"}]}, "are for kind = retrieval"),
    ({"task": [{"train": "a.csv", "text": "t", "frames": 0}]}, "frames=0"),
    *(({"task": [{"train": "a.csv", "text": "t", "encoding": value}]}, "encoding=") for value in ("x", "hex", "rot13")),
    ({"task": [{"train": "a.csv", "text": "t", "columns": ["a", "a"]}]}, "Every column needs a name of its own"),
    *(({name: []}, f"{name}=[] is empty") for name in ("methods", "seeds", "backbone", "task", "contender")),
    ({"task": [{"train": "a.csv", "text": "t", "columns": []}]}, "columns=[] is empty"),
    *(({"task": [{"train": "a.csv", "text": "t", name: ""}]}, f"{name} is empty") for name in ("train", "dev", "name")),
    ({"task": [{"train": "a.csv", "text": ""}]}, "text is empty"),
    ({"backbone": [{"model": ""}]}, "model is empty"),
    *(({"costs": {name: 0}}, f"{name}=0") for name in ("batch", "length", "repeats")),
    ({"costs": {"warmup": -1}}, "warmup=-1"),
    *(({"backbone": [{"model": "a", "name": name}]}, "a name is a line of text") for name in ("a\nb", " ", "\x1b[1m")),
    ({"contender": [{**CONTENDER, "name": "a\tb"}]}, "a name is a line of text"),
]


@pytest.mark.parametrize(("changes", "said"), BAD, ids=lambda value: str(value)[:60])
def test_what_would_fail_in_every_run_is_refused_before_the_first(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=r"^here") as caught:
        comparison_from(values(**{"contender": [CONTENDER], **changes}), Path(), "here")
    assert said in str(caught.value)


def test_what_was_accepted_makes_settings_of_a_run() -> None:
    asked = comparison(seeds=(0, 2**32 - 1), warmup=0.5, schedule="cosine_epochs", weight_decay=0.1, epochs=7)
    for seed in asked.seeds:
        made = asked.training(Path("out"), 1e-3, seed)
        assert (made.seed, made.learning_rate, made.epochs, made.warmup) == (seed, 1e-3, 7, 0.5)
        assert (made.keep, made.checkpoints, made.weight_decay) == ("last", False, 0.1)


@pytest.mark.parametrize("text", ["a = [" + "[" * 5000, "x = 1\nx = 2", "\x00"])
def test_a_file_that_is_no_toml_is_one_message(tmp_path: Path, text: str) -> None:
    (tmp_path / "study.toml").write_text(text)
    with pytest.raises(ValueError, match=r"study\.toml cannot be read as TOML"):
        comparison_file(tmp_path / "study.toml")


def test_a_home_and_the_present_folder_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "photos"
    folder.mkdir()
    lines = 'output = "~/all.jsonl"\n[[backbone]]\nmodel = "org/name"\n[[task]]\ntrain = "."\nimage = "image"\n'
    (folder / "study.toml").write_text(lines)
    found, results = comparison_file(folder / "study.toml")
    assert results == tmp_path / "all.jsonl"
    assert (found.tasks[0].name, found.tasks[0].train) == ("photos", str(folder))
