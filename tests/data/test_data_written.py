"""Texts to write: which columns are targets, how prompts and targets become token ids, and what a batch of them is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features

from sidestep.backbone.processors import load_processor
from sidestep.data import CollateWritten, DataError, DataWarning, Fields, Generation, LabelSpace
from sidestep.data.labels import label_space, target_texts
from sidestep.data.written import encode_prompts, encode_targets, prompt_limit, with_targets
from sidestep.kinds.prepare import prepare
from sidestep.kinds.running import prompt_collator
from written_tasks import answered, llama_backbone, tokenizer

T5 = tokenizer("$A </s>", "$A </s> $B </s>")
LLAMA = tokenizer("<s> $A", "<s> $A $B")
TEXT = Fields(text="text", label="answer")
PAD, END, BEGIN, UNKNOWN = range(4)


def rows(*answers: Any) -> Dataset:
    return Dataset.from_dict({"answer": list(answers)})


def test_names_of_classes_are_targets() -> None:
    features = Features({"label": ClassLabel(names=["negative", "positive"])})
    found = Dataset.from_dict({"label": [1, 0]}, features=features)
    assert target_texts(found, "label") == ["positive", "negative"]
    space = label_space(found, "label", "text2text")
    assert space == LabelSpace("text2text", ())
    assert space.encode(found, "label") == ["positive", "negative"]


@pytest.mark.parametrize("answers", [(0, 1, 0), (0.5, 2.0, 1.0), ("0", "1", "1"), ("3.8", "0.2", "5")])
def test_numbers_are_no_text(answers: Any) -> None:
    with pytest.raises(DataError, match=r"'answer' holds labels that are no text \(.*\)\. Write words in their place"):
        target_texts(rows(*answers), "answer")


def test_a_number_among_words_is_one() -> None:
    assert target_texts(rows("17", "many"), "answer") == ["17", "many"]


@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_target_is_refused_with_its_rows(empty: str) -> None:
    with pytest.raises(DataError, match=r"has an empty text in 2 of 3 rows, rows 1, 3 \(the first is 1\)"):
        target_texts(rows(empty, "good", empty), "answer")


def test_missing_targets_and_lists_are_refused() -> None:
    with pytest.raises(DataError, match="has no label in 1 of 2 rows, row 2"):
        target_texts(rows("good", None), "answer")
    with pytest.raises(DataError, match="holds lists: a text to write is one text a row"):
        target_texts(rows(["good"], ["bad"]), "answer")


def test_targets_end_and_a_decoders_begin_with_nothing() -> None:
    good, bad = (LLAMA.convert_tokens_to_ids(word) for word in ("good", "bad"))
    assert encode_targets(["good bad", "bad"], LLAMA, "lm", "answer") == [[good, bad, END], [bad, END]]
    assert encode_targets(["good"], T5, "text2text", "answer") == [[good, END]]


def test_a_tokenizer_that_never_ends_is_refused() -> None:
    endless = tokenizer("$A", "$A $B")
    endless.eos_token = None
    with pytest.raises(DataError, match="has no end-of-sequence token, so a model would never stop writing"):
        encode_targets(["good"], endless, "lm", "answer")


def test_what_the_tokenizer_does_not_know_is_told_and_stays_in_the_target() -> None:
    with pytest.warns(DataWarning, match=r"no token for a part of 1 of 2 texts, row 2 .* never be written"):
        ids = encode_targets(["good", "good stuff"], T5, "text2text", "answer")
    prompts, _ = encode_prompts(Dataset.from_dict({"text": ["a", "a"]}), Fields(text="text"), T5, "text2text", None)
    found = with_targets(prompts, ["good", "good stuff"], ids, T5)
    assert found["target"][:] == ["good", "good stuff"]
    assert found["length"][:] == [2 + 2, 2 + 3]


def test_a_prompt_is_cut_from_the_left_and_the_completion_stays_whole(tmp_path: Path) -> None:
    llama = load_processor(llama_backbone(tmp_path / "llama", positions=8))
    assert llama.model_max_length == 8  # what the model has positions for; the tokenizer knew no limit
    long = Dataset.from_list(
        [{"text": "the film was very very good", "answer": "bad"}, {"text": "a book", "answer": "very good"}]
    )
    with pytest.warns(DataWarning, match=r"1 of 2 rows \(50.0%\) have more than 5 tokens"):
        data = prepare(long, long, TEXT, llama, kind="lm")
    assert (data.max_length, data.generation) == (5, Generation(max_new_tokens=3))
    assert llama.decode(data.train[0]["input_ids"]) == "<s> was very very good"
    assert llama.decode(data.train[1]["labels"]) == "very good </s>"
    assert max(data.train["length"][:]) <= 8
    assert llama.truncation_side == "right"  # the caller's tokenizer stays as it is


def test_a_completion_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    targets = [[5, END], [5] * 6 + [END]]
    with pytest.raises(DataError, match=r"may have 8 tokens together, but the completions .* up to 7, in row 2"):
        prompt_limit(LLAMA, 8, targets, 2, pair=False)
    with pytest.raises(DataError, match="max_new_tokens=7 leaves no room for a prompt"):
        prompt_limit(LLAMA, 8, targets[:1], 7, pair=False)
    assert prompt_limit(LLAMA, 8, targets[:1], 3, pair=False) == 5
    assert prompt_limit(LLAMA, None, targets, 3, pair=False) is None


def test_a_decoders_prompt_does_not_end() -> None:
    ending = tokenizer("<s> $A </s>", "<s> $A </s> $B </s>")
    prompts, _ = encode_prompts(Dataset.from_dict({"text": ["good film"]}), Fields(text="text"), ending, "lm", None)
    assert ending.decode(prompts[0]["input_ids"]) == "<s> good film"
    assert prompts[0]["length"] == 3


def test_the_decoder_is_trained_on_the_completion_alone() -> None:
    found = [{"input_ids": [BEGIN, 5, 6], "labels": [7, END]}, {"input_ids": [BEGIN], "labels": [8, 9, END]}]
    batch = CollateWritten(LLAMA, padding_side="right", kind="lm")(found)
    assert batch["input_ids"].tolist() == [[BEGIN, 5, 6, 7, END], [BEGIN, 8, 9, END, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 7, END], [-100, 8, 9, END, -100]]


def test_an_encoder_decoders_targets_are_padded_for_themselves() -> None:
    found = [{"input_ids": [5, 6, END], "labels": [7, END]}, {"input_ids": [5, END], "labels": [8, 9, 7, END]}]
    batch = CollateWritten(T5, kind="text2text")(found)
    assert batch["input_ids"].tolist() == [[5, 6, END], [5, END, PAD]]
    assert batch["labels"].tolist() == [[7, END, -100, -100], [8, 9, 7, END]]


def test_prompts_stand_next_to_what_is_written() -> None:
    found = [{"input_ids": [BEGIN, 5, 6]}, {"input_ids": [BEGIN]}]
    batch = prompt_collator(LLAMA, "lm")(found)
    assert batch["input_ids"].tolist() == [[BEGIN, 5, 6], [PAD, PAD, BEGIN]]
    assert torch.equal(batch["attention_mask"], torch.tensor([[1, 1, 1], [0, 0, 1]]))


def test_how_texts_are_written_is_for_texts_only() -> None:
    found = Dataset.from_list(answered(8))
    with pytest.raises(DataError, match=r"max_new_tokens and num_beams are for texts .* but the problem is 'single'"):
        prepare(found, found, TEXT, T5, num_beams=2)
    with pytest.raises(DataError, match="num_beams=0, but it must be at least 1"):
        prepare(found, found, TEXT, T5, kind="text2text", num_beams=0)
    with pytest.raises(DataError, match="max_new_tokens=0, but it must be at least 1"):
        prepare(found, found, TEXT, T5, kind="text2text", max_new_tokens=0)


def test_held_out_rows_of_free_texts_are_drawn_at_random() -> None:
    free = Dataset.from_list([{"text": "film", "answer": f"good {number}"} for number in range(10)])
    with pytest.warns(DataWarning, match="no token for a part"):
        data = prepare(free, None, TEXT, T5, kind="text2text", dev_fraction=0.2)
    assert (len(data.train), len(data.dev)) == (8, 2)
