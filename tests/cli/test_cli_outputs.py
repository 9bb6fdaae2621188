"""Where commands write: every one refuses what is read, and places that cannot be written, before any work."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from commands import FAST, refusal, run, succeed
from sidestep.cli import app
from small_tasks import image_backbone, image_folder, reviews, text_backbone, write

STUDY = """
seeds = [0]
epochs = 1
batch_size = 8
costs = false
{output}
[[backbone]]
model = "bert"
[[task]]
name = "reviews"
train = "rows.jsonl"
text = "text"
[[contender]]
method = "probe"
rates = [1e-2]
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a backbone, rows, a task, a bank and a comparison with its results."""
    folder = tmp_path_factory.mktemp("outputs")
    text_backbone(folder / "bert")
    write(folder / "rows.csv", reviews(24))
    write(folder / "rows.jsonl", reviews(24))
    source = ["--backbone", folder / "bert", "--train", folder / "rows.csv", "--text", "text"]
    succeed("train", *source, "--output", folder / "task", *FAST, "--epochs", 1)
    succeed("bank", "add", folder / "bank", "first", folder / "task")
    (folder / "study.toml").write_text(STUDY.format(output=""))
    succeed("compare", folder / "study.toml")
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as the current folder, with links to what is read."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.csv").symlink_to("rows.csv")
    os.link("rows.csv", "hard.csv")
    (tmp_path / "elsewhere").symlink_to(tmp_path)
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    found = (file for file in folder.rglob("*") if file.is_file() and "elsewhere" not in file.parts)
    return {str(file.relative_to(folder)): file.read_bytes() for file in found}


def command(name: str, output: object) -> list[object]:
    """A command that would succeed with another output."""
    rows = ["--data", "rows.csv", "--output", output]
    return {
        "train": ["train", "--backbone", "bert", "--train", "rows.csv", "--text", "text", *FAST, "--output", output],
        "predict": ["predict", "task", *rows],
        "bank run": ["bank", "run", "bank", "--task", "first", *rows],
        "bank add": ["bank", "add", output, "second", "task"],
        "compare": ["compare", "study.toml", "--output", output],
        "report": ["report", "study.jsonl", "--output", output],
        "figures": ["report", "study.jsonl", "--figures", output],
        "demo": ["demo", "--output", output],
    }[name]


FILES = ("predict", "bank run", "compare", "report")
FOLDERS = ("train", "bank add", "figures", "demo")
#: What a path has to end in for a command to look at it.
ENDING = {"predict": ".csv", "bank run": ".csv"}


@pytest.mark.parametrize("name", FILES + FOLDERS)
@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("rows.csv/deep/new{ending}", "rows.csv is a file, so"),
        ("x" * 300 + "{ending}", "cannot be used (File name too long)"),
        ("none/" + "x" * 300 + "/new{ending}", "cannot be used (File name too long)"),
        ("/proc/new{ending}", "cannot be written"),
    ],
)
def test_odd_outputs_are_one_message(place: Path, name: str, output: str, said: str) -> None:
    before = files(place)
    assert said in refusal(*command(name, output.format(ending=ENDING.get(name, ""))))
    assert files(place) == before


@pytest.mark.parametrize("name", FILES + FOLDERS)
@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_output_is_not_the_current_folder(place: Path, name: str, empty: str) -> None:
    before, result = files(place), run(*command(name, empty))
    assert result.exit_code == 2
    assert "it is empty: name a file or folder" in " ".join(result.stderr.replace("│", " ").split())
    assert files(place) == before


@pytest.mark.parametrize("name", FILES)
def test_a_folder_is_no_file(place: Path, name: str) -> None:
    (place / "folder.csv").mkdir()
    assert "folder.csv is a folder: name a file" in refusal(*command(name, "folder.csv"))


@pytest.mark.parametrize("name", FOLDERS)
def test_a_file_is_no_folder(place: Path, name: str) -> None:
    assert "rows.csv is a file" in refusal(*command(name, "rows.csv"))


@pytest.mark.parametrize("name", FILES + FOLDERS)
def test_a_place_without_permission_is_refused(place: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    before = files(place)
    assert "cannot be written (Permission denied)" in refusal(*command(name, f"new{ENDING.get(name, '')}"))
    assert files(place) == before


SPELLINGS = ("rows.csv", "./rows.csv", "bert/../rows.csv", "{here}/rows.csv", "link.csv", "hard.csv")
SPELLINGS += ("elsewhere/rows.csv",)


@pytest.mark.parametrize("name", ["predict", "bank run"])
@pytest.mark.parametrize("output", SPELLINGS)
def test_rows_are_never_replaced_by_predictions(place: Path, name: str, output: str) -> None:
    before = files(place)
    said = refusal(*command(name, output.format(here=place)), "--overwrite")
    assert "is read as an input, which the output would replace" in said
    assert files(place) == before


@pytest.mark.parametrize("output", ["task/results.json", "task/sidestep.json", "bert/config.json", "bert/new.csv"])
def test_neither_the_task_nor_its_backbone_is_replaced_by_predictions(place: Path, output: str) -> None:
    shutil.move("bert", "moved")
    Path("bert").symlink_to("moved")
    before = files(place)
    assert "read as an input" in refusal(*command("predict", output), "--overwrite", "--backbone", "moved")
    assert files(place) == before


def test_predictions_may_lie_beside_a_task(place: Path) -> None:
    for _ in range(2):
        succeed(*command("predict", "task/predictions.csv"), "--overwrite", "--quiet")


def test_a_bank_and_its_backbone_are_not_replaced_by_predictions(place: Path) -> None:
    before = files(place)
    for output in ("bank/first/sidestep.json", "bank/new.csv", f"{place}/elsewhere/bank/new.csv"):
        assert "lies in bank, which is read as an input" in refusal(*command("bank run", output), "--overwrite")
    assert files(place) == before


def test_a_stored_backbone_is_not_replaced_by_predictions(made: Path) -> None:
    # where the task was trained, and with the path that it stores
    before = files(made)
    rows = ["--data", made / "rows.csv", "--output", made / "bert" / "config.json", "--overwrite"]
    for words in (["predict", made / "task"], ["bank", "run", made / "bank", "--task", "first"]):
        assert "bert, which is read as an input: choose a place outside" in refusal(*words, *rows)
    assert files(made) == before


def test_a_task_is_not_trained_into_what_it_is_trained_on(place: Path) -> None:
    image_folder(place / "photos", per_class=4)
    image_backbone(place / "vit")
    (place / "album").symlink_to("photos")
    before = files(place)
    assert "lies in bert, which is read as an input" in refusal(*command("train", "bert"))
    assert "lies in bert, which is read as an input" in refusal(*command("train", "elsewhere/bert/task"))
    photos = ["train", "--backbone", "vit", "--train", "photos", "--image", "image", *FAST]
    for output in ("photos", "./photos/task", "album"):
        assert "lies in photos, which is read as an input" in refusal(*photos, "--output", output, "--overwrite")
    assert files(place) == before


@pytest.mark.parametrize("inside", ["logs/rows.csv", "checkpoints/rows.csv", "results.json"])
def test_a_run_does_not_delete_its_rows(place: Path, inside: str) -> None:
    rows = place / "task" / inside
    rows.parent.mkdir(exist_ok=True)
    rows.write_bytes(Path("rows.csv").read_bytes())
    before = files(place)
    for option in ("--train", "--dev"):
        said = refusal(*command("train", "task"), "--overwrite", option, rows)
        assert "read as an input" in said or "lies in it" in said
    assert files(place) == before


def test_a_task_is_not_copied_into_itself(place: Path) -> None:
    before = files(place)
    for bank in ("task", "./task", "elsewhere/task"):
        assert "lies in task, which is read as an input" in refusal(*command("bank add", bank))
    assert "'..' cannot be a task's name" in refusal("bank", "add", "bank", "..", "task")
    assert "bank is no task folder" in refusal("bank", "add", "bank", "second", "bank")
    assert files(place) == before
    succeed("bank", "add", "bank", "copy", "bank/first")


@pytest.mark.parametrize(
    "output",
    ["study.toml", "./study.toml", "bert/../study.toml", "toml.link", "toml.hard", "rows.jsonl", "bert/config.json"],
)
def test_a_comparison_does_not_write_over_what_it_reads(place: Path, output: str) -> None:
    (place / "toml.link").symlink_to("study.toml")
    os.link("study.toml", "toml.hard")
    for line in (f'output = "{output}"', ""):
        Path("study.toml").write_text(STUDY.format(output=line))
        before = files(place)
        arguments = [] if line else ["--output", output]
        for more in ([], ["--dry-run"], ["--quick"]):
            if line and more == ["--quick"]:
                continue  # which writes to a file of another name
            assert "read as an input" in refusal("compare", "study.toml", *arguments, *more)
        assert files(place) == before


def test_a_comparison_that_is_named_as_its_rows_does_not_write_over_them(place: Path) -> None:
    shutil.copy("study.toml", "rows.toml")
    assert "rows.jsonl is read as an input" in refusal("compare", "rows.toml")
    Path("y-quick.toml").write_text(STUDY.format(output='output = "y.toml"'))
    assert "y-quick.toml is read as an input" in refusal("compare", "y-quick.toml", "--quick")
    flags = ["--backbone", "bert", "--train", "rows.jsonl", "--text", "text", "--output", "rows.jsonl"]
    assert "rows.jsonl is read as an input" in refusal("compare", *flags)


def test_a_report_does_not_write_over_results(place: Path) -> None:
    os.link("study.jsonl", "hard.html")
    before = files(place)
    for output in ("study.jsonl", "./study.jsonl", "hard.html", "elsewhere/study.jsonl"):
        assert "is read as an input" in refusal(*command("report", output))
    assert files(place) == before
    both = ["report", "study.jsonl", "--output", "page", "--figures"]
    for figures in ("page", "page/deep"):
        assert "--output page is a file, so" in refusal(*both, figures)
    assert files(place) == before


def test_a_second_process_on_one_results_file_is_refused(place: Path) -> None:
    before = files(place)
    for output in ("study.jsonl", "./study.jsonl", "elsewhere/study.jsonl"):
        with FileLock(place / ".study.jsonl.lock"):
            said = refusal(*command("compare", output))
        assert f"another process is writing {Path(output)}: try again when it is done" in said
    assert files(place) == before
    succeed(*command("compare", "study.jsonl"))


def test_every_command_that_writes_is_tried_here() -> None:
    """A new option for an output has to be added above."""
    import typer.main

    group = typer.main.get_command(app)
    found: set[str] = set()

    def walk(command: object, name: str) -> None:
        commands: dict[str, object] = getattr(command, "commands", {})
        for inner, each in commands.items():
            walk(each, f"{name} {inner}".strip())
        for parameter in getattr(command, "params", []):
            if {"--output", "--figures"} & set(parameter.opts):
                found.add("figures" if "--figures" in parameter.opts else name)

    walk(group, "")
    assert found | {"bank add"} == {*FILES, *FOLDERS}
