"""Texts whose words have tags: how they are read, cut into windows, and what is refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value

from sidestep.data import DataError, DataWarning, Fields, read
from sidestep.data.tagged import CollateTagged, Texts, encode_tagged, tag_space
from sidestep.data.windows import ROW, Windows
from small_tasks import WORDS, tokenizer

FIELDS = Fields(text="words", label="tags")
TAGS = ("O", "B-x", "I-x")


def rows(*cells: tuple[list[str], list[Any]]) -> Dataset:
    return Dataset.from_list([{"words": words, "tags": tags} for words, tags in cells])


def long_rows(count: int = 5, words: int = 100, seed: int = 0) -> Dataset:
    chance = random.Random(seed)
    drawn = [chance.choices(WORDS, k=chance.randrange(1, words)) for _ in range(count)]
    return rows(*((own, chance.choices(TAGS, k=len(own))) for own in drawn))


def test_each_word_has_its_label_in_one_window() -> None:
    data = long_rows()
    labels = tag_space(data, FIELDS, "tokens")
    encoded, cut = encode_tagged(data, FIELDS, tokenizer(pad=True), labels, 16)
    assert cut == 0
    assert max(encoded["length"][:]) == 16
    assert len(encoded) > len(data)
    found: dict[int, dict[int, str]] = {}
    for window in encoded:
        assert sum(label != -100 for label in window["labels"]) == len(window["words"])
        for word, place in zip(window["words"], window["places"], strict=True):
            own = found.setdefault(window[ROW], {})
            assert word not in own
            own[word] = labels.names[window["labels"][place]]
            assert (
                tokenizer(pad=True).convert_ids_to_tokens(window["input_ids"][place])
                == data[window[ROW]]["words"][word]
            )
    assert [[own[word] for word in range(len(own))] for _, own in sorted(found.items())] == data["tags"][:]


def test_a_word_is_read_where_most_tokens_stand_around_it() -> None:
    data = rows((list(WORDS) * 3, ["O"] * 42))
    encoded, _ = encode_tagged(data, FIELDS, tokenizer(pad=True), None, 18)
    windows = len(encoded)
    for number, window in enumerate(encoded):
        places = window["places"]
        # 16 real tokens, of which 4 are shared with either neighbour: each has half of them
        assert places[0] >= (1 if number == 0 else 3)
        assert places[-1] <= (16 if number == windows - 1 else 15)


def test_texts_without_a_limit_and_short_ones_are_one_window() -> None:
    fast = tokenizer(pad=True)
    texts = [" ".join(WORDS), "good film"]
    whole = Windows.of(fast, texts, max_length=None, columns="texts")
    assert whole.columns[ROW] == [0, 1]
    for own, text in zip(whole.columns["input_ids"], texts, strict=True):
        assert own == fast(text)["input_ids"]


def test_a_question_stands_in_front_of_each_window_whole() -> None:
    fast = tokenizer(pad=True)
    found = Windows.of(fast, [" ".join(WORDS) * 2], ["good film"], max_length=12, columns="context")
    assert len(found) > 2
    question = fast("good film")["input_ids"]
    for ids, offsets in zip(found.columns["input_ids"], found.columns["offsets"], strict=True):
        assert ids[: len(question)] == question
        assert all(place == (-1, -1) for place in offsets[: len(question)])


def test_a_question_that_fills_the_window_is_refused() -> None:
    with pytest.raises(DataError, match=r"has up to 9 tokens, special ones included, in row 2 .* A window has 8"):
        Windows.of(tokenizer(pad=True), ["a", "a"], ["good", "good " * 6], max_length=8, columns="x")


def test_spans_of_texts_become_tags_of_words() -> None:
    text = "The film, by Ann-Marie Lee."
    data = Dataset.from_list(
        [{"words": text, "tags": [{"start": 13, "end": 26, "label": "PER"}]}, {"words": "a", "tags": []}]
    )
    texts = Texts.of(data, "words")
    assert [text[start:end] for start, end in texts.words[0]] == [
        "The",
        "film",
        ",",
        "by",
        "Ann",
        "-",
        "Marie",
        "Lee",
        ".",
    ]
    assert texts.tags(data, "tags") == [["O"] * 4 + ["B-PER"] + ["I-PER"] * 3 + ["O"], ["O"]]
    assert tag_space(data, FIELDS, "tokens").names == ("O", "B-PER", "I-PER")


def test_spans_within_words_are_read_as_the_words_and_counted() -> None:
    data = Dataset.from_list([{"words": "good films", "tags": [{"start": 5, "end": 8, "label": "a"}]}])
    with pytest.warns(DataWarning, match="1 spans begin or end within a word"):
        assert Texts.of(data, "words").tags(data, "tags") == [["O", "B-a"]]
    tag_space(data, FIELDS, "tokens")  # says nothing: the rows are told of once, when they are encoded


def test_a_word_without_a_token_is_predicted_as_nothing_and_still_counts() -> None:
    data = rows((["good", "", "film"], ["O", "B-x", "I-x"]))
    encoded, _ = encode_tagged(data, FIELDS, tokenizer(pad=True), tag_space(data, FIELDS, "tokens"), None)
    assert encoded[0]["places"] == [1, -1, 2]
    assert encoded[0]["tags"] == [0, 1, 2]
    assert encoded[0]["labels"] == [-100, 0, 2, -100]


def test_words_without_a_label_are_left_out_of_the_loss() -> None:
    data = rows((["good", "film"], ["O", None]), (["bad", "film"], ["B-x", "I-x"]))
    encoded, _ = encode_tagged(data, FIELDS, tokenizer(pad=True), tag_space(data, FIELDS, "tokens"), None)
    assert encoded["labels"][:] == [[-100, 0, -100, -100], [-100, 1, 2, -100]]


def test_names_of_a_class_label_keep_their_order_and_minus_100_is_no_label() -> None:
    names = ["I-x", "O", "B-x"]
    features = Features({"words": List(Value("string")), "tags": List(ClassLabel(names=names))})
    data = Dataset.from_dict({"words": [["good", "film"]], "tags": [[2, 1]]}, features=features)
    assert tag_space(data, FIELDS, "tokens").names == tuple(names)
    numbers = Dataset.from_dict({"words": [["good", "film", "a"]], "tags": [[7, 3, -100]]})
    assert tag_space(numbers, FIELDS, "tokens").names == ("3", "7")


def test_batches_pad_labels_as_they_pad_texts() -> None:
    data = rows((["good", "film"], ["O", "B-x"]), (["bad"], ["O"]))
    encoded, _ = encode_tagged(data, FIELDS, tokenizer(pad=True), tag_space(data, FIELDS, "tokens"), None)
    batch = CollateTagged(tokenizer(pad=True), padding_side="right")(list(encoded))
    assert batch["labels"].tolist() == [[-100, 0, 1, -100], [-100, 0, -100, -100]]
    assert torch.equal(batch["attention_mask"].sum(1), torch.tensor([4, 3]))
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels"} & set(batch)


def test_a_file_of_the_shared_tasks_has_a_row_for_each_sentence(tmp_path: Path) -> None:
    path = tmp_path / "train.conll"
    path.write_text("-DOCSTART- -X- O\n\nThe DT O\nfilm NN B-work\n\n\nGood JJ O\n")
    found = read(path)
    assert found["tokens"][:] == [["The", "film"], ["Good"]]
    assert found["tags"][:] == [["O", "B-work"], ["O"]]
    path.write_text("New York\tB-city\nis\tO\n")
    assert read(path)["tokens"][:] == [["New York", "is"]]
    path.write_text("a O\nb\n")
    with pytest.raises(DataError, match="line 2 has 1 columns, where the first one has 2"):
        read(path)


class Slow:
    is_fast = False


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (rows((["a", "b"], ["O"]), (["a"], ["B-x"])), r"in 1 of 2 rows, row 1 .*\(2 words and 1 tags in row 1\)"),
        (Dataset.from_list([{"words": ["a"], "tags": "O"}]), "name a column of lists of tags"),
        (Dataset.from_list([{"words": "a", "tags": "O"}]), "holds texts, as the rows themselves do"),
        (Dataset.from_list([{"words": 3, "tags": ["O"]}]), "name a column of texts, or of lists of words"),
        (rows((["a"], ["O"])), r"holds 1 tag \('O'\) in 1 rows"),
        (Dataset.from_dict({"words": [["a"], None], "tags": [["O"], ["O"]]}), "has no text in row 2"),
        (Dataset.from_dict({"words": [["a"], ["b"]], "tags": [["O"], None]}), "has no tags in row 2"),
        (
            Dataset.from_list([{"words": "good", "tags": [{"start": 0, "end": 9, "label": "a"}]}]),
            "what is no span of its text in row 1",
        ),
        (
            Dataset.from_list([{"words": "a b", "tags": [{"start": 0, "end": 3, "label": x} for x in "ab"]}]),
            "has spans over each other in row 1",
        ),
        (Dataset.from_dict({"words": ["a", "b"], "tags": [[], None]}), "no list of spans in row 2"),
        (Dataset.from_list([{"text": ["a"]}]), "words"),
    ],
)
def test_what_cannot_be_read_is_refused_by_row(data: Dataset, says: str) -> None:
    with pytest.raises(DataError, match=says):
        tag_space(data, FIELDS, "tokens")


def test_tags_that_training_never_had_are_refused() -> None:
    labels = tag_space(rows((["a", "b"], ["O", "B-x"])), FIELDS, "tokens")
    with pytest.raises(DataError, match=r"never had: 'B-y', in row 2"):
        encode_tagged(rows((["a"], ["O"]), (["a"], ["B-y"])), FIELDS, tokenizer(pad=True), labels, None)


def test_a_tokenizer_that_tells_no_places_is_refused() -> None:
    with pytest.raises(DataError, match="Slow does not tell which token stands where"):
        encode_tagged(rows((["a", "b"], ["O", "B-x"])), FIELDS, Slow(), None, None)
