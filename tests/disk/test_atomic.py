"""What is written is whole or leaves no trace, lies where it can be written, and is never what is read."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

import sidestep as ss
from sidestep.disk.atomic import OutputError, check_file, check_folder, only_writer, refuse_inputs, same_file, whole
from sidestep.disk.card import CARD
from sidestep.disk.table_files import ENDINGS, write_table
from sidestep.disk.task_folder import CONFIG, WEIGHTS
from sidestep.training.results import write_json
from small_tasks import tokenizer
from tiny import FAMILIES

LONG = "x" * 300


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def no_space(*args: object, **kwargs: object) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- whole or not at all -----------------------------------------------------------------------------------------


def test_a_file_is_replaced_in_one_step_with_the_folders_it_needs(tmp_path: Path) -> None:
    path = tmp_path / "deep" / ("n" * 251 + ".txt")  # the longest name that there can be
    for content in ("old", "new"):
        with whole(path) as beside:
            beside.write_text(content)
            assert not path.exists() or path.read_text() == "old"
        assert files(tmp_path) == {f"deep/{path.name}": content.encode()}
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("existed", [False, True])
@pytest.mark.parametrize("moment", ["write", "sync", "replace"])
def test_a_full_disk_leaves_the_old_file_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, existed: bool
) -> None:
    path = tmp_path / "file.txt"
    if existed:
        path.write_text("old")
    before = files(tmp_path)
    if moment != "write":
        monkeypatch.setattr(os, {"sync": "fsync", "replace": "replace"}[moment], no_space)

    def write() -> None:
        with whole(path) as beside:
            beside.write_text("half of what was to be")
            if moment == "write":
                no_space()

    with pytest.raises(OSError, match="No space left"):
        write()
    assert files(tmp_path) == before


WRITING: dict[str, Callable[[Path], None]] = {
    "results.json": lambda folder: write_json(folder / "results.json", {"a": 1}),
    **{
        f"rows{ending}": lambda folder, ending=ending: write_table(
            Dataset.from_dict({"a": ["x" * 50] * 500}), folder / f"rows{ending}", overwrite=True
        )
        for ending in ENDINGS
    },
    "a task": lambda folder: ss.attach(
        FAMILIES["bert"].model().base_model, ss.ReadConfig(rank=2), head=ss.Classify(num_labels=2)
    ).save_pretrained(folder, overwrite=True),
}


@pytest.mark.parametrize("what", WRITING)
def test_every_writer_survives_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    torch.manual_seed(0)
    WRITING[what](tmp_path)
    before = files(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", no_space)  # at the latest moment all is written beside
        with pytest.raises(OSError, match="No space left"):
            WRITING[what](tmp_path)
    assert files(tmp_path) == before
    WRITING[what](tmp_path)
    assert files(tmp_path).keys() == before.keys()


@pytest.mark.parametrize("moment", range(7))
def test_a_new_task_on_a_full_disk_is_none_or_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    bert = FAMILIES["bert"]
    model = ss.attach(bert.model().base_model, ss.ReadConfig(rank=2), head=ss.Classify(num_labels=2))
    model.extras["processor"] = tokenizer(pad=True)
    replace, left = os.replace, [None] * moment

    def full(*paths: Any) -> None:
        left.pop() if left else no_space()
        replace(*paths)

    monkeypatch.setattr(os, "replace", full)
    with suppress(OSError):
        model.save_pretrained(tmp_path / "task")
    assert not list(tmp_path.rglob(".*"))
    if files(tmp_path):
        assert ss.load(tmp_path / "task", bert.model().base_model).side is not None
    monkeypatch.undo()
    model.save_pretrained(tmp_path / "task", overwrite=True)
    assert {*files(tmp_path / "task")} >= {CONFIG, WEIGHTS, CARD}


# --- where nothing can be written --------------------------------------------------------------------------------


@pytest.mark.parametrize("check", [check_file, check_folder])
@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("file/new", "file is a file, so .*file/new cannot lie in it"),
        ("file/deep/new", "file is a file, so .*file/deep/new cannot lie in it"),
        (LONG, r"cannot be used \(File name too long\)"),
        (f"none/{LONG}/new", r"cannot be used \(File name too long\)"),
        ("null\0byte", "cannot be used"),
        pytest.param("/proc/new", "/proc/new cannot be written", marks=pytest.mark.skipif(
            not Path("/proc").is_dir(), reason="no file system that takes no files"
        )),
    ],
)  # fmt: skip
def test_odd_paths_are_refused(tmp_path: Path, check: Callable[[Path], None], path: str, said: str) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OutputError, match=said):
        check(tmp_path / path)
    assert files(tmp_path) == {"file": b"kept"}


def test_a_folder_is_no_file_and_a_file_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path, Path("."), Path("")):
        with pytest.raises(OutputError, match="is a folder: name a file, such as"):
            check_file(path)
    with pytest.raises(OutputError, match="is a file: choose a folder"):
        check_folder(tmp_path / "file")
    with pytest.raises(OutputError, match="is no plain file"):
        check_file(Path(os.devnull))


def test_what_may_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: object, **kwargs: object) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    # patched, as tests may be run by one who may write everywhere
    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    for check in (check_file, check_folder):
        with pytest.raises(OutputError, match=r"new cannot be written \(Permission denied\): choose another place"):
            check(tmp_path / "new")
    monkeypatch.undo()
    (tmp_path / "file").write_text("kept")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match="file is write-protected"):
        check_file(tmp_path / "file")


def test_places_that_can_be_written_pass_and_stay_untouched(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for path in ("file", "new", "deep/er/new", "deep/../new", "n" * 255, "dangling"):
        check_file(tmp_path / path)
    for path in ("new", "deep/er", ""):
        check_folder(tmp_path / path)
    assert files(tmp_path) == {"file": b"kept"}


# --- no output is an input ---------------------------------------------------------------------------------------


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a file and a folder that are read, each with links to it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("text,label\n")
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    (tmp_path / "photos" / "cat" / "1.png").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "link.csv").symlink_to("rows.csv")
    os.link(tmp_path / "rows.csv", tmp_path / "hard.csv")
    (tmp_path / "album").symlink_to("photos")
    (tmp_path / "other" / "inner").symlink_to(tmp_path / "photos" / "cat")
    (tmp_path / "elsewhere").symlink_to(tmp_path)
    return tmp_path


SPELLINGS = ["rows.csv", "./rows.csv", "other/../rows.csv", "{here}/rows.csv", "link.csv", "hard.csv"]
SPELLINGS += ["elsewhere/rows.csv", "elsewhere/link.csv"]


@pytest.mark.parametrize("read", SPELLINGS)
@pytest.mark.parametrize("written", SPELLINGS)
def test_an_input_is_known_by_every_spelling(inputs: Path, written: str, read: str) -> None:
    paths = [Path(path.format(here=inputs)) for path in (written, read)]
    assert same_file(*paths)
    with pytest.raises(OutputError, match="is read as an input, which the output would replace"):
        refuse_inputs([paths[0]], [paths[1]])


@pytest.mark.parametrize(
    "written",
    [
        "photos/new.csv",
        "photos/cat/1.png",
        "photos/dog/new.png",
        "album/new.csv",
        "other/inner/new.csv",
        "./photos/x/y",
    ],
)
@pytest.mark.parametrize("read", ["photos", "album", "elsewhere/photos", "other/../photos"])
def test_nothing_is_written_into_a_folder_that_is_read(inputs: Path, written: str, read: str) -> None:
    with pytest.raises(OutputError, match="which is read as an input: choose a place outside"):
        refuse_inputs([Path(written)], [Path(read)])


def test_a_folder_that_holds_an_input_is_not_replaced(inputs: Path) -> None:
    for written in ("photos", "album", "elsewhere"):
        with pytest.raises(OutputError, match=r"would be replaced, and the input .*1\.png lies in it"):
            refuse_inputs([Path(written)], [Path("photos/cat/1.png")])


def test_what_is_no_input_may_be_written(inputs: Path) -> None:
    read = [Path("rows.csv"), Path("photos"), Path("org/rows"), Path(LONG)]
    refuse_inputs([Path("new.csv"), Path("photos2"), Path("other/new.csv"), Path("org/rows/new.csv")], read)


# --- one writer --------------------------------------------------------------------------------------------------

HOLDING = """
import sys
from pathlib import Path
from sidestep.disk.atomic import only_writer
with only_writer(Path(sys.argv[1]), Path("it")):
    print("here", flush=True)
    sys.stdin.readline()
"""


def test_a_second_process_is_refused_until_the_first_ends_or_is_killed(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    for end in ("leave", "kill"):
        command = [sys.executable, "-c", HOLDING, str(lock)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdin is not None
            assert process.stdout.readline() == "here\n"
            with (
                pytest.raises(OutputError, match="another process is writing it: try again"),
                only_writer(lock, Path("it")),
            ):
                pass
            process.kill() if end == "kill" else process.stdin.write("\n")
            process.communicate()
        with only_writer(lock, Path("it")):
            pass
