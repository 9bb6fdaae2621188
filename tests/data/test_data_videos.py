"""Videos: which frames are taken, of files and of folders, and what is said of broken ones."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset
from transformers import ViTImageProcessor

from sidestep.backbone.frames import FrameProcessor
from sidestep.backbone.pixels import ImageTransform
from sidestep.backbone.processors import PairProcessor, load_processor
from sidestep.data import Augmentation, DataError, DataWarning, Fields, TableOptions, read
from sidestep.data.contents import content_hash
from sidestep.data.pairs import CollatePairs, captioned, encode_pairs, read_pairs
from sidestep.data.videos import VIDEOS, encode_videos, evenly, frames_in, spread
from small_tasks import tokenizer, write
from small_videos import cut, folder_of_frames, frame, place_of, video

FIELDS = Fields(video="clip", text="text")
PROCESSOR = FrameProcessor(ViTImageProcessor(size={"height": 16, "width": 16}), 4)


def cell(path: Path) -> dict[str, Any]:
    return {"path": str(path), "bytes": None}


def places(path: Path, count: int) -> list[int]:
    return [place_of(image) for image in evenly(cell(path), count)]


@pytest.mark.parametrize("frames", [1, 2, 11, 12, 13, 100])
@pytest.mark.parametrize("count", [1, 4, 12])
def test_frames_are_spread_from_the_first_to_the_last(frames: int, count: int) -> None:
    found = spread(frames, count)
    assert len(found) == min(frames, count)
    assert found == sorted(set(found))
    assert found[0] == 0
    assert count == 1 or found[-1] == frames - 1
    assert len({after - before for before, after in pairwise(found)}) <= 2


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi"])
def test_frames_of_a_file_are_those_at_their_places(tmp_path: Path, name: str) -> None:
    path = video(tmp_path / name)
    assert places(path, 4) == [0, 6, 12, 19]
    assert places(path, 50) == list(range(20))
    inside = evenly({"path": None, "bytes": path.read_bytes()}, 4)
    assert [place_of(image) for image in inside] == [0, 6, 12, 19]
    assert {image.mode for image in inside} == {"RGB"}


def test_frames_of_a_folder_come_by_their_numbers(tmp_path: Path) -> None:
    folder = folder_of_frames(tmp_path / "clip")
    (folder / "notes.txt").write_text("no frame")
    assert [file.name for file in frames_in(folder)][8:12] == ["frame8.png", "frame9.png", "frame10.png", "frame11.png"]
    assert places(folder, 4) == [0, 6, 12, 19]


def test_a_video_is_turned_as_its_file_says(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    half = frame(0)
    half[: len(half) // 2] = 250  # bright above
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = *half.shape[:2], "yuv420p"
        stream.set_display_rotation(90)  # against the clock
        for picture in (av.VideoFrame.from_ndarray(half, format="rgb24"), None):
            container.mux(stream.encode(picture))
    upright = np.asarray(evenly(cell(path), 1)[0])
    assert upright[:, :12].mean() > 200 > 100 > upright[:, -12:].mean()  # bright on the left


def rows(*paths: Path) -> Dataset:
    return Dataset.from_list([{"clip": str(path), "text": "a film"} for path in paths])


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
def test_a_broken_end_is_told_once_and_what_is_there_is_read(tmp_path: Path, name: str) -> None:
    whole, short = video(tmp_path / f"whole-{name}", 40), cut(video(tmp_path / name, 40), 0.5)
    said = r"1 of 3 videos of column 'clip' end too early, .*\(\d+ (of 40 frames|frames in \d\.\d of 4.0 seconds)\)"
    with pytest.warns(DataWarning, match=said) as told:
        encoded = encode_videos(rows(whole, short, whole), "clip", PROCESSOR)
    assert len(told) == 1
    assert encoded[0]["pixel_values"].shape == (4, 3, 16, 16)
    assert 0 < max(places(short, 40)) < 39
    torch.testing.assert_close(encoded[1]["pixel_values"][0], encoded[0]["pixel_values"][0], atol=0.05, rtol=0)


def test_what_only_decoding_shows_is_told_when_a_row_is_read(tmp_path: Path) -> None:
    path = video(tmp_path / "clip.mp4", 40)
    content = bytearray(path.read_bytes())
    late = len(content) * 3 // 4
    content[late : late + 300] = bytes(300)
    path.write_bytes(bytes(content))
    encoded = encode_videos(rows(path), "clip", PROCESSOR)
    with pytest.warns(DataWarning, match=r"clip.mp4 is broken behind frame \d+ \(Invalid data"):
        assert encoded[0]["pixel_values"].shape == (4, 3, 16, 16)


def nothing(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def noise(path: Path) -> Path:
    path.write_bytes(bytes(range(256)) * 8)
    return path


def sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        samples.rate = 8000
        for part in (samples, None):
            container.mux(stream.encode(part))
    return path


BAD = {
    "empty": (nothing, "it is a folder without images"),
    "noise.mp4": (noise, "Invalid data found"),
    "sound.mkv": (sound, "it has no pictures"),
    "cut.mp4": (lambda path: cut(video(path), 0.02), "(Invalid data|it holds no frames|moov)"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_video_without_frames_is_refused_by_name(tmp_path: Path, name: str) -> None:
    make, reason = BAD[name]
    good, bad = video(tmp_path / "good.mp4"), make(tmp_path / name)
    said = rf"1 of 2 videos of column 'clip' cannot be read: .*{name} \(.*{reason}.*--skip-bad-files"
    with pytest.raises(DataError, match=said):
        encode_videos(rows(good, bad), "clip", PROCESSOR)
    with pytest.warns(DataWarning, match="1 of 2 videos of the rows cannot be read and were left out"):
        assert len(VIDEOS.drop_unreadable(captioned(rows(good, bad), FIELDS), "clip")) == 1


def test_what_is_not_there_or_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "none.mp4").touch()
    with pytest.raises(DataError, match=r"1 of 1 videos are not there: .*gone\.mp4"):
        captioned(rows(tmp_path / "gone.mp4"), FIELDS)
    with pytest.raises(DataError, match=r"1 of 1 videos of column 'clip' are not there or empty \(0 bytes\)"):
        encode_videos(rows(tmp_path / "none.mp4"), "clip", PROCESSOR)


def test_a_frame_that_cannot_be_read_is_named_with_its_video(tmp_path: Path) -> None:
    folder = folder_of_frames(tmp_path / "clip", 3)
    (folder / "frame1.png").write_bytes(b"no picture")
    encoded = encode_videos(rows(folder), "clip", PROCESSOR)
    with pytest.raises(DataError, match=r"video .*clip' in row 1 cannot be read \(image .*frame1.png"):
        encoded[0]


def test_a_column_of_something_else_is_refused() -> None:
    for column, reason in ((1, "int64"), (["a.mp4", "b.mp4"], "List")):
        with pytest.raises(DataError, match=f"video column 'clip' holds .*{reason}.*, not videos or paths of videos"):
            captioned(Dataset.from_list([{"clip": column, "text": "a film"}]), FIELDS)


@pytest.mark.parametrize(
    "fields",
    [
        Fields(video="clip", image="clip", text="text"),
        Fields(video="clip"),
        Fields(video="clip", audio="x", text="text"),
    ],
)
def test_retrieval_reads_one_column_of_files_and_one_of_captions(fields: Fields) -> None:
    with pytest.raises(DataError, match=r"so name one column of images \(--image\) or of videos \(--video\)"):
        captioned(Dataset.from_list([{"clip": "a.mp4", "text": "a"}]), fields)


def test_a_folder_with_a_table_names_its_videos(tmp_path: Path) -> None:
    for number in range(2):
        video(tmp_path / "clips" / f"{number}.mp4", 3 + number)
    write(tmp_path / "clips" / "metadata.csv", [{"file_name": f"{n}.mp4", "text": f"film {n}"} for n in range(2)])
    assert read(tmp_path / "clips").column_names == ["video", "text"]
    found = read_pairs(str(tmp_path / "clips"), Fields(video="video", text="text"), TableOptions(), split="train")
    assert found["text"][:] == [["film 0"], ["film 1"]]


def test_videos_of_other_lengths_are_masked_in_a_batch(tmp_path: Path) -> None:
    paths = video(tmp_path / "long.mp4"), folder_of_frames(tmp_path / "short", 3)
    texts = tokenizer(pad=True)
    encoded, _ = encode_pairs(captioned(rows(*paths), FIELDS), FIELDS, PairProcessor(PROCESSOR, texts), None)
    batch = CollatePairs(texts)([encoded[0], encoded[1]])
    assert batch["pixel_values"].shape == (2, 4, 3, 16, 16)
    assert batch["frame_mask"].tolist() == [[True] * 4, [True] * 3 + [False]]
    assert (batch["pixel_values"][1, 3] == 0).all()
    assert "frame_mask" not in CollatePairs(texts)([encoded[0]])


def test_all_frames_of_a_video_have_one_view(tmp_path: Path) -> None:
    still = tmp_path / "still"
    still.mkdir()
    picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    for place in range(4):
        picture.save(still / f"{place}.png")
    other = tmp_path / "other"
    other.mkdir()
    picture.save(other / "0.png")
    views = Augmentation(views="crop", transform=ImageTransform(size=16))
    encoded = encode_videos(rows(still, other), "clip", PROCESSOR, views)
    pixels = encoded[0]["pixel_values"]
    assert all(torch.equal(pixels[0], pixels[place]) for place in range(1, 4))
    assert not torch.equal(pixels[0], encoded[1]["pixel_values"][0])


def test_a_checksum_of_rows_sees_the_frames_of_a_folder(tmp_path: Path) -> None:
    folder = folder_of_frames(tmp_path / "clip", 3)
    found = [content_hash(encode_videos(rows(folder), "clip", PROCESSOR))]
    moved = folder.rename(tmp_path / "moved")
    found.append(content_hash(encode_videos(rows(moved), "clip", PROCESSOR)))
    PIL.Image.fromarray(frame(9)).save(moved / "frame1.png")
    found.append(content_hash(encode_videos(rows(moved), "clip", PROCESSOR)))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("inner", [PROCESSOR.image, ImageTransform(size=16)], ids=["transformers", "transform"])
def test_a_frame_processor_comes_back_from_its_folder(tmp_path: Path, inner: Any) -> None:
    PairProcessor(FrameProcessor(inner, 3), tokenizer(pad=True)).save_pretrained(tmp_path)
    back = load_processor(tmp_path).image
    assert (back.frames, type(back.image)) == (3, type(inner))
    assert FrameProcessor.of(back) is back
    assert FrameProcessor.of(back, 5) == FrameProcessor(back.image, 5)


@pytest.mark.parametrize("frames", [0, -1, True, 1.5])
def test_a_video_has_at_least_one_frame(frames: Any) -> None:
    with pytest.raises(ValueError, match="give a whole number of at least 1"):
        FrameProcessor(PROCESSOR.image, frames)


def test_without_pyav_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = video(tmp_path / "clip.mp4", 3)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sidestep\[video\]'"):
        evenly(cell(path))
