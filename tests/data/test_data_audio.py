"""Sounds from files: folders, lists and tables; rates and channels; batches; bad ones and what models do not take."""

from __future__ import annotations

import builtins
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from datasets import Audio, Dataset, Value
from datasets import Features as Columns
from transformers import ViTImageProcessor, Wav2Vec2FeatureExtractor

import sidestep as ss
from sidestep.backbone.load import load_backbone
from sidestep.backbone.processors import load_processor, read_by
from sidestep.backbone.source import read_by_files
from sidestep.data import Collate, DataError, DataWarning, Fields, check_fields, encode_sounds, few_shot, read
from sidestep.data.contents import content_hash, row_ids
from sidestep.data.encode_sounds import inputs_of, noise
from sidestep.data.sounds import SOUNDS, Sound, headers
from sidestep.disk.features import FeatureStore
from sidestep.kinds.features import Features
from sidestep.kinds.prepare import TaskData, prepare
from sidestep.kinds.sounds import check_sounds
from sidestep.model.features import FeaturesRefused
from small_sounds import BACKBONES, RATE, WINDOW, sound_folder, tone, waves
from small_tasks import image_folder, tokenizer, write
from tiny import randomize

FIELDS = Fields(audio="audio", label="label")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Backbones, and six tones of each of two classes."""
    folder = tmp_path_factory.mktemp("sounds")
    for name, make in BACKBONES.items():
        make(folder / name)
    sound_folder(folder / "tones", per_class=6)
    return folder


def wave(folder: Path, name: str, samples: Any, rate: int = RATE) -> str:
    soundfile.write(folder / name, samples, rate, subtype="FLOAT" if name.endswith(".wav") else None)
    return str(folder / name)


def table(*files: str) -> Dataset:
    return Dataset.from_dict({"audio": list(files), "label": [("a", "b")[n % 2] for n in range(len(files))]})


def attached(folder: Path, dtype: str | None = None) -> ss.SideModel:
    model = ss.attach(load_backbone(folder, dtype=dtype), ss.ReadConfig(rank=4), head=ss.Classify(num_labels=2))
    randomize(model)
    return model.eval()


# --- where sounds come from -------------------------------------------------------------------------------------------


def test_class_folders_lists_and_tables_hold_the_same_sounds(place: Path, tmp_path: Path) -> None:
    folder = read(place / "tones")
    assert folder.column_names == ["audio", "label"]
    assert folder.features["label"].names == ["high", "low"]
    files = [cell["path"] for cell in folder["audio"]]
    names = [folder.features["label"].int2str(number) for number in folder["label"]]
    lines = [f"{file} {name}\n" for file, name in zip(files, names, strict=True)]
    (tmp_path / "list.txt").write_text("".join(lines))
    write(tmp_path / "table.csv", [{"audio": file, "label": name} for file, name in zip(files, names, strict=True)])
    cells = [{"bytes": Path(file).read_bytes(), "path": None} for file in files]
    features = Columns({"audio": Audio(), "label": Value("string")})
    whole = Dataset.from_dict({"audio": files, "label": names}).cast(features)
    assert SOUNDS.decode(cells[0], 1).samples.dtype == np.float32
    extractor = load_processor(place / "waves")
    expected = [row["input_values"] for row in encode_sounds(folder, FIELDS, extractor, None)[0]]
    for rows in (read(tmp_path / "list.txt"), read(tmp_path / "table.csv"), whole):
        assert rows["label"][:] == names
        found = [row["input_values"] for row in encode_sounds(rows, FIELDS, extractor, None)[0]]
        assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


def test_sounds_within_the_rows_need_no_files(place: Path, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(300, 0.2), RATE, format="FLAC")
    cells = {"audio": [{"bytes": buffer.getvalue(), "path": "of a machine far away.flac"}] * 2, "label": ["a", "b"]}
    struct = {"audio": {"bytes": Value("binary"), "path": Value("string")}, "label": Value("string")}
    rows = Dataset.from_dict(cells, features=Columns(struct)).cast_column("audio", Audio())
    rows.to_parquet(tmp_path / "rows.parquet")
    encoded = encode_sounds(read(tmp_path / "rows.parquet"), FIELDS, load_processor(place / "waves"), None)[0]
    assert encoded[1]["input_values"].shape == (800,)


def test_of_a_folder_with_sounds_and_images_the_more_numerous_are_read(tmp_path: Path) -> None:
    folder = sound_folder(tmp_path / "data", per_class=2)
    os.renames(image_folder(tmp_path / "images", per_class=1) / "dark" / "0.png", folder / "low" / "cover.png")
    with pytest.warns(DataWarning, match=r"1 files are no sounds, as most are, and were left out: 'low/cover\.png'"):
        assert read(folder).num_rows == 4
    (folder / "none").mkdir()
    (folder / "low" / "cover.png").unlink()
    with pytest.raises(DataError, match="1 of 3 class folders without sounds: 'none': put sounds there"):
        read(folder)


def test_metadata_names_sounds(tmp_path: Path) -> None:
    folder = sound_folder(tmp_path / "data", per_class=1)
    rows = [{"file_name": "low/0.wav", "speaker": "x"}, {"file_name": "high/0.wav", "speaker": "y"}]
    write(folder / "metadata.csv", rows)
    found = read(folder)
    assert found.column_names == ["audio", "speaker"]
    assert found["audio"][0]["path"] == str(folder / "low" / "0.wav")


# --- rates, channels, lengths -----------------------------------------------------------------------------------------


def test_channels_are_averaged_and_rates_brought_to_one(tmp_path: Path) -> None:
    left, right = tone(300, 0.25, 8000), tone(500, 0.25, 8000)
    path = wave(tmp_path, "stereo.wav", np.stack([left, right], axis=1), 8000)
    sound = SOUNDS.decode({"bytes": None, "path": path}, 1)
    np.testing.assert_allclose(sound.samples, (left + right) / 2, atol=1e-6)
    assert sound.rate == 8000
    for rate in (4000, 8000, 11025):
        assert len(sound.at(rate)) == headers(table(path), "audio")[0].at(rate)
    # a tone stays the tone that it is, apart from its first and last samples
    clean = np.sin(2 * np.pi * 300 * np.arange(2000) / 8000).astype(np.float32)
    expected = np.sin(2 * np.pi * 300 * np.arange(1000) / 4000)
    np.testing.assert_allclose(Sound(clean, 8000).at(4000)[50:-50], expected[50:-50], atol=0.01)


def test_what_is_resampled_is_said_once_with_the_rates(place: Path, tmp_path: Path) -> None:
    files = [wave(tmp_path, f"{n}.wav", tone(300, 0.2, rate), rate) for n, rate in enumerate((8000, 4000, 8000, 6000))]
    with pytest.warns(DataWarning) as told:
        encoded, cut = encode_sounds(table(*files), FIELDS, load_processor(place / "waves"), None)
    assert [str(one.message) for one in told] == [
        "3 of 4 sounds are resampled to the 4000 Hz that the backbone reads: 1 from 6000 Hz, 2 from 8000 Hz"
    ]
    assert (encoded["length"][:], cut) == ([800] * 4, 0)
    assert {row["input_values"].shape for row in encoded} == {(800,)}


def test_an_extractor_that_cuts_is_seen_to(place: Path, tmp_path: Path) -> None:
    files = [wave(tmp_path, f"{n}.wav", tone(300, seconds, 16000), 16000) for n, seconds in enumerate((0.2, 2, 0.3, 1))]
    with pytest.warns(DataWarning, match=r"2 of 4 sounds are longer than the 0\.335 seconds that ASTFeatureExtractor"):
        encoded, cut = encode_sounds(table(*files), FIELDS, load_processor(place / "spectrograms"), None)
    assert (cut, encoded[0]["input_values"].shape) == (2, (32, 16))
    assert "length" not in encoded.column_names  # all have one, so there is nothing to group by
    with pytest.warns(DataWarning, match=r"1 of 4 sounds are longer than the 1 seconds that WhisperFeatureExtractor"):
        assert encode_sounds(table(*files), FIELDS, load_processor(place / "whisper"), None)[1] == 1


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_a_row_alone_has_the_outputs_that_it_has_in_a_padded_batch(place: Path, tmp_path: Path, name: str) -> None:
    extractor, model = load_processor(place / name), attached(place / name)
    rate = extractor.sampling_rate
    files = [wave(tmp_path, f"{n}.wav", tone(300, s, rate), rate) for n, s in enumerate((0.3, 0.1, 0.22))]
    encoded, collate = encode_sounds(table(*files), FIELDS, extractor, None)[0], Collate.of(FIELDS, extractor)
    batch = collate([encoded[number] for number in range(3)])
    assert ("attention_mask" in batch) == (name in ("waves", "frames"))
    with torch.no_grad():
        together = model(**batch).logits
        alone = torch.cat([model(**collate([encoded[number]])).logits for number in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)  # sums are taken in another order
    assert not torch.allclose(alone[0], alone[1])


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_in_bfloat16_reads_sounds(place: Path, name: str) -> None:
    extractor, model = load_processor(place / name), attached(place / name, dtype="bfloat16")
    batch = Collate.of(FIELDS, extractor)([inputs_of(extractor, noise(extractor.sampling_rate // 4))])
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()


def test_what_was_stored_of_rows_gives_the_same_batches(place: Path) -> None:
    rows, extractor = read(place / "tones"), load_processor(place / "waves")
    data = prepare(rows, rows, FIELDS, extractor)
    batch = data.collate([data.train[0], data.train[7]])
    assert batch.keys() == {"input_values", "attention_mask", "labels"}
    lengths = batch["attention_mask"].sum(1).tolist()
    assert lengths == [data.train["length"][0], data.train["length"][7]]
    assert batch["input_values"].shape == (2, max(lengths))
    with pytest.raises(DataError, match="a batch needs input_ids, pixel_values or sounds"):
        Collate()([data.train[0]])


def test_contents_count_and_not_where_the_files_lie(place: Path, tmp_path: Path) -> None:
    extractor = load_processor(place / "waves")

    def encoded(folder: Path) -> Dataset:
        return encode_sounds(read(folder), FIELDS, extractor, None)[0]

    first, same = encoded(sound_folder(tmp_path / "a", 2)), encoded(sound_folder(tmp_path / "b", 2))
    assert content_hash(first) == content_hash(same)
    assert row_ids(first, ("row",)) == row_ids(same, ("row",))
    wave(tmp_path / "b" / "low", "1.wav", tone(300, 0.2))
    assert content_hash(first) != content_hash(encoded(tmp_path / "b"))


def test_shots_are_drawn_of_sounds(place: Path) -> None:
    rows = few_shot(read(place / "tones"), FIELDS, 2, seed=0)
    assert sorted(rows["label"]) == [0, 0, 1, 1]


# --- sounds that cannot be read ---------------------------------------------------------------------------------------


def spoilt(folder: Path) -> Dataset:
    """Nine sounds of which five cannot be read, and a file that is not there."""
    folder.mkdir()
    good = [wave(folder, f"{n}.wav", tone(300, 0.2)) for n in range(4)]
    silent = wave(folder, "silent.wav", np.zeros(0))
    (folder / "text.wav").write_text("no sound at all")
    broken = wave(folder, "broken.flac", tone(300, 0.5))
    content = Path(broken).read_bytes()
    Path(broken).write_bytes(content[: len(content) // 2])
    nan = tone(300, 0.2)
    nan[5] = np.nan
    bad = [silent, str(folder / "text.wav"), broken, wave(folder, "nan.wav", nan)]
    return table(*good, *bad)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (4, r"sound '.*silent\.wav' in row 5 cannot be read \(it holds no samples\): replace or drop it"),
        (5, r"sound '.*text\.wav' in row 6 cannot be read \(.*[Ff]ormat not recognised\)"),
        (6, r"sound '.*broken\.flac' in row 7 cannot be read"),
        (7, r"sound '.*nan\.wav' in row 8 cannot be read \(it holds samples that are not finite\).*--skip-bad-files"),
    ],
)
def test_a_sound_that_cannot_be_read_is_named_with_its_row(tmp_path: Path, row: int, said: str) -> None:
    cell = {"bytes": None, "path": spoilt(tmp_path / "data")["audio"][row]}
    with pytest.raises(DataError, match=said):
        SOUNDS.decode(cell, row + 1)


def test_files_that_are_no_sounds_are_refused_before_anything_is_computed(place: Path, tmp_path: Path) -> None:
    rows, extractor = spoilt(tmp_path / "data"), load_processor(place / "waves")
    with pytest.raises(DataError, match=r"2 of 8 sounds of column 'audio' cannot be read: .*silent\.wav \(it holds"):
        prepare(rows, rows, FIELDS, extractor)
    (tmp_path / "empty.wav").write_bytes(b"")
    for name in ("empty.wav", "gone.wav"):
        with pytest.raises(DataError, match=rf"1 of 1 sounds .* are not there or empty \(0 bytes\): '.*{name}'"):
            encode_sounds(table(str(tmp_path / name)), FIELDS, extractor, None)


def test_bad_sounds_are_left_out_counted_and_named(place: Path, tmp_path: Path) -> None:
    rows = spoilt(tmp_path / "data")
    with pytest.warns(DataWarning, match=r"4 of 8 sounds of the training rows cannot be read .*silent\.wav.*nan\.wav"):
        data = prepare(rows, table(*rows["audio"][:4]), FIELDS, load_processor(place / "waves"), skip_bad_files=True)
    assert (len(data.train), len(data.dev), data.handling["skipped_files"]) == (4, 4, 4)


def test_the_extra_is_named_where_soundfile_is_missing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "soundfile":
            raise ImportError("No module named 'soundfile'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sidestep\[audio\]'"):
        encode_sounds(read(place / "tones"), FIELDS, load_processor(place / "waves"), None)


def test_a_folder_of_a_processor_alone_says_what_it_reads(tmp_path: Path) -> None:
    older = ViTImageProcessor(size={"height": 8, "width": 8}, feature_extractor_type="ViTFeatureExtractor")
    for processor, reads in ((older, "image"), (Wav2Vec2FeatureExtractor(), "audio"), (tokenizer(pad=True), "text")):
        processor.save_pretrained(tmp_path / reads)
        assert type(load_processor(tmp_path / reads)) is type(processor)
        assert read_by(processor) == read_by_files(tmp_path / reads) == reads


# --- what does not go together ----------------------------------------------------------------------------------------


def test_columns_and_backbones_that_read_something_else_are_refused(place: Path, tmp_path: Path) -> None:
    sounds, extractor = read(place / "tones"), load_processor(place / "waves")
    texts = Dataset.from_dict({"text": ["a b", "c d"], "label": ["x", "y"]})
    images = read(image_folder(tmp_path / "images", per_class=2))
    for processor, option in ((tokenizer(pad=True), "text"), (ViTImageProcessor(), "image")):
        with pytest.raises(DataError, match=rf"reads {option}.*, but 'audio' is named as sounds: say --{option}"):
            prepare(sounds, sounds, FIELDS, processor)
    for rows, fields, named in (
        (texts, Fields(text="text", label="label"), "'text' is named as text"),
        (images, Fields(image="image", label="label"), "'image' is named as images"),
    ):
        with pytest.raises(DataError, match=rf"the backbone reads sounds \(Wav2Vec2.*{named}: say --audio"):
            prepare(rows, rows, fields, extractor)
    with pytest.raises(DataError, match=r"column 'image' holds Image\(.*, not sounds or paths of sounds"):
        prepare(images, images, Fields(audio="image", label="label"), extractor)
    with pytest.raises(DataError, match="name one column of text, of images or of sounds"):
        check_fields(sounds, Fields(audio="audio", text="label"))
    with pytest.raises(DataError, match="augment='flip' is for images, but a column of sounds is read"):
        prepare(sounds, sounds, FIELDS, extractor, augment="flip")
    with pytest.raises(DataError, match="kind='lm' is for texts, but 'audio' is named as sounds"):
        prepare(sounds, sounds, FIELDS, extractor, kind="lm")


def prepared(folder: Path, samples: list[int], extractor: Any) -> TaskData:
    rate = extractor.sampling_rate
    rows = table(*(wave(folder, f"{p}.wav", tone(300, n / rate, rate), rate) for p, n in enumerate(samples)))
    return prepare(rows, rows, FIELDS, extractor)


def test_a_sound_that_is_shorter_than_the_front_of_the_model_is_named(place: Path, tmp_path: Path) -> None:
    extractor, model = load_processor(place / "waves"), attached(place / "waves")
    check_sounds(model, prepared(tmp_path, [WINDOW, 400], extractor).train, extractor)
    short = prepared(tmp_path, [400, WINDOW - 1, 500, 4], extractor).train
    with pytest.raises(
        DataError, match=rf"2 of 4 sounds are shorter than the {WINDOW} samples .*rows 2, 4 .* of the dev"
    ):
        check_sounds(model, short, extractor, "dev")
    assert not model.training


def test_a_sound_that_is_shorter_than_a_frame_of_the_extractor_is_named(place: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 of 2 sounds are shorter than the 400 samples \(0\.025 seconds\) that ASTF"):
        prepared(tmp_path, [800, 399], load_processor(place / "spectrograms"))


@pytest.mark.parametrize(("own", "other"), [("waves", "whisper"), ("waves", "spectrograms"), ("spectrograms", "waves")])
def test_the_extractor_of_another_model_is_refused(place: Path, tmp_path: Path, own: str, other: str) -> None:
    extractor = load_processor(place / other)
    data = prepared(tmp_path, [2000, 2400], extractor)
    with pytest.raises(DataError, match=rf"cannot take what {type(extractor).__name__} makes of a sound: .*saved with"):
        check_sounds(attached(place / own), data.train, extractor)


def test_states_that_depend_on_the_batch_are_not_stored(tmp_path: Path) -> None:
    waves(tmp_path / "maskless", masks=False)
    extractor, model = load_processor(tmp_path / "maskless"), attached(tmp_path / "maskless")
    how: dict[str, Any] = {"rounded": False, "batch_size": 8, "autocast": False}
    with pytest.raises(FeaturesRefused, match="differ in length and have no mask"):
        Features.of(model, prepared(tmp_path, [400, 500], extractor), FeatureStore(None, 10**6), **how)
    Features.of(model, prepared(tmp_path, [400, 400], extractor), FeatureStore(None, 10**6), **how)
