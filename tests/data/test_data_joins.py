"""What stands between texts: found by looking at what a tokenizer does, kept where texts are cut, told if missing."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.decoders import Metaspace
from transformers import PreTrainedTokenizerFast

from sidestep.data import DataError, DataWarning, Fields, Separators
from sidestep.data.encode import encode_text
from sidestep.data.joins import puts_nothing_between, separators_of, warn_of_glued
from sidestep.data.written import as_text, encode_prompts, encode_targets
from sidestep.kinds.prepare import prepare
from sidestep.kinds.task_data import stored_separators
from small_backbone import PAIRS, character_tokenizer
from small_tasks import tokenizer as bert_tokenizer
from written_tasks import tokenizer as word_tokenizer

PAIR = Fields(text="first", text2="second")
LABELLED = Fields(text="first", text2="second", label="answer")


def rows(pairs: list[tuple[str, str]] = PAIRS) -> Dataset:
    return Dataset.from_list([{"first": first, "second": second, "answer": "so."} for first, second in pairs])


def word_start_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama's: every text begins with a word-start mark, which is read back as a space."""
    ids = {character: place for place, character in enumerate("?▁abcdefghijklmnopqrstuvwxyz.\n")}
    tokens = Tokenizer(models.WordLevel(ids, unk_token="?"))
    tokens.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokens.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokens.decoder = Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="?")


@pytest.mark.parametrize(
    ("tokenizer", "glues"),
    [
        (character_tokenizer(), True),
        (character_tokenizer(pair="$A $B <end>"), True),
        (character_tokenizer(pair="<end> $A $B"), True),
        (character_tokenizer(pair="$A <end> $B"), False),
        (word_tokenizer("<s> $A", "<s> $A $B"), True),
        (word_tokenizer("$A </s>", "$A </s> $B </s>"), False),
        (bert_tokenizer(pad=True), False),
    ],
)
def test_a_newline_stands_only_where_the_tokenizer_puts_nothing(tokenizer: Any, glues: bool) -> None:
    assert puts_nothing_between(tokenizer) is glues
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # splitting at white space drops a newline
        assert separators_of(None, tokenizer, kind="single", pair=True) == Separators(pair="\n" if glues else "")
        assert separators_of("", tokenizer, kind="single", pair=True) == Separators()
        assert separators_of(" | ", tokenizer, kind="single", pair=True) == Separators(pair=" | ")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("length", [None, 20, 12, 5])
def test_a_separator_stands_where_the_texts_meet_however_they_are_cut(side: str, length: int | None) -> None:
    tokenizer = character_tokenizer()
    tokenizer.truncation_side = side
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        encoded, _ = encode_text(rows(), PAIR, tokenizer, None, length, separator="\n")
    for ids, (first, second) in zip(encoded["input_ids"][:], PAIRS, strict=True):
        text = tokenizer.decode(ids)
        before, after = text.split("\n")
        assert before in first
        assert after
        assert after in second
        assert (first.endswith(before) and second.endswith(after)) or side == "right"
        assert length is not None or text == f"{first}\n{second}"


def test_without_a_separator_pairs_are_encoded_as_before() -> None:
    encoded, _ = encode_text(rows(), PAIR, character_tokenizer(), None, None)
    assert [character_tokenizer().decode(ids) for ids in encoded["input_ids"][:]] == ["".join(pair) for pair in PAIRS]


def test_a_separator_that_the_tokenizer_drops_is_told() -> None:
    tokenizer = word_tokenizer("<s> $A", "<s> $A $B")
    with pytest.warns(DataWarning, match=r"the tokenizer drops '\\n', so nothing stands between the two texts"):
        separators_of(None, tokenizer, kind="single", pair=True)
    separators_of("| ", tokenizer, kind="single", pair=True)


def test_a_separator_without_anything_to_separate_is_refused() -> None:
    for kind in ("single", "text2text", "retrieval"):
        with pytest.raises(DataError, match=r"separator=' ', but no texts are put behind each other: it is for pairs"):
            separators_of(" ", character_tokenizer(), kind=kind, pair=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("separator", "read", "written"),
    [
        ("", "the film", "so.<end>"),
        (" ", "the film", " so.<end>"),
        ("\n", "the film\n", "so.<end>"),
        ("\nis it? ", "the film\nis it?", " so.<end>"),
    ],
)
def test_spaces_at_the_end_of_a_separator_are_written_with_the_answer(separator: str, read: str, written: str) -> None:
    tokenizer, fields = character_tokenizer(), Fields(text="first", label="answer")
    data = prepare(rows(), rows(), fields, tokenizer, kind="lm", separator=separator)
    assert as_text(data.train[0], tokenizer, "lm") == (read, written)
    assert data.generation is not None
    assert data.generation.max_new_tokens == len(written.replace("<end>", "|"))
    prompts, _ = encode_prompts(rows(), Fields(text="first"), tokenizer, "lm", None, data.separators)
    assert tokenizer.decode(prompts["input_ids"][0]) == read
    assert data.separators.without_start(written) == "so.<end>"
    assert data.separators.without_start("so. ") == "so. "


def test_pair_and_answer_have_their_separators() -> None:
    tokenizer = character_tokenizer()
    with pytest.warns(DataWarning, match="no white space"):
        data = prepare(rows(), rows(), LABELLED, tokenizer, kind="lm")
    assert data.separators == Separators(pair="\n")
    assert as_text(data.train[0], tokenizer, "lm") == ("the film\nit was good", "so.<end>")
    data = prepare(rows(), rows(), LABELLED, tokenizer, kind="lm", separator=" ? ")
    assert as_text(data.train[0], tokenizer, "lm") == ("the film ? it was good ?", " so.<end>")


def test_an_answer_of_white_space_alone_is_refused_behind_a_space_too() -> None:
    for start in ("", " "):
        with pytest.raises(DataError, match="gives no token to write in row 2"):
            encode_targets(["so", ""], character_tokenizer(), "lm", "answer", start=start)


def test_glued_answers_are_counted_and_shown() -> None:
    tokenizer = character_tokenizer()
    prompts, answers = ["is it good?", "is it bad? ", "the film"], ["so", "so", " fine"]
    with pytest.warns(DataWarning, match=r"in 1 of 3 training rows .* reads 'is it good\?so'\. Put some there with"):
        warn_of_glued(prompts, answers, tokenizer)
    for start, end in (("\n", ""), ("", " "), ("", "\n")):
        warn_of_glued([f"is it{end}"], [f"{start}so"], tokenizer)  # a warning would be an error


@pytest.mark.parametrize("tokenizer", [word_start_tokenizer(), word_tokenizer("<s> $A", "<s> $A $B")])
def test_a_tokenizer_that_has_words_begin_with_a_space_glues_nothing(tokenizer: Any) -> None:
    warn_of_glued(["is it good"], ["so"], tokenizer)


def test_an_explicit_empty_separator_is_not_warned_of() -> None:
    data = prepare(rows(), rows(), LABELLED, character_tokenizer(), kind="lm", separator="")
    assert data.separators == Separators()


def test_a_task_stores_its_separators_and_says_nothing_where_there_are_none() -> None:
    tokenizer, label = character_tokenizer(), Fields(text="first", text2="second", label="first")
    data = prepare(rows(), rows(), label, tokenizer, kind="single")
    assert data.preprocessing()["separators"] == {"pair": "\n", "answer": ""}
    assert stored_separators(data.preprocessing()) == data.separators
    plain = prepare(rows(), rows(), label, tokenizer, kind="single", separator="")
    assert "separators" not in plain.preprocessing()
    assert stored_separators(plain.preprocessing()) == Separators()
