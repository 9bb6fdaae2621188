"""Rows of a picture and a text: their tokens, batches of several shapes, and what is refused, with its row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from datasets import Dataset
from transformers import CLIPImageProcessor, CLIPProcessor, MllamaImageProcessor, MllamaProcessor

from pictured_tasks import CHAT, MARK, PICTURE, llava_backbone, llava_processor, pictured, qwen_backbone, tokenizer
from sidestep.backbone.processors import load_processor
from sidestep.backbone.source import LoadError
from sidestep.backbone.vision_language import VisionLanguageProcessor
from sidestep.data import CollateWritten, DataError, Fields, decoding, encode_pictured
from sidestep.kinds.prepare import TaskData, prepare
from sidestep.kinds.running import prompt_collator
from small_tasks import image_backbone, text_backbone

FIELDS = Fields(text="prompt", image="picture", label="answer")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both backbones."""
    folder = tmp_path_factory.mktemp("pictured")
    llava_backbone(folder / "llava")
    qwen_backbone(folder / "qwen")
    return folder


@pytest.fixture(scope="module")
def rows(place: Path) -> list[dict[str, Any]]:
    return pictured(place / "pictures", 9)


def prepared(place: Path, rows: list[dict[str, Any]], name: str = "qwen", kind: str = "lm", **how: Any) -> TaskData:
    found = Dataset.from_list(rows)
    return prepare(found, found, FIELDS, load_processor(place / name, pictures=True), kind=kind, **how)


def refused(place: Path, rows: list[dict[str, Any]], name: str = "qwen", **how: Any) -> str:
    with pytest.raises(DataError) as caught:
        prepared(place, rows, name, **how)
    return str(caught.value)


def test_which_tensors_are_the_pictures_is_found_by_looking(place: Path) -> None:
    llava, qwen = (load_processor(place / name, pictures=True) for name in ("llava", "qwen"))
    assert (llava.parts.types, llava.parts.picture, llava.parts.closes) == ({}, ("pixel_values",), False)
    assert (qwen.parts.types, qwen.parts.closes) == ({"mm_token_type_ids": 0}, True)
    assert qwen.parts.picture == ("pixel_values", "image_grid_thw")


def test_a_row_is_what_transformers_makes_of_it(place: Path, rows: list[dict[str, Any]]) -> None:
    data = prepared(place, rows)
    for number in (0, 4):
        with PIL.Image.open(rows[number]["picture"]) as picture:
            content = [{"type": "image", "image": picture}, {"type": "text", "text": rows[number]["prompt"]}]
            expected = data.processor.whole.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        found = prompt_collator(data.processor, "lm")([data.train[number]])
        assert found.pop("labels")[0].tolist() == data.train[number]["labels"]
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_batch_of_other_shapes_has_a_loss_on_the_answers_alone(place: Path, rows: list[dict[str, Any]]) -> None:
    data = prepared(place, rows)
    batch = data.collate([data.train[number] for number in range(6)])
    cells = batch["image_grid_thw"].prod(1)
    assert len(set(cells.tolist())) > 1
    assert batch["pixel_values"].shape[0] == cells.sum()
    assert torch.equal((batch["input_ids"] == PICTURE).sum(1), cells // 4)
    assert torch.equal(batch["mm_token_type_ids"], (batch["input_ids"] == PICTURE).long())
    for row, (labels, mask) in enumerate(zip(batch["labels"], batch["attention_mask"], strict=True)):
        answer = data.train[row]["labels"]
        assert labels[labels != -100].tolist() == answer
        assert labels[: int(mask.sum())][-len(answer) :].tolist() == answer


def test_an_answers_types_are_those_that_the_processor_says() -> None:
    """PaliGemma's tokens of an answer are of type 1, and its prompt's of type 0."""
    collate = CollateWritten(llava_processor_with({"token_type_ids": 1}), kind="lm", padding_side="right")
    batch = collate(
        [
            {"input_ids": [PICTURE, 10], "token_type_ids": [0, 0], "labels": [11, 1]},
            {"input_ids": [PICTURE], "token_type_ids": [0], "labels": [11]},
        ]
    )
    assert batch["token_type_ids"].tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]]


def llava_processor_with(types: dict[str, int]) -> VisionLanguageProcessor:
    found = VisionLanguageProcessor.of(llava_processor())
    return replace(found, parts=found.parts._replace(types=types))


def test_pictures_are_decoded_when_they_are_read(place: Path, rows: list[dict[str, Any]]) -> None:
    processor = load_processor(place / "llava", pictures=True)
    encoded = encode_pictured(Dataset.from_list(rows), FIELDS, processor, None, None)
    assert encoded[0]["pixel_values"]["path"] == rows[0]["picture"]
    read = decoding(encoded)
    assert isinstance(read[0]["pixel_values"], PIL.Image.Image)
    assert read["length"][:] == [4 + len(row["prompt"].split()) for row in rows]


def test_the_processor_is_saved_and_loaded(place: Path, tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    for name in ("llava", "qwen"):
        processor = load_processor(place / name, pictures=True)
        processor.save_pretrained(tmp_path / name)
        again = load_processor(tmp_path / name)
        assert isinstance(again, VisionLanguageProcessor)
        with PIL.Image.open(rows[1]["picture"]) as picture:
            assert again.tokens("which colour ?", picture) == processor.tokens("which colour ?", picture)
            pixels = processor.pixels([picture])
            assert all(torch.equal(again.pixels([picture])[each], tensor) for each, tensor in pixels.items())


def test_without_pictures_such_a_model_gives_its_tokenizer(place: Path) -> None:
    assert not isinstance(load_processor(place / "llava"), VisionLanguageProcessor)


# --- bad input ---------------------------------------------------------------------------------------------


def test_columns_that_the_model_does_not_read(place: Path, tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    found = Dataset.from_list(rows)

    def said(processor: Any, **columns: str) -> str:
        with pytest.raises(DataError) as caught:
            prepare(found, found, Fields(**columns, label="answer"), processor, kind="single")
        return str(caught.value)

    both = {"text": "prompt", "image": "picture"}
    text = load_processor(text_backbone(tmp_path / "bert"), pictures=True)
    image = load_processor(image_backbone(tmp_path / "vit"), pictures=True)
    llava = load_processor(place / "llava", pictures=True)
    assert "reads text (TokenizersBackend), but 'picture' is named as images: say --text" in said(text, image="picture")
    assert "reads images (ViTImageProcessor), but 'prompt' is named as text: say --image" in said(image, text="prompt")
    assert "'prompt' is named as text and 'picture' as images. Leave --image out" in said(text, **both)
    assert "'prompt' is named as text and 'picture' as images. Leave --text out" in said(image, **both)
    alone = "reads a picture with a text (LlavaProcessor), but 'picture' alone is named: name the other column too"
    assert f"{alone} (--text)" in said(llava, image="picture")
    assert "'prompt' alone is named: name the other column too (--image)" in said(llava, text="prompt")
    assert "text2='answer' with image='picture': beside a picture one text is read" in said(
        llava, **both, text2="answer"
    )
    with pytest.raises(DataError, match="kind='text2text' is for texts, but 'picture' is named as images"):
        prepare(found, found, FIELDS, llava, kind="text2text")


def test_what_does_not_go_with_pictures_and_texts(place: Path, rows: list[dict[str, Any]]) -> None:
    assert "augment='flip' with pictures and texts" in refused(place, rows, augment="flip")
    assert "separator=' ', but Qwen2VLProcessor itself puts something between" in refused(place, rows, separator=" ")
    data = prepared(place, rows, "llava", separator=" ")
    assert data.separators.answer == " "


def test_a_list_of_pictures_a_row(place: Path, rows: list[dict[str, Any]]) -> None:
    several = [{**row, "picture": [row["picture"]] * 2} for row in rows]
    assert "column 'picture' holds lists, and a row is read with one image" in refused(place, several)


def test_rows_whose_picture_or_text_is_amiss(place: Path, tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    def at(place_: int, **change: Any) -> list[dict[str, Any]]:
        return [{**row, **(change if number == place_ else {})} for number, row in enumerate(rows)]

    said = refused(place, at(2, prompt=f"{MARK} which colour ?"))
    assert f"text column 'prompt' holds '{MARK}', which stands for a picture, in row 3 (the first is 1)" in said
    assert "image column 'picture' has no image in row 2" in refused(place, at(1, picture=None))
    assert "1 of 9 images of column 'picture' are not there" in refused(place, at(1, picture="none.png"))
    (tmp_path / "text.png").write_text("no picture")
    assert "text.png' in row 6 cannot be read" in refused(place, at(5, picture=str(tmp_path / "text.png")))
    PIL.Image.new("RGB", (2000, 8)).save(tmp_path / "long.png")
    said = refused(place, at(3, picture=str(tmp_path / "long.png")))
    assert "Qwen2VLProcessor cannot read picture and text of row 4 (the first is 1). It says: absolute aspect" in said


def test_a_row_that_is_too_long_is_refused_and_never_cut(place: Path, rows: list[dict[str, Any]]) -> None:
    long = [{**row, "prompt": "very " * (50 if number in (1, 2) else 2)} for number, row in enumerate(rows)]
    said = refused(place, long)  # the model has 48 positions, of which an answer and its end take 2
    assert "picture and text have more than 46 tokens, up to 5" in said
    assert "in rows 2, 3 (the first is 1): they are never cut" in said
    assert "picture and text have more than 6 tokens" in refused(place, rows, max_length=8)


def test_processors_that_do_not_read_one_picture_with_one_text(tmp_path: Path) -> None:
    mark = {"height": 8, "width": 8}
    words = tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<|image|>", "<|python_tag|>"]})
    with pytest.raises(LoadError, match="MllamaProcessor gives cross_attention_mask, which is neither the picture's"):
        VisionLanguageProcessor.of(MllamaProcessor(MllamaImageProcessor(size=mark), words))
    with pytest.raises(LoadError, match="CLIPProcessor has no text that stands for a picture"):
        VisionLanguageProcessor.of(CLIPProcessor(CLIPImageProcessor(size=mark, crop_size=mark), tokenizer()))
    with pytest.raises(LoadError, match="LlavaProcessor cannot read one picture with one text"):
        VisionLanguageProcessor.of(llava_processor(chat=CHAT.replace(MARK, f"{MARK} {MARK}")))


def test_a_folder_without_the_processor_is_refused(place: Path, tmp_path: Path) -> None:
    llava_backbone(tmp_path / "llava")
    (tmp_path / "llava" / "processor_config.json").unlink()
    with pytest.raises(LoadError, match="has no processor of pictures and texts: looked for preprocessor_config"):
        load_processor(tmp_path / "llava", pictures=True)
