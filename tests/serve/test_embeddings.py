"""Embeddings over HTTP: of texts, images and videos, by the towers of tasks of retrieval."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from datasets import Dataset
from numpy.typing import NDArray
from transformers import ViTImageProcessor

import sidestep as ss
from beside_tasks import beside
from dual_encoders import clip
from served import make_bank, save_task, serving
from sidestep.backbone.frames import FrameProcessor
from sidestep.backbone.load import load_backbone
from sidestep.backbone.processors import PairProcessor
from sidestep.data import Fields, videos
from sidestep.data.pairs import CollatePairs, captioned, encode_pairs
from sidestep.kinds import kinds
from sidestep.serve import embeddings
from sidestep.serve.settings import ServeSettings
from small_tasks import tokenizer
from small_videos import video

TEXTS = ["a good film", "bad", "a very very fine book"]
FRAMES = 4
TASKS = {"pictures": {"image": "photo", "text": "caption"}, "clips": {"video": "clip", "text": "caption"}}
CLOSE = 1e-6


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files: images, and videos with fewer frames than are read, as many, and more."""
    folder = tmp_path_factory.mktemp("embeddings")
    for number, row in enumerate(beside(folder / "made", len(TEXTS))):
        Path(row["picture"]).rename(folder / f"{number}.png")
        video(folder / f"{number}.mp4", (2, FRAMES, 9)[number])
    return folder


@pytest.fixture(scope="module")
def url(place: Path) -> Iterator[str]:
    """A server with a task of each kind that compares rows, of images and of videos."""
    clip().save_pretrained(place / "clip")
    images = ViTImageProcessor(size={"height": 16, "width": 16})
    for seed, (name, columns) in enumerate(TASKS.items()):
        own = FrameProcessor(images, FRAMES) if "video" in columns else images
        processor = PairProcessor(own, tokenizer(pad=True))
        head = kinds()["retrieval"].blank_head(2)
        how: Any = {"seed": seed, "processor": processor}
        backbone = load_backbone(place / "clip")
        save_task(place / name, backbone, ss.ReadConfig(rank=4), head, "retrieval", (), columns, **how)
    with serving(make_bank(place, place / "bank", [*TASKS]), place / "clip", ServeSettings(max_rows=FRAMES)) as url:
        yield url


def coded(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode()


def vectors(response: httpx.Response) -> NDArray[Any]:
    assert response.status_code == 200, response.text
    return np.array([row["embedding"] for row in response.json()["data"]])


def embedded(url: str, model: str, rows: Any, **how: Any) -> NDArray[Any]:
    return vectors(httpx.post(f"{url}/v1/embeddings", json={"model": model, "input": rows, **how}, timeout=60))


def files(place: Path, field: str) -> list[Path]:
    return sorted(place.glob({"image": "*.png", "video": "*.mp4"}[field]))


def expected(place: Path, name: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Of images or videos and of texts, as `sidestep predict` compares them."""
    (field, column), _ = TASKS[name].items()
    model = ss.load(place / name)
    rows = Dataset.from_dict({column: [str(file) for file in files(place, field)], "caption": TEXTS})
    fields = Fields(**TASKS[name])
    processor = model.extras["processor"]
    encoded, _ = encode_pairs(captioned(rows, fields), fields, processor, None)
    batch = CollatePairs(processor.text)([encoded[number] for number in range(len(rows))])
    with torch.no_grad():
        found = model(**{name: value for name, value in batch.items() if name not in ("labels", "length")})
    return found.image_embeds.numpy(), found.text_embeds.numpy()


@pytest.mark.parametrize(("name", "field"), [("pictures", "image"), ("clips", "video")])
def test_texts_and_files_are_embedded_as_predict_compares_them(url: str, place: Path, name: str, field: str) -> None:
    of_files, of_texts = expected(place, name)
    assert np.abs(of_files - of_files[0])[1:].max() > 1e-3  # the files differ
    first, *others = [{field: coded(file)} for file in files(place, field)]
    found = embedded(url, name, [TEXTS[0], first, {"text": TEXTS[1]}, *others, TEXTS[2]])
    assert found[[0, 2, 5]] == pytest.approx(of_texts, abs=CLOSE)
    assert found[[1, 3, 4]] == pytest.approx(of_files, abs=CLOSE)
    parts = [(field, (file.name, file.read_bytes())) for file in files(place, field)]
    form = httpx.post(f"{url}/v1/embeddings", data={"model": name}, files=parts, timeout=60)
    assert vectors(form) == pytest.approx(of_files, abs=CLOSE)
    with ss.Client(url) as client:
        assert client.embeddings({field: files(place, field)[1]}, name)[0] == pytest.approx(of_files[1], abs=CLOSE)


def test_a_task_of_retrieval_predicts_nothing_of_a_row(url: str) -> None:
    told = httpx.post(f"{url}/v1/predict", json={"task": "pictures", "inputs": "a"}, timeout=60).json()
    assert told["type"].endswith("wrong-endpoint")
    assert "/v1/embeddings" in told["detail"]


@pytest.mark.parametrize(
    ("model", "row", "says"),
    [
        ("pictures", {"image": base64.b64encode(b"no picture").decode()}, "cannot be read"),
        ("pictures", {"image": "/etc/passwd"}, "base64"),
        ("pictures", {"video": "AAAA"}, "the row has 'video', and the task embeds rows of 'text' or of 'image'"),
        ("clips", {"video": base64.b64encode(b"no video").decode()}, "cannot be read"),
        ("clips", {"video": base64.b64encode(b"ffconcat version 1.0\nfile 0.mp4\n").decode()}, "cannot be read"),
    ],
)
def test_a_row_that_cannot_be_embedded_is_told_by_its_number(
    url: str, place: Path, monkeypatch: pytest.MonkeyPatch, model: str, row: dict[str, str], says: str
) -> None:
    """A list of further files is refused too, even of files that are there."""
    monkeypatch.chdir(place)
    refused = httpx.post(f"{url}/v1/embeddings", json={"model": model, "input": ["a", row]}, timeout=60)
    told = refused.json()
    assert (refused.status_code, told["type"], told["row"]) == (422, "urn:sidestep:problem:bad-row", 1)
    assert says in told["detail"]


@pytest.mark.parametrize("row", [{}, {"image": "AAAA", "text": "a"}, {"audio": "AAAA"}, {"image": 3}, []])
def test_a_body_of_another_form_is_refused(url: str, row: Any) -> None:
    refused = httpx.post(f"{url}/v1/embeddings", json={"model": "pictures", "input": row}, timeout=60)
    assert (refused.status_code, refused.json()["type"]) == (422, "urn:sidestep:problem:invalid-request")


@pytest.mark.parametrize(("limit", "value"), [("VIDEO_PIXELS", 9 * 32 * 32 - 1), ("PIXELS", 32 * 32 - 1)])
def test_a_video_of_too_many_pixels_is_not_decoded(
    url: str, place: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    monkeypatch.setattr(embeddings, limit, value)
    monkeypatch.setattr(embeddings, "evenly", lambda cell, count: pytest.fail("it is decoded"))
    body = {"model": "clips", "input": {"video": coded(place / "2.mp4")}}
    refused = httpx.post(f"{url}/v1/embeddings", json=body, timeout=60)
    assert refused.status_code == 422
    assert "9 frames of 32 x 32 pixels" in refused.json()["detail"]


def test_frames_that_are_larger_than_a_header_says_are_not_decoded(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(videos, "FRAME_PIXELS", 32 * 32 - 1)
    with pytest.raises(ss.data.DataError, match="cannot be read"):
        videos.VIDEOS.decode({"bytes": (place / "0.mp4").read_bytes(), "path": None}, 1)
