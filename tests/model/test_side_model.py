"""What an attached model trains, what it belongs to, and what cannot be attached to."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import nn

import sidestep as ss
from architectures import CAUSAL, TEXT, t5_config, timm_vit
from sidestep.backbone import digest_of, pretrained_tensors
from sidestep.fold import FoldError
from tiny import FAMILIES, LABELS

HEAD = ss.Classify(num_labels=LABELS)
READ = ss.ReadConfig(rank=2)
BERT = t.BertConfig(**TEXT, num_labels=LABELS)

CLASSIFIER = {"classifier.weight", "classifier.bias"}
POOLER = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
TRANSFORM = {f"cls.predictions.transform.{name}" for name in ("dense.weight", "dense.bias")} | {
    f"cls.predictions.transform.LayerNorm.{name}" for name in ("weight", "bias")
}


def own_trained(model: ss.SideModel) -> set[str]:
    """The backbone's own parameters that are trained."""
    names = [name for name, parameter in model.backbone.named_parameters() if parameter.requires_grad]
    assert set(names) == {n.removeprefix("backbone.") for n, _ in model.trained_parameters() if n[:4] == "back"}
    return set(names)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[nn.Module], Path]:
    """Writes a model's checkpoint and gives its folder."""

    def save(model: Any) -> Path:
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        return folder

    return save


# --- what is trained besides the method ----------------------------------------------------------------------

#: Class whose checkpoint is loaded, class it is loaded into, what of it is trained with head=None.
LOADED = {
    "new pooler, new classifier": (t.BertForMaskedLM, t.BertForSequenceClassification, CLASSIFIER | POOLER),
    "loaded pooler, new classifier": (t.BertModel, t.BertForSequenceClassification, CLASSIFIER),
    "all loaded, a class for classification": (
        t.BertForSequenceClassification,
        t.BertForSequenceClassification,
        CLASSIFIER,
    ),
    "a loaded language model's head": (t.BertForMaskedLM, t.BertForMaskedLM, set()),
    # The output matrix is tied to the embeddings, which are loaded.
    "a new language model's head": (t.BertModel, t.BertForMaskedLM, TRANSFORM | {"cls.predictions.bias"}),
    "a loaded base model": (t.BertModel, t.BertModel, set()),
    "a base model with a new pooler": (
        t.BertForMaskedLM,
        t.BertModel,
        {"pooler.dense.weight", "pooler.dense.bias"},
    ),
}


@pytest.mark.parametrize("case", LOADED)
@pytest.mark.parametrize("method", [READ, ss.ProbeConfig()], ids=["read", "probe"])
def test_what_is_new_or_classifies_is_trained(case: str, method: Any, saved: Callable[..., Path]) -> None:
    source, target, expected = LOADED[case]
    backbone = target.from_pretrained(saved(source(BERT)), num_labels=LABELS)
    assert own_trained(ss.attach(backbone, method)) == expected


def test_a_model_that_was_never_loaded_trains_its_classifier_only() -> None:
    assert own_trained(ss.attach(t.BertForSequenceClassification(BERT), READ)) == CLASSIFIER


def test_a_sidestep_head_replaces_the_backbones_own(saved: Callable[..., Path]) -> None:
    folder = saved(t.BertForMaskedLM(BERT))
    backbone = t.BertForSequenceClassification.from_pretrained(folder, num_labels=LABELS)
    assert own_trained(ss.attach(backbone, READ, head=HEAD)) == set()


@pytest.mark.parametrize("train_head", [True, False])
def test_train_head_beside_a_sidestep_head_is_refused(train_head: bool) -> None:
    with pytest.raises(ValueError, match=f"train_head={train_head} with a Classify head"):
        ss.attach(FAMILIES["bert"].model(), READ, head=HEAD, train_head=train_head)


def test_speech_is_classified_from_its_features() -> None:
    """An encoder-decoder whose inputs are no token ids gets its decoder's first token too."""
    config = t.WhisperConfig(
        vocab_size=50,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    model = ss.attach(t.WhisperModel(config), READ, head=HEAD).eval()
    features = torch.randn(2, 8, 32)
    assert model(input_features=features).logits.shape == (2, LABELS)
    assert torch.equal(model(features).logits, model(input_features=features).logits)


def test_train_head_overrides_the_rule(saved: Callable[..., Path]) -> None:
    folder = saved(t.BertForMaskedLM(BERT))

    def trained(kind: Any, train_head: bool) -> set[str]:
        backbone = kind.from_pretrained(folder)
        return own_trained(ss.attach(backbone, READ, train_head=train_head))

    assert trained(t.BertForSequenceClassification, False) == set()
    assert trained(t.BertForSequenceClassification, True) == CLASSIFIER | POOLER
    assert trained(t.BertForMaskedLM, True) == TRANSFORM | {"cls.predictions.bias"}


@pytest.mark.parametrize("train_head", [None, True])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "build",
    [
        lambda tied: t.LlamaForCausalLM(t.LlamaConfig(**CAUSAL, tie_word_embeddings=tied)),
        lambda tied: t.T5ForConditionalGeneration(t5_config(tied=tied)),
    ],
    ids=["llama", "t5"],
)
def test_a_language_models_head_is_frozen_unless_asked_for_and_free(
    build: Callable[[bool], nn.Module], tied: bool, train_head: bool | None
) -> None:
    model = ss.attach(build(tied), READ, train_head=train_head)
    assert own_trained(model) == ({"lm_head.weight"} if train_head and not tied else set())


def test_a_timm_models_classifier_is_its_head() -> None:
    assert own_trained(ss.attach(timm_vit(), READ)) == {"head.weight", "head.bias"}
    assert own_trained(ss.attach(timm_vit(), READ, train_head=False)) == set()
    assert own_trained(ss.attach(timm_vit(), READ, head=HEAD)) == set()
    assert own_trained(ss.attach(timm_vit(num_classes=0), READ)) == set()


def test_full_tuning_leaves_what_a_sidestep_head_does_not_read() -> None:
    backbone = t.BertForSequenceClassification(BERT)
    every = {name for name, _ in backbone.named_parameters()}
    model = ss.attach(backbone, ss.FullConfig())
    assert own_trained(model) == every
    ss.detach(model)
    assert own_trained(ss.attach(backbone, ss.FullConfig(), head=HEAD)) == every - POOLER - CLASSIFIER


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_training_step_that_trains_nothing_says_so(family: str) -> None:
    kind = FAMILIES[family]
    backbone = kind.model()
    batch = kind.inputs()
    labels = batch.get("decoder_input_ids", batch["input_ids"])
    model = ss.attach(backbone, ss.ProbeConfig())
    assert model.eval()(**batch, labels=labels).loss > 0
    says = rf"nothing is trained: probe leaves it .* own head of {type(backbone).__name__} is frozen: pass head=ss"
    with pytest.raises(ValueError, match=says):
        model.train()(**batch, labels=labels)
    with torch.no_grad():
        assert model(**batch, labels=labels).loss > 0


# --- digests -------------------------------------------------------------------------------------------------


def shift(*parameters: nn.Parameter) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize("method", [ss.FullConfig(), ss.BitFitConfig()], ids=["full", "bitfit"])
def test_the_digest_is_that_of_the_weights_before_they_moved(method: Any) -> None:
    backbone = t.BertForSequenceClassification(BERT)
    expected = digest_of(pretrained_tensors(backbone))
    model = ss.attach(backbone, method)
    shift(*(parameter for _, parameter in model.trained_parameters()))
    assert digest_of(pretrained_tensors(backbone)) != expected
    assert model.digest == expected
    ss.detach(model)
    assert digest_of(pretrained_tensors(backbone)) == expected


def head_digests(build: Callable[[], ss.SideModel], change: str) -> tuple[Any, Any]:
    """The head's digest of a model before and after one of the backbone's parameters changed."""
    torch.manual_seed(0)
    plain = build()
    torch.manual_seed(0)
    changed = build()
    shift(changed.backbone.get_parameter(change))
    return plain.head_digest, changed.head_digest


def test_a_frozen_head_and_a_loaded_pooler_have_a_digest_of_their_own() -> None:
    def language_model() -> ss.SideModel:
        return ss.attach(t.BertForMaskedLM(BERT), READ)

    def classifier() -> ss.SideModel:
        return ss.attach(t.BertForSequenceClassification(BERT), READ)

    inside = "bert.encoder.layer.0.output.dense.weight"
    for build, name, same in (
        (language_model, "cls.predictions.transform.dense.weight", False),
        (language_model, inside, True),
        (classifier, "bert.pooler.dense.weight", False),
        (classifier, "classifier.weight", True),  # trained, so it is stored in the task
        (classifier, inside, True),
    ):
        before, after = head_digests(build, name)
        assert before is not None
        assert (before == after) == same, name


def test_a_task_that_needs_no_more_than_the_trunk_has_no_head_digest() -> None:
    assert ss.attach(t.BertForSequenceClassification(BERT), READ, head=HEAD).head_digest is None
    assert ss.attach(t.BertModel(BERT, add_pooling_layer=False), READ).head_digest is None
    assert ss.attach(timm_vit(), READ).head_digest is None


# --- what cannot be attached to, and when --------------------------------------------------------------------


def bert() -> Any:
    return FAMILIES["bert"].model()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"backbone_noise": "mixup"}, "backbone_noise='mixup': choose None or one of drop_path, dropout, all"),
        ({"checkpoint": "all"}, "checkpoint='all': choose None or \"late\""),
    ],
)
def test_an_unknown_setting_is_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(says)}$"):
        ss.attach(bert(), READ, **wrong)


@pytest.mark.parametrize("backbone", [None, "bert-base-uncased", {"model": 1}])
def test_what_is_no_module_is_refused(backbone: Any) -> None:
    says = f"{type(backbone).__name__} is no torch module: pass a Hugging Face or timm model"
    with pytest.raises(TypeError, match=says):
        ss.attach(backbone, READ)


def test_a_refused_attach_leaves_the_backbone_as_it_was() -> None:
    backbone = FAMILIES["bert"].model()
    with pytest.raises(ValueError, match="density"):
        ss.attach(backbone, ss.SparseConfig(density=1e-9))
    assert all(parameter.requires_grad for parameter in backbone.parameters())


def test_attaching_twice_is_refused_until_the_first_is_detached() -> None:
    backbone = bert()
    model = ss.attach(backbone, READ)
    with pytest.raises(ValueError, match=r"BertForSequenceClassification has a task attached already: call ss\.detach"):
        ss.attach(backbone, READ)
    with pytest.raises(ValueError, match=r"this is an attached model already: call ss\.detach"):
        ss.attach(model, READ)
    ss.attach(ss.detach(model), READ)


@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_a_compiled_part_is_refused(how: str) -> None:
    backbone = bert()
    layers = backbone.bert.encoder.layer
    if how == "in place":
        layers[1].compile(backend="eager")
    else:
        layers[1] = torch.compile(layers[1], backend="eager")
    with pytest.raises(ValueError, match=r"BertForSequenceClassification is compiled: .* Attach first"):
        ss.attach(backbone, READ)


def test_a_refusal_leaves_the_backbone_as_it_was() -> None:
    backbone = bert().train()
    with pytest.raises(TypeError, match="no method config"):
        ss.attach(backbone, HEAD)
    assert backbone.training
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.modules())


# --- detached ------------------------------------------------------------------------------------------------


def test_a_detached_model_does_not_answer_for_its_bare_backbone() -> None:
    kind = FAMILIES["t5"]
    model = ss.attach(kind.model(), READ)
    ss.detach(model)
    says = r"this model was detached from its backbone: call ss\.attach \(or ss\.load\) again"
    with pytest.raises(FoldError, match=says):
        model(**kind.inputs())
    with pytest.raises(FoldError, match=says):
        model.generate(kind.inputs()["input_ids"])
    with pytest.raises(FoldError, match=says):
        model.state_dict()


def test_detaching_again_does_not_undo_what_came_after() -> None:
    backbone = bert()
    first = ss.attach(backbone, ss.FullConfig())
    ss.detach(first)
    second = ss.attach(backbone, ss.FullConfig())
    shift(*backbone.parameters())
    moved = {name: value.clone() for name, value in second.state_dict().items()}
    assert ss.detach(first) is backbone
    assert all(torch.equal(value, moved[name]) for name, value in second.state_dict().items())
    assert all(parameter.requires_grad for parameter in backbone.bert.encoder.parameters())


def test_detach_gives_back_flags_and_modes() -> None:
    backbone = bert().train()
    backbone.bert.embeddings.requires_grad_(False)
    backbone.bert.encoder.layer[1].eval()
    flags = [parameter.requires_grad for parameter in backbone.parameters()]
    modes = [module.training for module in backbone.modules()]
    model = ss.attach(backbone, READ, checkpoint="late")
    model.eval()
    ss.detach(model)
    assert [parameter.requires_grad for parameter in backbone.parameters()] == flags
    assert [module.training for module in backbone.modules()] == modes
    assert not any("forward" in module.__dict__ for module in backbone.modules())


# --- generation ----------------------------------------------------------------------------------------------


def test_a_model_with_a_sidestep_head_does_not_generate() -> None:
    model = ss.attach(FAMILIES["llama"].model(), READ, head=HEAD)
    with pytest.raises(ValueError, match="a model with a Classify head does not generate text"):
        model.generate(torch.ones(1, 2, dtype=torch.long))


@pytest.mark.parametrize("head", [None, HEAD])
def test_a_batch_whose_labels_are_all_left_out_is_refused(head: ss.Classify | None) -> None:
    model = ss.attach(t.BertForSequenceClassification(BERT), READ, head=head)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    for train in (True, False):
        model.train(train)
        with pytest.raises(ValueError, match="all 2 labels of a batch are -100, which the loss leaves out"):
            model(input_ids=ids, labels=torch.tensor([-100, -100]))
        assert model(input_ids=ids, labels=torch.tensor([-100, 1])).loss.isfinite()
    assert model(input_ids=ids).loss is None


def test_a_number_to_predict_may_be_what_other_losses_leave_out() -> None:
    model = ss.attach(t.BertForSequenceClassification(BERT), READ, head=ss.Regress())
    assert model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([-100])).loss.isfinite()
