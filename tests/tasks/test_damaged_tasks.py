"""A damaged task is refused with a `TaskError`, or says what it said before: no other error, no other label."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import damaged_tasks as damaged
import sidestep as ss
from sidestep.backbone.source import LoadError
from sidestep.disk import task_fields, task_folder
from sidestep.disk.task_folder import CONFIG, WEIGHTS, DamagedTask, TaskError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return damaged.make_task(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def before(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same task without the newer checksums."""
    task = Path(shutil.copytree(made, tmp_path_factory.mktemp("before") / "task"))
    damaged.as_before(task)
    return task


@pytest.fixture(scope="module")
def right(made: Path) -> damaged.Said:
    return damaged.said(made)


@pytest.fixture
def task(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "task"))


@pytest.mark.filterwarnings("ignore")  # a damaged tokenizer may warn before it is refused
@pytest.mark.parametrize("kind", damaged.DAMAGES)
@settings(max_examples=settings().max_examples // 2)
@given(data=st.data())
def test_each_damage_is_refused_or_changes_nothing(
    made: Path, right: damaged.Said, kind: str, data: st.DataObject
) -> None:
    damage = data.draw(damaged.DAMAGES[kind](damaged.files_of(made)))
    with damaged.damaged(made, damage) as copy:
        found, error = damaged.outcome(copy, right)
    assert found in ("TaskError", "loaded right"), error


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", damaged.DAMAGES)
@settings(max_examples=settings().max_examples // 4)
@given(data=st.data())
def test_a_damaged_task_without_the_newer_checksums_is_refused_by_name_or_loaded(
    before: Path, kind: str, data: st.DataObject
) -> None:
    damage = data.draw(damaged.DAMAGES[kind](damaged.files_of(before)))
    # an altered name of the backbone is not known to be altered
    with damaged.damaged(before, damage) as copy, suppress(TaskError, LoadError, ss.UnsupportedBackbone):
        task_folder.inspect_task(copy)
        ss.load(copy)


def values(config: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Each value below a config, with its dotted name and what holds it."""
    pairs = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    for key, value in pairs:
        yield f"{name}{key}", config, key
        yield from values(value, f"{name}{key}.")


@pytest.mark.parametrize("other", [{"zork": [1]}, [2.5], "zork", True, 10**30], ids=str)
def test_each_covered_value_stands_under_the_checksum(task: Path, right: damaged.Said, other: Any) -> None:
    text = (task / CONFIG).read_text(encoding="utf-8")
    for number, (name, _, _) in enumerate(values(json.loads(text))):
        config = json.loads(text)
        _, part, key = list(values(config))[number]
        part[key] = other
        (task / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        if name.split(".")[0] not in task_fields.FREE:
            with pytest.raises(TaskError, match="sidestep"):
                task_folder.read(task)
        else:
            assert damaged.outcome(task, right)[0] in ("TaskError", "loaded right"), name


@pytest.mark.parametrize("name", [*task_fields.COVERED, "config_sha256", "files"])
def test_a_lost_entry_is_missed(task: Path, name: str) -> None:
    config = json.loads((task / CONFIG).read_text(encoding="utf-8"))
    del config[name]
    (task / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(TaskError, match=r"lacks|states no format|was altered|labels are null"):
        task_folder.inspect_task(task)
    with pytest.raises(TaskError, match=r"lacks|states no format|was altered|labels are null"):
        ss.load(task)


def test_what_is_free_to_change_may_change(task: Path, right: damaged.Said) -> None:
    config = json.loads((task / CONFIG).read_text(encoding="utf-8"))
    (task / WEIGHTS).rename(task / "weights.safetensors")
    config |= {
        "scores": {"accuracy": 0.5},
        "sidestep": "9.9",
        "versions": {},
        "files": {"weights": "weights.safetensors", "processor": "processor"},
    }
    (task / CONFIG).write_text(json.dumps(config, sort_keys=True), encoding="utf-8")
    (task / "README.md").unlink()
    (task / "processor" / ".DS_Store").write_bytes(b"\0")
    assert damaged.said(task) == right
    assert ss.load(task).extras["scores"] == {"accuracy": 0.5}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("backbone.id", 5, r"backbone\.id is 5, but it must be a text"),
        ("backbone.library", "zork", r'backbone\.library is "zork", but it must be "transformers" or "timm"'),
        ("backbone.digest.exact", "ab", r'exact is "ab", but it must be 64 hexadecimal digits'),
        ("backbone.digest", {}, r"lacks backbone\.digest\.dtype, backbone\.digest\.exact"),
        ("backbone.config.zork", 1, r'backbone\.config has no entry "zork": it has problem_type'),
        ("attach.checkpoint", "early", r'attach\.checkpoint is "early", but it must be "late" or null'),
        ("attach", None, r"attach is null, but it must be an object"),
        ("method.config.rank", "2", "ReadConfig: rank='2', but it must be a whole number"),
        ("method.config.rank", True, "ReadConfig: rank=True, but it must be a whole number"),
        ("method.config.scale", None, "ReadConfig: scale=None, but it must be a finite number"),
        ("head.labels", ["a", "b", 3], r'labels are .*, but head\.labels are \["a", "b", 3\]'),
        ("head.num_labels", [3], r"Classify: num_labels=\[3\], but it must be a whole number"),
        ("labels", ["a", "b", 3], r"labels is .*, but it must be a list of which each is a text or null"),
        ("preprocessing.max_length", 0, r"max_length is 0, but it must be a whole number of at least 1 or null"),
        ("preprocessing.fields", {"text": 1}, r'preprocessing\.fields is \{"text": 1\}, but it must be an object'),
        ("files.weights", "/etc/passwd", r"must be the name of a file inside the task's folder"),
        ("files.weights", "w" * 300, r"must be the name of a file inside the task's folder"),
        ("files.processor", "a\0b", r"must be the name of a file inside the task's folder"),
        ("trained", "all", r'trained is "all", but it must be a list'),
        ("versions", 3, r"versions is 3, but it must be an object"),
        ("format", 0, r"format is 0, but it must be a whole number of at least 1"),
    ],
)
def test_a_value_is_named_with_what_it_may_be_even_without_a_checksum(
    task: Path, name: str, value: Any, message: str
) -> None:
    damaged.as_before(task)
    config = json.loads((task / CONFIG).read_text(encoding="utf-8"))
    *parents, key = name.split(".")
    part = config
    for parent in parents:
        part = part[parent]
    part[key] = value
    (task / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(TaskError, match=message):
        ss.load(task)


@pytest.mark.parametrize("deep", [150, 100_000])
@pytest.mark.parametrize("key", ["scores", "zork"])
def test_deep_values_are_refused(task: Path, deep: int, key: str) -> None:
    text = (task / CONFIG).read_text(encoding="utf-8").rstrip().removesuffix("}")
    (task / CONFIG).write_text(f'{text}, "{key}": {"[" * deep + "]" * deep}}}', encoding="utf-8")
    with pytest.raises(DamagedTask, match=r"sidestep\.json cannot be read"):
        task_folder.read_config(task)


def test_deep_values_are_not_written(task: Path, tmp_path: Path) -> None:
    model, deep = ss.load(task), []
    for _ in range(120):
        deep = [deep]
    with pytest.raises(TaskError, match="scores cannot be stored: its lists and dictionaries lie more than 99 deep"):
        model.save_pretrained(tmp_path / "new", scores={"a": deep})
    model.extras["preprocessing"] = {"a": "\ud83d"}
    with pytest.raises(TaskError, match="preprocessing cannot be stored"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("how", ["changed", "added", "lost", "all lost", "a file"])
def test_the_processors_files_stand_under_a_checksum(task: Path, how: str) -> None:
    folder = task / "processor"
    if how == "changed":
        text = (folder / "tokenizer.json").read_text()
        (folder / "tokenizer.json").write_text(text.replace('"the"', '"she"'))
    elif how == "added":
        (folder / "special_tokens_map.json").write_text('{"sep_token": "the"}')
    elif how == "lost":
        (folder / "tokenizer_config.json").unlink()
    else:
        shutil.rmtree(folder)
        if how == "a file":
            folder.write_text("x")
    with pytest.raises(DamagedTask, match="processor"):
        ss.load(task)


def test_a_processor_that_lies_there_is_not_mixed_with_a_new_one(task: Path, right: damaged.Said) -> None:
    model = ss.load(task)
    (task / CONFIG).unlink()  # as an interrupted first save leaves it
    (task / "processor" / "added_tokens.json").write_text('{"zork": 99}')
    model.save_pretrained(task)
    assert damaged.said(task) == right


def test_what_cannot_be_read_again_is_not_saved(task: Path, tmp_path: Path) -> None:
    model = ss.load(task)
    object.__setattr__(model.settings.method, "rank", "2")
    with pytest.raises(TaskError, match="rank='2', but it must be a whole number"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
