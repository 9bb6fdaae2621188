"""transformers' pipelines on attached models, and the config by which they know what a head puts out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from transformers import PreTrainedTokenizerFast, pipeline

import sidestep as ss
from architectures import IMAGE, PAIR, TEXT
from small_tasks import tokenizer as tokens
from tiny import FAMILIES, randomize

READ = ss.ReadConfig(rank=2)
NAMES = ["bad", "fair", "good", "fine", "best"]
TEXTS = ["good", "bad film"]


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    return tokens(pad=True)


def bert(kind: Any = t.BertModel, **changes: Any) -> Any:
    torch.manual_seed(0)
    return kind(t.BertConfig(**{**TEXT, "vocab_size": 200}, **changes)).eval()


def attached(backbone: Any, head: Any = None) -> ss.SideModel:
    model = ss.attach(backbone, READ, head=head).eval()
    randomize(model)
    return model


def logits(model: Any, words: Any, text: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**words(text, return_tensors="pt")).logits[0]


# --- texts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [None, NAMES])
def test_classes_have_the_heads_own_names(labels: Any, words: Any) -> None:
    model = attached(bert(), ss.Classify(num_labels=5, labels=labels))
    names = labels or [f"LABEL_{index}" for index in range(5)]
    for text in TEXTS:
        shares = logits(model, words, text).softmax(-1)
        found = pipeline("text-classification", model=model, tokenizer=words)(text, top_k=None)
        assert {row["label"]: row["score"] for row in found} == pytest.approx(
            dict(zip(names, shares.tolist(), strict=True)), abs=1e-6
        )


def test_several_labels_have_a_share_each(words: Any) -> None:
    model = attached(bert(), ss.Classify(num_labels=3, problem="multi"))
    found = pipeline("text-classification", model=model, tokenizer=words)("good", top_k=None)
    shares = logits(model, words, "good").sigmoid()
    assert sorted(row["score"] for row in found) == pytest.approx(sorted(shares.tolist()), abs=1e-6)


@pytest.mark.parametrize("targets", [1, 3])
def test_a_regression_is_its_numbers(targets: int, words: Any) -> None:
    model = attached(bert(), ss.Regress(targets=targets, center=7.0))
    found = pipeline("text-classification", model=model, tokenizer=words)("good", top_k=None)
    assert sorted(row["score"] for row in found) == pytest.approx(sorted(logits(model, words, "good").tolist()))
    assert max(row["score"] for row in found) > 1


def test_an_own_head_answers_as_the_bare_model(words: Any) -> None:
    backbone = bert(t.BertForSequenceClassification, num_labels=3)
    bare = pipeline("text-classification", model=backbone, tokenizer=words)("good", top_k=None)
    model = ss.attach(backbone, READ).eval()
    assert pipeline("text-classification", model=model, tokenizer=words)("good", top_k=None) == bare
    assert "text" in repr(pipeline("text-classification", model=model, tokenizer=words))


def test_tokens_are_classified_by_an_own_head(words: Any) -> None:
    model = ss.attach(bert(t.BertForTokenClassification, num_labels=3), READ).eval()
    found = pipeline("token-classification", model=model, tokenizer=words)("good film")
    assert {row["entity"] for row in found} <= {"LABEL_0", "LABEL_1", "LABEL_2"}


@pytest.mark.parametrize("method", [READ, ss.LSTConfig(reduction=2, heads=2, dropout=0.0)], ids=["read", "lst"])
def test_text_is_generated_as_by_generate(method: Any, words: Any) -> None:
    torch.manual_seed(0)
    config = t.GPT2Config(vocab_size=200, n_embd=16, n_layer=3, n_head=2, n_positions=64, eos_token_id=1)
    model = ss.attach(t.GPT2LMHeadModel(config).eval(), method).eval()
    randomize(model)
    write = pipeline("text-generation", model=model, tokenizer=words)
    said = write("good", max_new_tokens=4, do_sample=False, return_full_text=False)[0]["generated_text"]
    ids = words("good", return_tensors="pt")
    expected = model.generate(**ids, max_new_tokens=4, do_sample=False, pad_token_id=words.pad_token_id)
    new = expected[0, ids["input_ids"].shape[1] :]
    assert said == words.decode(new, skip_special_tokens=True)
    assert "text" in repr(write)


# --- images ------------------------------------------------------------------------------------------------


def test_images_are_classified(tmp_path: Path) -> None:
    import PIL.Image

    torch.manual_seed(0)
    model = attached(t.ViTModel(t.ViTConfig(**IMAGE)).eval(), ss.Classify(num_labels=5, labels=NAMES))
    processor = t.ViTImageProcessor(size={"height": 16, "width": 16})
    found = pipeline("image-classification", model=model, image_processor=processor)(PIL.Image.new("RGB", (20, 20)))
    assert {row["label"] for row in found} == set(NAMES)


# --- what a model says of itself ---------------------------------------------------------------------------


def test_only_a_model_that_writes_can_generate() -> None:
    pairs = [
        (t.BartForConditionalGeneration(t.BartConfig(**PAIR)), True),
        (FAMILIES["llama"].model(), True),
        (bert(t.BertForSequenceClassification), False),
        (FAMILIES["timm_vit"].model(), False),
    ]
    for backbone, can in pairs:
        assert ss.attach(backbone, READ).can_generate() == can
    assert not attached(FAMILIES["llama"].model(), ss.Classify(num_labels=2)).can_generate()


def test_the_config_tells_of_the_head_and_the_backbones_own_does_not() -> None:
    backbone = bert(num_labels=4)
    before = copy.deepcopy(backbone.config.to_dict())
    model = attached(backbone, ss.Classify(num_labels=5, labels=NAMES))
    assert model.config.num_labels == 5
    assert model.config.id2label == dict(enumerate(NAMES))
    assert model.config.label2id == {name: index for index, name in enumerate(NAMES)}
    assert model.config.problem_type == "single_label_classification"
    assert model.config.hidden_size == backbone.config.hidden_size
    assert backbone.config.to_dict() == before
    assert ss.detach(model).config.to_dict() == before


@pytest.mark.parametrize(
    ("head", "outputs", "problem"),
    [
        (ss.Classify(num_labels=1, problem="multi"), 1, "multi_label_classification"),
        (ss.Regress(), 1, "regression"),
        (ss.Regress(targets=3), 3, "regression"),
    ],
)
def test_each_head_is_described(head: Any, outputs: int, problem: str) -> None:
    config = attached(bert(), head).config
    assert (config.num_labels, config.problem_type) == (outputs, problem)


def test_what_training_writes_into_an_own_heads_config_goes_with_the_task() -> None:
    backbone = bert(t.BertForSequenceClassification, num_labels=3)
    before = copy.deepcopy(backbone.config.to_dict())
    model = ss.attach(backbone, READ)
    model.config.id2label, model.config.label2id = {0: "a", 1: "b", 2: "c"}, {"a": 0, "b": 1, "c": 2}
    model(input_ids=torch.ones(2, 4, dtype=torch.long), labels=torch.tensor([0, 1]))
    assert backbone.config.problem_type == "single_label_classification"  # transformers notes it at the first loss
    rest = model.attachment.rest()
    assert backbone.config.to_dict() == before
    model.attachment.resume(rest)
    assert backbone.config.id2label[2] == "c"
    assert backbone.config.problem_type == "single_label_classification"
    assert ss.detach(model).config.to_dict() == before


def test_saved_names_come_back_for_pipelines(words: Any, tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "bert")
    model = attached(t.BertModel.from_pretrained(tmp_path / "bert"), ss.Classify(num_labels=5, labels=NAMES))
    model.save_pretrained(tmp_path / "task")
    loaded = ss.load(tmp_path / "task")
    assert pipeline("text-classification", model=loaded, tokenizer=words)("good")[0]["label"] in NAMES


def test_an_own_heads_names_come_back_on_a_backbone_that_has_others(tmp_path: Path) -> None:
    backbone = bert(t.BertForSequenceClassification, num_labels=3)
    model = ss.attach(backbone, READ)
    model.config.id2label, model.config.label2id = {0: "a", 1: "b", 2: "c"}, {"a": 0, "b": 1, "c": 2}
    model.save_pretrained(tmp_path)
    before = ss.detach(model).config.to_dict()
    loaded = ss.load(tmp_path, backbone)
    assert loaded.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert loaded.config.num_labels == 3
    assert ss.detach(loaded).config.to_dict() == before
