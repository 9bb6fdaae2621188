"""Every kind of task over HTTP, on each sort of backbone that has it. A new kind is covered once it is registered."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import ViTImageProcessor

import sidestep as ss
from beside_tasks import beside, vilt_backbone
from dual_encoders import clip
from pictured_tasks import CHAT, llava_backbone, pictured
from served import CLOSE, TAGS, close, make_bank, same, save_task, serving
from sidestep.backbone.load import load_backbone
from sidestep.backbone.processors import PairProcessor, load_processor
from sidestep.kinds import kinds
from sidestep.kinds.base import TaskKind
from sidestep.serve.cells import FILES
from sidestep.tasks.predict import predict
from small_sounds import sound_folder, waves
from small_tasks import image_backbone, image_folder, reviews, text_backbone, tokenizer
from span_tasks import asked
from written_tasks import answered, llama_backbone, t5_backbone

ROWS = 4
QUESTION = {"text": "question", "text2": "context"}
BROKEN = base64.b64encode(b"no such file").decode()
WRITING = {"generation": {"max_new_tokens": 4, "num_beams": 1}}


@dataclass(frozen=True)
class Sort:
    """A sort of backbone.

    Attributes:
        save: a tiny one and its processor into a folder.
        takes: whether a kind of task is tried on it.
        columns: that its tasks read.
        rows: with files in a folder.
        head: of its own, which tasks train and read. False: Sidestep's.
    """

    save: Callable[[Path], object]
    takes: Callable[[TaskKind], bool]
    columns: dict[str, str]
    rows: Callable[[Path], list[dict[str, Any]]]
    head: Any = False

    @property
    def file(self) -> str | None:
        """The column of files, if there is one."""
        return next((self.columns[field] for field in FILES if field in self.columns), None)


def of_a_row(kind: TaskKind) -> bool:
    return not (kind.writes or kind.dual or kind.pictured or kind.of_tokens)


def of_a_text(kind: TaskKind) -> bool:
    return of_a_row(kind) or kind.of_tokens


def of_a_picture_and_a_text(kind: TaskKind) -> bool:
    return of_a_row(kind) or kind.pictured


def clip_backbone(folder: Path) -> None:
    clip().save_pretrained(folder)
    PairProcessor(ViTImageProcessor(size={"height": 16, "width": 16}), tokenizer(pad=True)).save_pretrained(folder)


def texts(folder: Path) -> list[dict[str, Any]]:
    return [{**review, **question} for review, question in zip(reviews(ROWS, 3), asked(ROWS, 3), strict=True)]


def files(made: Path, column: str) -> list[dict[str, Any]]:
    return [{column: str(file)} for file in sorted(made.glob("*/*"))[:ROWS]]


SORTS = {
    "bert": Sort(text_backbone, of_a_text, {"text": "text"}, texts),
    "vit": Sort(
        image_backbone, of_a_row, {"image": "image"}, lambda folder: files(image_folder(folder / "made", 2), "image")
    ),
    "wav2vec2": Sort(
        waves, of_a_row, {"audio": "audio"}, lambda folder: files(sound_folder(folder / "made", 2), "audio")
    ),
    "vilt": Sort(
        vilt_backbone,
        of_a_picture_and_a_text,
        {"image": "picture", "text": "question"},
        lambda folder: beside(folder / "made", ROWS),
    ),
    "llava": Sort(
        lambda folder: llava_backbone(folder, chat=CHAT),
        lambda kind: kind.writes == "lm",
        {"image": "picture", "text": "prompt"},
        lambda folder: pictured(folder / "made", ROWS),
    ),
    "clip": Sort(
        clip_backbone,
        lambda kind: of_a_picture_and_a_text(kind) and isinstance(kind.blank_head(len(TAGS)), ss.Classify),
        {"image": "picture", "text": "question"},
        lambda folder: beside(folder / "made", ROWS),
    ),
    "t5": Sort(t5_backbone, lambda kind: kind.writes == "text2text", {"text": "text"}, lambda folder: answered(ROWS)),
    "llama": Sort(llama_backbone, lambda kind: kind.writes == "lm", {"text": "text"}, lambda folder: answered(ROWS)),
    **{
        f"own head of {name}": Sort(
            text_backbone, lambda kind, name=name: kind.name == name, {"text": "text"}, texts, head
        )
        for name, head in {"single": "rows", "tokens": "tokens", "spans": "spans"}.items()
    },
}
CASES = [(sort, name) for sort, of in SORTS.items() for name, kind in kinds().items() if of.takes(kind)]


@dataclass(frozen=True)
class Served:
    """A server on tasks of all kinds that a sort of backbone has.

    Attributes:
        url: of the server.
        tasks: folder of the tasks' folders.
        rows: with paths of their files, as `sidestep predict` reads them.
        sent: the same with files in base64.
        file: the column of files. None: rows have none.
    """

    url: str
    tasks: Path
    rows: list[dict[str, Any]]
    sent: list[dict[str, Any]]
    file: str | None


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Served]]:
    """A server on each sort of backbone, which is started once."""
    with ExitStack() as running:
        yield cache(lambda name: running.enter_context(started(SORTS[name], tmp_path_factory.mktemp("sort"))))


@contextmanager
def started(sort: Sort, place: Path) -> Iterator[Served]:
    sort.save(place / "backbone")
    chosen = [kind for kind in kinds().values() if sort.takes(kind)]
    for seed, kind in enumerate(chosen):
        columns = QUESTION if kind.name == "spans" else sort.columns
        classes = len(TAGS) if sort.head and sort.head != "spans" else None
        backbone = load_backbone(place / "backbone", writes=kind.writes, head=sort.head, num_labels=classes)
        head = None if kind.writes or sort.head else kind.blank_head(len(TAGS))
        names = TAGS if classes or hasattr(head, "num_labels") else ()
        processor = load_processor(place / "backbone", pictures="image" in columns)
        more = WRITING if kind.writes else {}
        method = ss.ReadConfig(rank=4)
        save_task(
            place / kind.name, backbone, method, head, kind.name, names, columns, seed=seed, processor=processor, **more
        )
    read = [name for columns in (sort.columns, QUESTION) for name in columns.values()]
    rows = [{name: row[name] for name in read if name in row} for row in sort.rows(place)]
    sent = [{**row, sort.file: coded(row[sort.file])} if sort.file else row for row in rows]
    with serving(make_bank(place, place / "bank", [kind.name for kind in chosen]), place / "backbone") as url:
        yield Served(url, place, rows, sent, sort.file)


def coded(path: str) -> str:
    return base64.b64encode(Path(path).read_bytes()).decode()


def called(url: str, **how: Any) -> list[dict[str, Any]]:
    response = httpx.post(f"{url}/v1/predict", timeout=60, **how)
    assert response.status_code == 200, response.text
    return response.json()["results"]


def test_every_kind_is_tried() -> None:
    assert {name for _, name in CASES} | {name for name, kind in kinds().items() if kind.dual} == {*kinds()}


@pytest.mark.parametrize(("sort", "kind"), CASES)
def test_a_kind_answers_as_predict_does(serve: Callable[[str], Served], sort: str, kind: str) -> None:
    """All rows in one call within rounding, and a row alone to the bit."""
    served = serve(sort)
    model = ss.load(served.tasks / kind)
    table = predict(model, served.rows)
    found = called(served.url, json={"task": kind, "inputs": served.sent})
    for place, row in enumerate(found):
        same(row[kind], table, place, served.rows[0], within=CLOSE)
    [alone] = called(served.url, json={"task": kind, "inputs": served.sent[:1]})
    same(alone[kind], predict(model, served.rows[:1]), 0, served.rows[0], within=0)


@pytest.mark.parametrize("sort", [name for name, sort in SORTS.items() if sort.file])
def test_files_come_in_forms_and_a_broken_one_leaves_the_others_alone(
    serve: Callable[[str], Served], sort: str
) -> None:
    served = serve(sort)
    assert served.file is not None
    names = [name for name in kinds() if (served.tasks / name).exists()]
    expected = called(served.url, json={"tasks": names, "inputs": served.sent})
    fields = [("tasks", (None, ",".join(names)))]
    texts = [(name, (None, cell)) for row in served.rows for name, cell in row.items() if name != served.file]
    parts = [(served.file, (Path(row[served.file]).name, Path(row[served.file]).read_bytes())) for row in served.rows]
    assert called(served.url, files=[*fields, *texts, *parts]) == expected
    found = called(served.url, json={"tasks": names, "inputs": [*served.sent, {**served.sent[0], served.file: BROKEN}]})
    for name in names:
        *good, bad = (row[name] for row in found)
        assert bad["error"]["type"].endswith("bad-row"), name
        for answer, own in zip(good, expected, strict=True):
            close(answer, own[name], CLOSE)


def test_a_backbone_that_writes_gives_no_embeddings(serve: Callable[[str], Served]) -> None:
    refused = httpx.post(f"{serve('t5').url}/v1/embeddings", json={"model": "backbone", "input": "a"}, timeout=60)
    assert (refused.status_code, refused.json()["type"]) == (422, "urn:sidestep:problem:wrong-endpoint")
