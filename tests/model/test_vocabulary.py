"""Tokens that a backbone has no embeddings for are told before a run, and resized tables before a save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers as t
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerFast

import sidestep as ss
from architectures import PAIR, TEXT, VOCABULARY
from commands import FAST, refusal, succeed
from sidestep.backbone import token_rows
from sidestep.data import DataError
from sidestep.data.vocabulary import check_tokens
from sidestep.disk.task_folder import TaskError
from small_tasks import reviews, text_backbone, write

HEAD = ss.Classify(num_labels=2)
READ = ss.ReadConfig(rank=2)


def words(count: int, pad: int = 0) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    known = Tokenizer(models.WordLevel({f"w{i}": i for i in range(count)}, unk_token="w2"))
    return PreTrainedTokenizerFast(tokenizer_object=known, pad_token=f"w{pad}", unk_token="w2")


def rows(*ids: list[int], **columns: Any) -> Dataset:
    return Dataset.from_dict({"input_ids": list(ids), **columns})


# --- rows --------------------------------------------------------------------------------------------------


def test_only_tokens_that_are_there_count() -> None:
    model = t.BertModel(t.BertConfig(**TEXT))
    check_tokens(model, rows([3, 4], [39]), words(60))  # a larger vocabulary of which nothing else is used
    model.resize_token_embeddings(64)  # a padded table
    check_tokens(model, rows([3, 59], [39]), words(60))


def test_a_token_without_an_embedding_is_named_with_its_rows() -> None:
    model = t.BertModel(t.BertConfig(**TEXT))
    says = (
        r"has token 40 \('w40'\), in rows 2, 3 \(the first is 1\) of the dev rows, but BertModel has embeddings for 40 "
        r"tokens, 0 to 39: .*resize_token_embeddings"
    )
    with pytest.raises(DataError, match=says):
        check_tokens(model, rows([3, 4], [40], [45, 3]), words(60), split="dev")


def test_the_token_of_padding_counts_where_texts_are_padded() -> None:
    model, tokenizer = t.GPT2Model(t.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2)), words(41, 40)
    with pytest.raises(DataError, match=r"token 40 \('w40'\), with which texts are padded, but GPT2Model"):
        check_tokens(model, rows([3, 4], [5]), tokenizer)
    check_tokens(model, rows([3, 4], [5, 6]), tokenizer)


def test_targets_are_looked_at_where_texts_are_written() -> None:
    model = t.BartForConditionalGeneration(t.BartConfig(**PAIR))
    check_tokens(model, rows([3], labels=[[99]]), words(100))
    with pytest.raises(DataError, match="token 99"):
        check_tokens(model, rows([3], labels=[[4, 99]]), words(100), kind="text2text")


def test_a_table_of_the_decoder_may_have_another_size() -> None:
    sizes = {name: value for name, value in PAIR.items() if name != "vocab_size"}
    fsmt = t.FSMTModel(t.FSMTConfig(langs=["en", "de"], src_vocab_size=30, tgt_vocab_size=20, **sizes))
    assert token_rows(fsmt) == (30, 20)


@pytest.mark.parametrize("build", [lambda: nn.Linear(2, 2), lambda: t.ViTModel(t.ViTConfig(num_hidden_layers=1))])
def test_a_model_that_reads_no_tokens_has_none(build: Any) -> None:
    assert token_rows(build()) == (None, None)


# --- commands ----------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A backbone whose tokenizer has one token more than it has embeddings, and rows with and without that."""
    text_backbone(tmp_path / "bert")
    tokenizer = t.AutoTokenizer.from_pretrained(tmp_path / "bert")
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(tmp_path / "bert")
    good = reviews(32)
    write(tmp_path / "good.csv", good)
    write(tmp_path / "bad.csv", [{**row, "text": f"{row['text']} <extra>"} for row in good])
    return tmp_path


def test_training_is_refused_before_the_first_step(place: Path) -> None:
    source = ["--backbone", place / "bert", "--text", "text", *FAST, "--output", place / "task"]
    for files in (("bad", "good"), ("good", "bad")):
        train, dev = (place / f"{name}.csv" for name in files)
        assert "'<extra>'" in refusal("train", *source, "--train", train, "--dev", dev)
    assert not (place / "task").exists()


def test_scores_and_predictions_are_refused(place: Path) -> None:
    train = ["--train", place / "good.csv", "--dev", place / "good.csv", "--text", "text", *FAST]
    succeed("train", "--backbone", place / "bert", *train, "--output", place / "task")
    succeed("eval", place / "task", "--data", place / "good.csv", "--quiet")
    assert "'<extra>'" in refusal("eval", place / "task", "--data", place / "bad.csv", "--quiet")
    out = place / "out.csv"
    assert "'<extra>'" in refusal("predict", place / "task", "--data", place / "bad.csv", "--output", out)
    assert not out.exists()


# --- resized tables ----------------------------------------------------------------------------------------


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    t.BertModel(t.BertConfig(**TEXT)).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.mark.parametrize("size", [VOCABULARY + 1, VOCABULARY - 1])
@pytest.mark.parametrize("kind", [t.BertModel, t.BertForMaskedLM, t.BertForSequenceClassification])
def test_a_task_on_a_resized_backbone_is_not_written(kind: Any, size: int, bert: Path, tmp_path: Path) -> None:
    backbone = kind.from_pretrained(bert)
    backbone.resize_token_embeddings(size)
    model = ss.attach(backbone, READ, head=HEAD)
    says = rf"{kind.__name__} has embeddings for {size} tokens, but what .*bert loads has {VOCABULARY}.*save that"
    with pytest.raises(TaskError, match=says):
        model.save_pretrained(tmp_path / "task")
    assert not (tmp_path / "task").exists()


def test_a_resized_backbone_that_was_saved_has_tasks(bert: Path, tmp_path: Path) -> None:
    backbone = t.BertModel.from_pretrained(bert)
    backbone.resize_token_embeddings(VOCABULARY + 8)
    backbone.save_pretrained(tmp_path / "resized")
    model = ss.attach(t.BertModel.from_pretrained(tmp_path / "resized"), READ, head=HEAD)
    model.save_pretrained(tmp_path / "task")
    assert ss.load(tmp_path / "task").backbone.config.vocab_size == VOCABULARY + 8


def test_a_resized_backbone_without_a_name_has_tasks(tmp_path: Path) -> None:
    backbone = t.BertModel(t.BertConfig(**TEXT))
    backbone.resize_token_embeddings(VOCABULARY + 8)
    model = ss.attach(backbone, READ, head=HEAD)
    model.save_pretrained(tmp_path / "task")
    assert ss.load(tmp_path / "task", ss.detach(model)).digest == model.digest


@pytest.mark.parametrize("named", [True, False])
def test_resizing_under_a_task_is_told_when_it_is_saved(named: bool, bert: Path, tmp_path: Path) -> None:
    backbone = t.BertModel.from_pretrained(bert) if named else t.BertModel(t.BertConfig(**TEXT))
    model = ss.attach(backbone, READ, head=HEAD)
    backbone.resize_token_embeddings(VOCABULARY + 1)
    says = r"BertModel was resized while the task was attached \(embeddings.word_embeddings.weight from \(40, 16\) to"
    with pytest.raises(TaskError, match=says):
        model.save_pretrained(tmp_path / "task")
    assert not (tmp_path / "task").exists()
