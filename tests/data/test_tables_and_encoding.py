import csv
import gzip
import json
import os
import pickle
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from packaging.version import Version
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, ViTImageProcessor

from sidestep.data import (
    Collate,
    DataError,
    DataWarning,
    Fields,
    LabelSpace,
    TableOptions,
    check_fields,
    encode_images,
    encode_text,
    holdout,
    label_space,
    read,
)

SHARED = Path(os.environ.get("SIDESTEP_SHARED", Path(__file__).parents[3] / "shared")) / "data"
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran"]
TEXT = Fields(text="text", label="label")
PAIR = Fields(text="text", text2="other")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def file(folder: Path, name: str, text: str, encoding: str = "utf-8") -> Path:
    path = folder / name
    content = text.encode(encoding)
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def word_tokenizer(special: bool = True, **options) -> PreTrainedTokenizerFast:
    vocabulary = {word: place for place, word in enumerate(["[UNK]", "[PAD]", "[CLS]", "[SEP]", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        core.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    names = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", **names | options)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer(pad_token="[PAD]")


def rows_of(**columns) -> Dataset:
    return Dataset.from_dict(columns)


def error_of(function, *arguments, **options) -> str:
    with pytest.raises(DataError) as caught:
        function(*arguments, **options)
    return str(caught.value)


# reading


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz", "a.tsv.gz", "a.CSV"])
def test_a_table_keeps_every_cell_as_the_text_it_is(tmp_path, name):
    cells = ["NA", "null", "None", "nan", "", "007", "1.50", " padded ", "\u2028 ü", "say '1'"]
    delimiter = "\t" if ".tsv" in name else ","
    lines = [["text", "label"]] + [[cell, str(place)] for place, cell in enumerate(cells)]
    rows = read(file(tmp_path, name, "\n".join(delimiter.join(line) for line in lines) + "\n\n"))
    assert rows["text"][:] == cells
    assert rows["label"][:] == [str(place) for place in range(len(cells))]


def test_quotes_are_read_as_pandas_writes_them_or_as_plain_characters(tmp_path):
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as out:
        csv.writer(out).writerows([["text", "label"], ['a "quoted", word\non two lines', "1"], ['"', "0"]])
    assert read(path)["text"][:] == ['a "quoted", word\non two lines', '"']
    plain = file(tmp_path, "b.tsv", 'text\tlabel\n"open\t1\nit "is" so\t0\n')
    assert read(plain, TableOptions(quoting=False))["text"][:] == ['"open', 'it "is" so']


@pytest.mark.parametrize("cell", ['"open', '"so" he said'])
def test_a_stray_quote_is_an_error_and_swallows_no_lines(tmp_path, cell):
    path = file(tmp_path, "a.tsv", f"text\tlabel\nfine\t1\n{cell}\t1\nnext\t0\n")
    message = error_of(read, path)
    assert "line 3" in message
    assert "quoting=False (--no-quoting)" in message


def test_a_csv_file_that_is_tab_separated_is_read_as_such(tmp_path):
    tabs = file(tmp_path, "tabs.csv", "text\tlabel\none, two\t1\n")
    assert read(tabs)[0] == {"text": "one, two", "label": "1"}
    commas = file(tmp_path, "commas.csv", "text,label\none\ttwo,1\n")
    assert read(commas)[0] == {"text": "one\ttwo", "label": "1"}


def test_columns_name_a_file_without_header_and_rename_one_with(tmp_path):
    path = file(tmp_path, "a.csv", "good,1\nbad,0\n")
    options = TableOptions(header=False, columns=("text", "label"))
    assert read(path, options)[:] == {"text": ["good", "bad"], "label": ["1", "0"]}
    assert read(path, TableOptions(header=False)).column_names == ["column1", "column2"]
    assert read(path, TableOptions(columns=("text", "label")))[:] == {"text": ["bad"], "label": ["0"]}
    saved = tmp_path / "a.parquet"
    rows_of(a=["x"], b=[1]).to_parquet(saved)
    assert read(saved, TableOptions(columns=("text", "label"))).column_names == ["text", "label"]


def test_columns_that_do_not_fit_are_refused(tmp_path):
    path = file(tmp_path, "a.csv", "good,1\nbad,0\n")
    message = error_of(read, path, TableOptions(header=False, columns=("text", "label", "more")))
    assert "columns names 3 columns ('text', 'label', 'more'), but" in message
    assert "has 2: name each of them" in message
    assert "a name of its own" in error_of(TableOptions, columns=("text", "text"))
    repeated = file(tmp_path, "b.csv", "text,text\na,b\n")
    assert "'text', 'text'. Every column needs a name of its own" in error_of(read, repeated)
    zero = file(tmp_path, "zero.csv", "te\0xt,label\na,1\n")
    assert "A name cannot hold a zero byte: give the file's encoding" in error_of(read, zero)


def test_a_nameless_index_column_gets_a_name(tmp_path):
    assert read(file(tmp_path, "a.csv", ",text\n0,good\n")).column_names == ["column1", "text"]


def test_ragged_rows_are_counted_and_named(tmp_path):
    path = file(tmp_path, "a.csv", 'text,label\na,1\n"b\nb",1,extra,more\n\nc\nd,0\n')
    with pytest.warns(DataWarning) as caught:
        rows = read(path)
    assert rows[:] == {"text": ["a", "b\nb", "d"], "label": ["1", "1", "0"]}
    (warning,) = caught
    assert "of 5 rows, 1 with more than 2 fields, the extra ones dropped (lines 3)" in str(warning.message)
    assert "2 with fewer than 2 fields, skipped (lines 5, 6)" in str(warning.message)


def test_a_header_that_fits_no_row_is_refused_rather_than_shifted(tmp_path):
    path = file(tmp_path, "a.csv", "text,label\n0,a,1\n1,b,0\n")
    assert "the header names 2 columns, but no row has 2 fields (line 2 has 3)" in error_of(read, path)


def test_encodings(tmp_path):
    latin = file(tmp_path, "a.csv", "text,label\ncrème,1\n", "latin-1")
    message = error_of(read, latin)
    assert "is not utf-8 (byte 0xe8" in message
    assert "--encoding latin-1" in message
    assert read(latin, TableOptions(encoding="latin-1"))["text"][0] == "crème"
    marked = file(tmp_path, "b.csv", "text,label\ncrème,1\n", "utf-8-sig")
    assert read(marked).column_names == ["text", "label"]
    assert read(file(tmp_path, "b.jsonl", '{"text": "crème"}\n', "utf-8-sig"))[0] == {"text": "crème"}
    assert "encoding='utf-9' is unknown: choose utf-8" in error_of(TableOptions, encoding="utf-9")


@pytest.mark.skipif(Version(datasets.__version__) < Version("5.2"), reason="older datasets refuse such a file")
def test_a_json_list_may_begin_with_a_byte_order_mark(tmp_path):
    assert read(file(tmp_path, "b.json", '[{"text": "crème"}]', "utf-8-sig"))[0] == {"text": "crème"}


def test_a_cell_may_be_longer_than_the_csv_module_allows(tmp_path):
    before = csv.field_size_limit()
    long = "word " * 40_000
    assert read(file(tmp_path, "a.csv", f"text,label\n{long},1\n"))["text"][0] == long
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "b.json", "a.jsonl.gz"])
def test_json_is_read_as_a_list_or_line_by_line(tmp_path, name):
    objects = [{"text": "NA", "label": 1}, {"text": "", "label": 0}]
    text = json.dumps(objects) if name == "b.json" else "\n".join(map(json.dumps, objects))
    rows = read(file(tmp_path, name, text))
    assert rows[:] == {"text": ["NA", ""], "label": [1, 0]}


def test_json_in_another_encoding(tmp_path):
    path = file(tmp_path, "a.jsonl", json.dumps({"text": "crème"}, ensure_ascii=False), "latin-1")
    assert "is not utf-8 (byte 0xe8" in error_of(read, path)
    assert read(path, TableOptions(encoding="latin-1"))["text"][0] == "crème"


def test_a_changed_file_is_read_anew(tmp_path):
    path = file(tmp_path, "a.jsonl", '{"text": "old"}')
    assert read(path)["text"][:] == ["old"]
    path.write_text('{"text": "new"}')
    os.utime(path, (0, 1))
    assert read(path)["text"][:] == ["new"]


def test_parquet_and_saved_datasets(tmp_path):
    rows = rows_of(text=["NA", "b"], label=[1, 0])
    rows.to_parquet(tmp_path / "a.parquet")
    rows.save_to_disk(tmp_path / "one")
    DatasetDict(train=rows, dev=rows.select([0])).save_to_disk(tmp_path / "two")
    assert read(tmp_path / "a.parquet")[:] == rows[:]
    assert read(tmp_path / "one")[:] == rows[:]
    assert len(read(tmp_path / "two", split="dev")) == 1
    assert "has no split 'test': its splits are 'train', 'dev'" in error_of(read, tmp_path / "two", split="test")
    (tmp_path / "one" / "state.json").write_text("{")
    assert "cannot be read as a saved dataset" in error_of(read, tmp_path / "one")


def test_missing_unreadable_and_unknown_files(tmp_path, monkeypatch):
    assert "does not exist: check the path (a relative one starts at" in error_of(read, tmp_path / "no.csv")
    assert "no.csv does not exist" in error_of(read, "no.csv")
    assert "'.xlsx': choose a file that ends in .csv, .tsv" in error_of(read, file(tmp_path, "a.xlsx", "x"))
    path = file(tmp_path, "a.csv", "text\na\n")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert "a.csv cannot be read (Permission denied): check its permissions" in error_of(read, path)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json", "a.parquet"])
def test_an_empty_file_is_refused(tmp_path, name):
    assert f"{name} is empty: give a file with at least one row" in error_of(read, file(tmp_path, name, ""))


def test_files_without_rows_are_refused(tmp_path):
    assert "is empty" in error_of(read, file(tmp_path, "blank.csv", "\n\n"))
    assert "is empty" in error_of(read, file(tmp_path, "a.csv.gz", ""))
    header = error_of(read, file(tmp_path, "a.csv", "text,label\n"))
    assert "holds a header and no rows: if it has no header, say header=False (--no-header)" in header
    assert "cannot be read as json" in error_of(read, file(tmp_path, "a.json.gz", ""))
    rows_of(text=[]).to_parquet(tmp_path / "a.parquet")
    assert "corresponds to no data" in error_of(read, tmp_path / "a.parquet")


def test_corrupt_files_are_refused(tmp_path):
    assert "cannot be read as parquet" in error_of(read, file(tmp_path, "a.parquet", "PAR1 rubbish"))
    assert "cannot be read as json (a list of objects" in error_of(read, file(tmp_path, "a.json", '{"text": '))
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"text,label\n" + os.urandom(2000).hex().encode())[:500])
    assert "it may be cut short" in error_of(read, tmp_path / "a.csv.gz")
    assert "Not a gzipped file" in error_of(read, file(tmp_path, "b.csv", "x").rename(tmp_path / "b.csv.gz"))


def test_a_hub_id_is_looked_up(monkeypatch):
    asked = []

    def load(name, configuration, split):
        asked.append((name, configuration, split))
        return rows_of(text=["a"])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("nyu-mll/glue:rte", split="validation")["text"][:] == ["a"]
    assert asked == [("nyu-mll/glue", "rte", "validation")]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows_of(text=[]))
    assert "somebody/nothing holds no rows: at least one is needed" in error_of(read, "somebody/nothing")


def test_a_failed_hub_lookup_says_that_there_is_no_file_either(monkeypatch):
    def load(*_, **__):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    message = error_of(read, "nobody/nothing")
    assert "'nobody/nothing' is no file or folder here, and looking it up on the Hugging Face hub failed" in message
    assert "Couldn't reach the Hub" in message


def test_a_path_is_never_taken_for_a_hub_id(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", None)
    for source in ("train.csv", "data/train.tsv.gz", "./folder", "/some/where", "a/b/c", "~/x", Path("a/b")):
        assert "does not exist" in error_of(read, source)


# images


def image_folder(folder: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 2) -> Path:
    generator = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for place in range(count):
            pixels = generator.integers(0, 256, (6, 5, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(folder / name / f"{place}.png")
    return folder


# "test" is also a word that `datasets` takes for a split
@pytest.mark.parametrize("classes", [("cat", "dog"), ("train", "car"), ("test", "train", "x")])
def test_class_folders_become_labels(tmp_path, classes):
    folder = image_folder(tmp_path / "test [1]", classes)
    (folder / "notes.txt").write_text("not an image")
    rows = read(folder)
    assert rows.features["label"] == ClassLabel(names=sorted(classes))
    assert len(rows) == 2 * len(classes)
    assert label_space(rows, "label", "single").names == tuple(sorted(classes))


def test_the_split_of_an_image_folder_is_its_subfolder(tmp_path):
    image_folder(tmp_path / "train", count=3)
    image_folder(tmp_path / "dev", count=1)
    assert len(read(tmp_path, split="train")) == 6
    assert len(read(tmp_path, split="dev")) == 2


def test_a_folder_without_images_is_refused(tmp_path):
    assert "holds no images" in error_of(read, tmp_path)
    file(tmp_path, "a.txt", "text")
    assert "one folder of images, sounds or videos per class" in error_of(read, tmp_path)


def processor(size: int = 4) -> ViTImageProcessor:
    return ViTImageProcessor(size={"height": size, "width": size})


def test_images_become_pixel_values_when_they_are_read(tmp_path):
    rows = read(image_folder(tmp_path / "images"))
    space = label_space(rows, "label", "single")
    encoded = encode_images(rows, Fields(image="image", label="label"), processor(), space)
    row = encoded[3]
    assert row.keys() == {"pixel_values", "labels"}
    assert row["labels"] == 1
    expected = processor()(images=rows[3]["image"], return_tensors="pt")["pixel_values"][0]
    assert torch.equal(row["pixel_values"], expected)
    batch = Collate()([encoded[place] for place in range(4)])
    assert batch["pixel_values"].shape == (4, 3, 4, 4)
    assert batch["labels"].tolist() == [0, 0, 1, 1]
    assert encode_images(rows, Fields(image="image"), processor(), None)[0].keys() == {"pixel_values"}


def test_images_survive_the_column_removal_of_the_trainer(tmp_path):
    rows = read(image_folder(tmp_path / "images"))
    space = label_space(rows, "label", "single")
    encoded = encode_images(rows, Fields(image="image", label="label"), processor(), space)
    # what `Trainer` does with columns that the model's signature does not name
    kept = encoded.remove_columns([name for name in encoded.column_names if name not in ("pixel_values", "labels")])
    assert torch.equal(kept[1]["pixel_values"], encoded[1]["pixel_values"])
    assert encoded["labels"][:] == [0, 0, 1, 1]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "1", "CMYK"])
def test_every_mode_becomes_three_channels(mode):
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8))
    rows = Dataset.from_dict({"picture": [image.convert(mode)]}, features=Features({"picture": Image()}))
    pixels = encode_images(rows, Fields(image="picture"), processor(), None)[0]["pixel_values"]
    assert pixels.shape == (3, 4, 4)
    assert torch.isfinite(pixels).all()


def test_sixteen_bits_of_grey_are_scaled_not_clipped(tmp_path):
    grey = np.arange(36, dtype=np.uint16).reshape(6, 6) * 1800
    PIL.Image.fromarray(grey).save(tmp_path / "a.png")
    rows = rows_of(path=[str(tmp_path / "a.png")])
    plain = ViTImageProcessor(do_resize=False, do_rescale=False, do_normalize=False)
    pixels = encode_images(rows, Fields(image="path"), plain, None)[0]["pixel_values"]
    assert pixels[0].tolist() == (grey // 256).tolist()


def test_a_corrupt_image_is_named(tmp_path):
    folder = image_folder(tmp_path / "images")
    whole = (folder / "dog" / "0.png").read_bytes()
    (folder / "dog" / "0.png").write_bytes(whole[: len(whole) // 2])
    (folder / "dog" / "1.png").write_bytes(b"no image")
    encoded = encode_images(read(folder), Fields(image="image"), processor(), None)
    assert encoded[1]["pixel_values"].shape == (3, 4, 4)
    for place, name in ((2, "0.png"), (3, "1.png")):
        message = error_of(encoded.__getitem__, place)
        assert name in message
        assert f"row {place + 1} cannot be read" in message


def test_a_corrupt_image_without_a_path_is_named_by_its_row():
    rows = Dataset.from_dict({"image": [{"bytes": b"x", "path": None}]}, features=Features({"image": Image()}))
    encoded = encode_images(rows, Fields(image="image"), processor(), None)
    assert "image row 1 cannot be read" in error_of(encoded.__getitem__, 0)


def test_image_columns_are_checked():
    assert "holds Value('int64'), not images" in error_of(check_fields, rows_of(image=[1]), Fields(image="image"))
    rows = Dataset.from_dict({"image": [None, "a.png"]}, features=Features({"image": Value("string")}))
    assert "has no image in row 1" in error_of(check_fields, rows, Fields(image="image"))


# fields


def test_a_column_that_does_not_exist_is_answered_with_those_that_do():
    rows = rows_of(sentence1=["a"], sentence2=["b"], Label=["x"])
    message = error_of(check_fields, rows, Fields(text="sentense1"))
    assert message == (
        "there is no column 'sentense1' (did you mean 'sentence1'?): the columns are 'sentence1', 'sentence2', 'Label'"
    )
    assert "did you mean 'Label'?" in error_of(check_fields, rows, Fields(text="sentence1", label="label"))
    assert "no column 'zzz': the" in error_of(check_fields, rows, Fields(text="sentence1", text2="zzz"))
    assert "no column 'zzz'" in error_of(label_space, rows, "zzz", "single")


def test_fields_name_text_or_image_or_both():
    rows = rows_of(text=["a"], image=["b"])
    check_fields(rows, Fields(text="text", image="image"))
    assert "name one column of text, of images or of sounds" in error_of(check_fields, rows, Fields())
    assert "name one column" in error_of(check_fields, rows, Fields(text="text", audio="image"))
    assert "text2='text' without text" in error_of(check_fields, rows, Fields(image="image", text2="text"))


@pytest.mark.parametrize("cells", [[1, 2], [0.5, 1.5], [True, False], [["a"], ["b"]]])
def test_a_text_column_of_another_type_is_refused(cells):
    assert "not text: choose a text column" in error_of(check_fields, rows_of(text=cells), Fields(text="text"))


def test_a_text_column_of_numbers_is_refused_even_where_they_are_written_as_text():
    numbers = rows_of(text=["12", "-3.5", "1e3", ""], other=["a", "b", "c", "d"])
    message = error_of(check_fields, numbers, Fields(text="other", text2="text"))
    assert "text column 'text' holds only numbers ('12', '-3.5', '1e3' and 1 more)" in message
    check_fields(rows_of(text=["12", "twelve"]), Fields(text="text"))
    check_fields(rows_of(text=["nan", "inf"]), Fields(text="text"))
    check_fields(rows_of(text=["", ""]), Fields(text="text"))


def test_missing_texts_are_named_by_row():
    rows = rows_of(text=["a", None, "b", None])
    message = error_of(check_fields, rows, Fields(text="text"))
    assert "has no value in 2 of 4 rows, rows 2, 4 (the first is 1)" in message
    check_fields(rows.select([0, 2]), Fields(text="text"))


# labels


@pytest.mark.parametrize(
    ("cells", "names"),
    [
        (["b", "a", "b"], ("a", "b")),
        (["10", "9", "-1"], ("-1", "9", "10")),
        ([10, 9, 10], ("9", "10")),
        ([1.0, 0.0, 1.0], ("0", "1")),
        ([True, False], ("False", "True")),
        (["10", "9", "x"], ("10", "9", "x")),
    ],
)
def test_single_labels_are_sorted_names(cells, names):
    rows = rows_of(label=cells)
    space = label_space(rows, "label", "single")
    assert space == LabelSpace("single", names)
    assert space.outputs == len(names)
    decoded = [space.names[number] for number in space.encode(rows, "label")]
    assert decoded == [str(int(cell)) if isinstance(cell, float) else str(cell) for cell in cells]


def test_class_labels_keep_their_names_and_order():
    feature = ClassLabel(names=["yes", "no", "maybe"])
    rows = Dataset.from_dict({"label": [1, 0]}, features=Features({"label": feature}))
    space = label_space(rows, "label", "single")
    assert space.names == ("yes", "no", "maybe")
    assert space.encode(rows, "label") == [1, 0]


def test_labels_are_matched_by_name_across_formats():
    space = LabelSpace("single", ("no", "yes"))
    other = Features({"label": ClassLabel(names=["yes", "no"])})
    assert space.encode(Dataset.from_dict({"label": [0, 1]}, features=other), "label") == [1, 0]
    assert space.encode(rows_of(label=["yes", "no"]), "label") == [1, 0]
    assert LabelSpace("single", ("0", "1")).encode(rows_of(label=[1, 0]), "label") == [1, 0]


def test_labels_that_training_never_had_are_named():
    message = error_of(LabelSpace("single", ("a", "b")).encode, rows_of(label=["a", "maybe", "b", "maybe"]), "label")
    assert "labels that training never had: 'maybe', in rows 2, 4 (the first is 1)" in message
    assert "Training had 'a', 'b'" in message
    multi = LabelSpace("multi", ("a", "b"))
    assert "never had: 'c', in row 1" in error_of(multi.encode, rows_of(label=["a|c"]), "label")


def test_missing_labels_are_named():
    for cells in (["a", None, "b"], ["a", "", "b"], [1.0, float("nan"), 2.0]):
        message = error_of(label_space, rows_of(label=cells), "label", "single")
        assert "column 'label' has no label in 1 of 3 rows, row 2 (the first is 1)" in message
    hub = Dataset.from_dict({"label": [0, -1]}, features=Features({"label": ClassLabel(names=["a", "b"])}))
    assert "has no label in 1 of 2 rows, row 2" in error_of(label_space, hub, "label", "single")
    assert "row 1" in error_of(label_space, rows_of(label=[None, "a|b"]), "label", "multi")


def test_fewer_than_two_classes_are_refused():
    assert "holds 1 class ('a') in 3 rows" in error_of(label_space, rows_of(label=["a"] * 3), "label", "single")
    assert "holds 0 class (nothing) in 2 rows" in error_of(label_space, rows_of(label=["", ""]), "label", "multi")


def test_several_labels_become_one_number_per_class():
    expected = [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    texts = rows_of(label=["red | blue", "", "green"])
    lists = rows_of(label=[["red", "blue"], [], ["green"]])
    names = Features({"label": List(ClassLabel(names=["red", "green", "blue"]))})
    classes = Dataset.from_dict({"label": [[0, 2], [], [1]]}, features=names)
    for rows in (texts, lists):
        space = label_space(rows, "label", "multi")
        assert space == LabelSpace("multi", ("blue", "green", "red"))
        assert [row[::-1] for row in space.encode(rows, "label")] == expected
    assert label_space(classes, "label", "multi").encode(classes, "label") == expected
    assert label_space(rows_of(label=[[2, 10], [9]]), "label", "multi").names == ("2", "9", "10")


def test_lists_of_the_wrong_kind_are_refused():
    assert "choose kind 'multi'" in error_of(label_space, rows_of(label=[["a"], ["b"]]), "label", "single")
    hot = error_of(label_space, rows_of(label=[[0, 1, 0], [1, 1, 0]]), "label", "multi")
    assert "names a label twice in rows 1, 2" in hot
    assert "kind='both': choose 'single', 'multi', 'regress'" in error_of(
        label_space, rows_of(label=["a"]), "label", "both"
    )


def test_targets_are_finite_numbers():
    rows = rows_of(label=["5.000", "-1e-3", "2"])
    space = label_space(rows, "label", "regress")
    assert space == LabelSpace("regress", ())
    assert space.outputs == 1
    assert space.encode(rows, "label") == [5.0, -0.001, 2.0]
    bad = rows_of(label=["1", "nan", "inf", "", "high", None])
    message = error_of(label_space, bad, "label", "regress")
    assert "no finite numbers: 'nan', 'inf', '', 'high', None, in rows 2, 3, 4, 5, 6" in message
    assert "in row 2" in error_of(space.encode, rows_of(label=[1.0, float("nan")]), "label")


# holding out


def test_held_out_rows_have_the_same_shares_and_are_the_same_every_time():
    rows = rows_of(label=["a"] * 80 + ["b"] * 20, id=list(range(100)))
    train, dev = holdout(rows, "label", 0.2, seed=3)
    assert (len(train), len(dev)) == (80, 20)
    assert dev["label"][:].count("b") == 4
    assert sorted(train["id"][:] + dev["id"][:]) == list(range(100))
    assert dev["id"][:] == sorted(dev["id"][:])
    assert holdout(rows, "label", 0.2, seed=3)[1]["id"][:] == dev["id"][:]
    assert holdout(rows, "label", 0.2, seed=4)[1]["id"][:] != dev["id"][:]


def test_a_class_of_one_row_stays_in_train():
    rows = rows_of(label=["a"] * 10 + ["b"] * 10 + ["rare"])
    train, dev = holdout(rows, "label", 0.2, seed=0)
    assert "rare" in train["label"][:]
    assert sorted(dev["label"][:]) == ["a", "a", "b", "b"]


@pytest.mark.parametrize("label", ["0.5", 0.5, ["x"], "x|y", None])
def test_labels_that_are_no_classes_are_split_at_random(label):
    column = None if label is None else "label"
    other = {str: "1.25", float: 1.0, list: ["y"]}.get(type(label), "z")
    train, dev = holdout(rows_of(label=[label] + [other] * 9, id=list(range(10))), column, 0.3, seed=0)
    assert (len(train), len(dev)) == (7, 3)


def test_class_label_columns_are_stratified():
    features = Features({"label": ClassLabel(names=["1.5", "2.5"])})
    _, dev = holdout(Dataset.from_dict({"label": [0, 1] * 10}, features=features), "label", 0.2, seed=0)
    assert sorted(dev["label"][:]) == [0, 0, 1, 1]


def test_impossible_fractions_are_refused():
    rows = rows_of(label=["a", "a", "b", "b", "c", "c"])
    for fraction in (0, 1, -0.1, 5):
        assert f"fraction={fraction}: choose a share between 0 and 1" in error_of(holdout, rows, "label", fraction, 0)
    assert "fraction=0.2 cannot divide 6 rows, 3 classes" in error_of(holdout, rows, "label", 0.2, 0)


# encoding text


def test_texts_become_token_ids_with_their_length(tokenizer):
    rows = rows_of(text=["the cat", "", "a dog ran"], label=["b", "a", "b"], extra=[1, 2, 3])
    encoded, truncated = encode_text(rows, TEXT, tokenizer, label_space(rows, "label", "single"), None)
    assert truncated == 0
    assert encoded["input_ids"][:] == [[2, 4, 5, 3], [2, 3], [2, 8, 11, 12, 3]]
    assert encoded["length"][:] == [4, 2, 5]
    assert encoded["labels"][:] == [1, 0, 1]
    assert set(encoded.column_names) == {"input_ids", "token_type_ids", "attention_mask", "length", "labels"}
    unlabelled, _ = encode_text(rows, Fields(text="text"), tokenizer, None, None)
    assert "labels" not in unlabelled.column_names


def test_pairs_equal_the_tokenizer_row_by_row(tokenizer):
    rows = rows_of(text=["the cat sat", "a"], other=["on", "the mat and dog"])
    with pytest.warns(DataWarning, match="2 of 2 rows"):
        encoded, truncated = encode_text(rows, PAIR, tokenizer, None, 6)
    assert truncated == 2
    for place in range(2):
        alone = tokenizer(rows[place]["text"], rows[place]["other"], truncation=True, max_length=6)
        assert {name: encoded[place][name] for name in alone} == dict(alone)


def test_truncated_rows_are_counted_and_warned_of(tokenizer):
    rows = rows_of(text=["the cat sat on a mat", "the cat", "the cat sat on a"])
    with pytest.warns(DataWarning, match=r"2 of 3 rows \(66.7%\) have more than 5 tokens and were truncated"):
        encoded, truncated = encode_text(rows, Fields(text="text"), tokenizer, None, 5)
    assert truncated == 2
    assert encoded["length"][:] == [5, 4, 5]
    assert encoded["input_ids"][0] == [2, 4, 5, 6, 3]


def test_without_max_length_the_tokenizer_decides():
    rows = rows_of(text=["the cat sat on a mat"] * 2)
    limited = word_tokenizer(pad_token="[PAD]", model_max_length=4)
    with pytest.warns(DataWarning, match="more than 4 tokens"):
        assert encode_text(rows, Fields(text="text"), limited, None, None)[1] == 2
    unlimited = word_tokenizer(pad_token="[PAD]")
    assert unlimited.model_max_length > 10**9
    assert encode_text(rows, Fields(text="text"), unlimited, None, None)[0]["length"][:] == [8, 8]


def test_a_cached_result_still_counts_what_was_truncated(tmp_path, tokenizer):
    rows_of(text=["the cat sat on a mat"]).save_to_disk(tmp_path / "saved")
    for _ in range(3):
        with pytest.warns(DataWarning):
            assert encode_text(read(tmp_path / "saved"), Fields(text="text"), tokenizer, None, 4)[1] == 1


def test_unusable_settings_are_refused(tokenizer):
    rows = rows_of(text=["a"], other=["b"], label=["x"])
    message = error_of(encode_text, rows, PAIR, tokenizer, None, 4)
    assert message == "max_length=4, but 3 tokens are special: choose at least 5"
    assert "choose at least 3" in error_of(encode_text, rows, Fields(text="text"), tokenizer, None, 0)
    space = LabelSpace("single", ("x", "y"))
    assert "name it as label" in error_of(encode_text, rows, Fields(text="text"), tokenizer, space, None)
    assert "use encode_images" in error_of(encode_text, rows, Fields(image="text"), tokenizer, None, None)
    assert "use encode_text" in error_of(encode_images, rows, Fields(text="text"), processor(), None)


def test_a_row_without_a_token_is_refused():
    rows = rows_of(text=["the", "", ""])
    message = error_of(encode_text, rows, Fields(text="text"), word_tokenizer(special=False), None, None)
    assert "text column 'text' gives no token in 2 of 3 rows, rows 2, 3" in message


# batches


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_is_padded_to_its_longest_row(tokenizer, side):
    tokenizer.padding_side = side
    rows = rows_of(text=["the cat", "a", "a dog ran on"], label=["b", "a", "b"])
    encoded, _ = encode_text(rows, TEXT, tokenizer, label_space(rows, "label", "single"), None)
    batch = Collate(tokenizer)([encoded[0], encoded[1]])
    assert batch.keys() == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    padded = [2, 8, 3, 1] if side == "right" else [1, 2, 8, 3]
    assert batch["input_ids"].tolist() == [[2, 4, 5, 3], padded]
    assert batch["attention_mask"].tolist() == [[1] * 4, [int(token != 1) for token in padded]]
    assert batch["labels"].dtype == torch.int64
    wide = Collate(tokenizer, pad_to_multiple_of=8)([encoded[0], encoded[2]])
    assert wide["input_ids"].shape == (2, 8)


@pytest.mark.parametrize(
    ("kind", "cells", "expected"),
    [("multi", ["a|b", ""], [[1.0, 1.0], [0.0, 0.0]]), ("regress", ["2.5", "1"], [2.5, 1.0])],
)
def test_labels_of_several_classes_and_numbers_are_float32(tokenizer, kind, cells, expected):
    rows = rows_of(text=["the", "a"], label=cells)
    encoded, _ = encode_text(rows, TEXT, tokenizer, label_space(rows, "label", kind), None)
    labels = Collate(tokenizer)([encoded[0], encoded[1]])["labels"]
    assert labels.dtype == torch.float32
    assert labels.tolist() == expected


def test_a_tokenizer_without_pad_token_pads_with_masked_zeros_and_stays_as_it_was():
    bare = word_tokenizer(model_input_names=["input_ids"])
    rows = rows_of(text=["the cat", "a"])
    encoded, _ = encode_text(rows, Fields(text="text"), bare, None, None)
    collate = Collate(bare)
    batch = collate([encoded[0], encoded[1]])
    assert batch["input_ids"].tolist() == [[2, 4, 5, 3], [2, 8, 3, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert collate.tokenizer is bare
    assert bare.pad_token is None


def test_a_collator_can_be_sent_to_another_process(tokenizer):
    rows = [{"input_ids": [2, 3], "length": 2}, {"input_ids": [2, 4, 3], "length": 3}]
    collate = pickle.loads(pickle.dumps(Collate(tokenizer, pad_to_multiple_of=4)))
    assert collate(rows)["input_ids"].tolist() == [[2, 3, 1, 1], [2, 4, 3, 1]]


def test_rows_that_are_no_batch_are_refused(tokenizer):
    assert "rows hold 'length': a batch needs" in error_of(Collate(tokenizer), [{"length": 1}])
    assert "give the collator the tokenizer" in error_of(Collate(), [{"input_ids": [1]}])


# the real files (not part of this repository)

PLAIN = TableOptions(quoting=False)
STS = TableOptions(
    header=False, quoting=False, columns=("genre", "file", "year", "id", "label", "sentence1", "sentence2")
)
CASES = [
    ("glue/rte/train.tsv", PLAIN, 2490, ("sentence1", "sentence2"), ("entailment", "not_entailment")),
    ("glue/rte/dev.tsv", PLAIN, 277, ("sentence1", "sentence2"), ("entailment", "not_entailment")),
    ("glue/mrpc/train.tsv", TableOptions(), 3668, ("sentence1", "sentence2"), ("0", "1")),
    ("glue/mrpc/dev.tsv", TableOptions(), 408, ("sentence1", "sentence2"), ("0", "1")),
    ("glue/mrpc/test.tsv", TableOptions(), 1725, ("sentence1", "sentence2"), ("0", "1")),
    ("glue/sst2/train.tsv.gz", PLAIN, 67349, ("sentence", None), ("0", "1")),
    ("glue/sst2/dev.tsv", PLAIN, 872, ("sentence", None), ("0", "1")),
    ("glue/sst2/test.tsv", PLAIN, 1821, ("content", None), ("0", "1")),
    ("glue/qnli/dev.tsv.gz", PLAIN, 5463, ("question", "sentence"), ("entailment", "not_entailment")),
    ("snli/validation.tsv.gz", TableOptions(), 9842, ("premise", "hypothesis"), ("0", "1", "2")),
    ("snli/test.tsv.gz", TableOptions(), 9824, ("premise", "hypothesis"), ("0", "1", "2")),
    ("glue/sts-b/sts-train.csv", STS, 5749, ("sentence1", "sentence2"), ()),
    ("glue/sts-b/sts-dev.csv", STS, 1500, ("sentence1", "sentence2"), ()),
    ("glue/sts-b/sts-test.csv", STS, 1379, ("sentence1", "sentence2"), ()),
]


@pytest.mark.filterwarnings("ignore:.*with more than 7 fields:sidestep.data.DataWarning")
@pytest.mark.parametrize(("name", "options", "count", "texts", "names"), CASES, ids=[case[0] for case in CASES])
def test_the_shared_files_are_read_whole(name, options, count, texts, names):
    if not (SHARED / name).exists():
        pytest.skip(f"{name} is not in {SHARED}: the data is for research use and no part of the repository")
    rows = read(SHARED / name, options)
    assert len(rows) == count
    check_fields(rows, Fields(text=texts[0], text2=texts[1], label="label"))
    space = label_space(rows, "label", "single" if names else "regress")
    assert space.names == names
    if not names:
        assert all(0 <= target <= 5 for target in space.encode(rows, "label"))


def test_ragged_rows_of_sts_b_are_named():
    path = SHARED / "glue/sts-b/sts-dev.csv"
    if not path.exists():
        pytest.skip(f"{path} is not there: the data is for research use and no part of the repository")
    with pytest.warns(DataWarning, match=r"of 1500 rows, 22 with more than 7 fields.*\(lines 1479, 1480"):
        read(path, STS)
