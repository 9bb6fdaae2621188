"""What is found in a backbone, and what its digest depends on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as t
from torch import nn

import sidestep as ss
from architectures import ARCHITECTURES, CAUSAL, IMAGE, T5, TEXT
from sidestep.backbone import (
    Digest,
    Noise,
    default_pool,
    digest_of,
    find_places,
    new_parameters,
    positions,
    pretrained_tensors,
    set_noise,
)
from sidestep.interface.sites import of_stack, stacks

# --- finding -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_stacks_blocks_and_norms_are_found(name: str) -> None:
    expected = ARCHITECTURES[name]
    model = expected.model()
    places = find_places(model)
    sites = [place.site for place in places]
    found = [of_stack(sites, stack) for stack in stacks(sites)]
    assert [[site.width for site in stack if site.kind == "block"] for stack in found] == expected.widths
    norms = {place.site.stack: place.name for place in places if place.site.kind == "norm"}
    assert [norms.get(stack) for stack in stacks(sites)] == expected.norms
    assert [stack[0].final_norm for stack in found] == [norm is not None for norm in expected.norms]
    assert [site.causal for site in sites if site.head] == [expected.causal] * len(found[-1])
    assert not any(site.causal for stack in found[:-1] for site in stack)
    assert {site.prefix for site in sites} == {expected.prefix}
    assert default_pool(model) == expected.pool
    assert sites[-1].stack == ("decoder" if expected.causal else "encoder")
    trunk = model.base_model if isinstance(model, t.PreTrainedModel) else model
    assert all(trunk.get_submodule(place.name) is place.module for place in places)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_training_step_of_read_gives_gradients(name: str) -> None:
    kind = ARCHITECTURES[name]
    model = ss.attach(kind.model(), ss.ReadConfig(rank=4), head=ss.Classify(num_labels=3)).train()
    with torch.no_grad():
        for _, parameter in model.trained_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model(**kind.inputs(), labels=torch.tensor([0, 2])).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.trained_parameters()}
    for key, gradient in gradients.items():
        assert gradient is not None, key
        assert gradient.isfinite().all(), key
        assert gradient.abs().max() > 0, key


def test_blocks_are_counted_over_the_stages() -> None:
    sites = [place.site for place in find_places(ARCHITECTURES["swin"].model())]
    assert [(site.kind, site.stage, site.index, site.width) for site in sites] == [
        ("stage", 0, 0, 8),
        ("block", 0, 0, 8),
        ("block", 0, 1, 8),
        ("stage", 1, 2, 16),
        ("block", 1, 2, 16),
        ("block", 1, 3, 16),
        ("norm", 1, 3, 16),
    ]


def test_a_resnets_first_block_of_a_stage_takes_the_width_of_the_stage_before() -> None:
    sites = [place.site for place in find_places(ARCHITECTURES["resnet"].model())]
    assert [(site.kind, site.stage, site.index, site.width) for site in sites] == [
        ("stage", 0, 0, 8),
        ("block", 0, 0, 16),
        ("stage", 1, 1, 16),
        ("block", 1, 1, 32),
        ("block", 1, 2, 32),
    ]
    assert all(site.convolutional and site.spatial for site in sites)


@pytest.mark.parametrize("name", ["resnet", "timm resnet"])
def test_a_method_sees_a_feature_map_as_tokens_that_share_its_storage(name: str) -> None:
    model = ss.attach(ARCHITECTURES[name].model(), ss.ReadConfig(rank=4))
    seen: dict[int, tuple[torch.Tensor, Any]] = {}
    given: dict[int, torch.Tensor] = {}
    advance = model.side.advance

    def note(state: Any, hidden: torch.Tensor, site: Any) -> Any:
        if site.kind == "block":
            seen[site.index] = hidden, site
        return advance(state, hidden, site)

    object.__setattr__(model.side, "advance", note)
    blocks = [place for place in model.places if place.site.kind == "block"]
    for place in blocks:
        # before the fold's own hook
        place.module.register_forward_hook(
            lambda module, args, output, index=place.site.index: given.update({index: output}), prepend=True
        )
    with torch.no_grad():
        model(**ARCHITECTURES[name].inputs())
    for index, (hidden, site) in seen.items():
        rows, columns = site.grid
        assert torch.equal(hidden, given[index].permute(0, 2, 3, 1).flatten(1, 2))
        assert hidden.untyped_storage().data_ptr() == given[index].untyped_storage().data_ptr()
        assert given[index].shape == (2, site.width, rows, columns)


@pytest.mark.parametrize(
    "config", [ss.ProbeConfig(), ss.BitFitConfig(), ss.FullConfig()], ids=["probe", "bitfit", "full"]
)
@pytest.mark.parametrize("checkpoint", [None, "late"])
def test_batch_norms_move_once_a_step_or_not_at_all(config: Any, checkpoint: Any) -> None:
    """A weight delta trains as the plain backbone does in training mode, also where blocks are computed again."""
    kind = ARCHITECTURES["timm resnet"]
    inputs = kind.inputs()
    plain = kind.model()
    if not isinstance(config, ss.ProbeConfig):
        with torch.no_grad():
            plain.train()(inputs["pixel_values"])
    model = ss.attach(kind.model(), config, head=ss.Classify(num_labels=3), checkpoint=checkpoint).train()
    model(**inputs, labels=torch.tensor([0, 2])).loss.backward()
    found = dict(model.backbone.named_buffers())
    for name, value in plain.named_buffers():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)
    assert {norm.momentum for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)} == {0.1}


def test_a_model_of_two_towers_is_refused_and_each_tower_taken() -> None:
    clip = t.CLIPModel(t.CLIPConfig(text_config=TEXT, vision_config=IMAGE))
    with pytest.raises(ValueError, match=r"CLIPModel has several towers of blocks .*attach to one of them"):
        ss.attach(clip, ss.ReadConfig(rank=2))
    assert not ss.attach(clip.vision_model, ss.ReadConfig(rank=2)).places[0].site.causal
    # Its attention modules do not say that they are causal; the family table does.
    assert ss.attach(clip.text_model, ss.ReadConfig(rank=2)).places[0].site.causal


def test_a_model_without_blocks_is_refused() -> None:
    mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"Sequential holds no list of repeated blocks\. Sidestep needs a Transformer"):
        ss.attach(mlp, ss.ReadConfig(rank=2))
    assert all(parameter.requires_grad for parameter in mlp.parameters())


SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
PLACES = {"max_position_embeddings": 12}
IDS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
BART = {"vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, **IDS}


@pytest.mark.parametrize(
    ("build", "most"),
    [
        (lambda: t.BertModel(t.BertConfig(**SMALL, **PLACES)), 12),
        (lambda: t.RobertaModel(t.RobertaConfig(**SMALL, **PLACES, **IDS)), 10),
        (lambda: t.CLIPTextModel(t.CLIPTextConfig(**SMALL, **PLACES, **IDS)), 12),
        (lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=12)), 12),
        (lambda: t.OPTForCausalLM(t.OPTConfig(**SMALL, **PLACES, word_embed_proj_dim=16, ffn_dim=32)), 12),
        (lambda: t.BartModel(t.BartConfig(**BART, **PLACES, decoder_attention_heads=2)), 12),
    ],
    ids=["bert", "roberta", "clip", "gpt2", "opt", "bart"],
)
def test_a_table_of_positions_is_as_long_as_the_longest_text(build: Callable[[], nn.Module], most: int) -> None:
    model = build().eval()
    reads, writes = positions(model)
    assert (reads, writes) == (most, most)
    texts = torch.randint(3, 39, (1, most + 1))
    with torch.no_grad():
        model(input_ids=texts[:, :most])
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            model(input_ids=texts)


@pytest.mark.parametrize(
    "build",
    [
        lambda: t.LlamaModel(t.LlamaConfig(**SMALL, **PLACES)),
        lambda: t.GPTNeoXModel(t.GPTNeoXConfig(**SMALL, **PLACES, **IDS)),
        lambda: t.T5EncoderModel(t.T5Config(**T5)),
        lambda: t.T5Model(t.T5Config(**T5)),
    ],
    ids=["llama", "gpt-neox", "t5 encoder", "t5"],
)
def test_rotary_and_relative_positions_have_no_end(build: Callable[[], nn.Module]) -> None:
    assert positions(build()) == (None, None)


def test_noise_leaves_batch_norms_alone() -> None:
    trunk = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(), timm.layers.DropPath(0.1))
    kinds: list[Noise | None] = [None, "drop_path", "dropout", "all"]
    on = {}
    for noise in kinds:
        set_noise(trunk.train(), noise)
        on[noise] = [module.training for module in trunk]
    assert on == {
        None: [False, False, False],
        "drop_path": [False, False, True],
        "dropout": [False, True, False],
        "all": [False, True, True],
    }


# --- digest --------------------------------------------------------------------------------------------------


def digest(model: nn.Module) -> Digest:
    return digest_of(pretrained_tensors(model))


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """The checkpoint of a bare BERT: pooler, no head."""
    t.BertModel(t.BertConfig(**TEXT, num_labels=3)).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def move(model: nn.Module, name: str) -> nn.Module:
    """The model after a small change of one value."""
    with torch.no_grad():
        tensor = model.get_parameter(name)
        tensor.view(-1)[tensor.numel() // 2] += 0.01
    return model


def test_the_digest_does_not_depend_on_the_class(bert: Path) -> None:
    kinds = (t.AutoModelForSequenceClassification, t.AutoModelForMaskedLM, t.AutoModelForTokenClassification)
    expected = digest(t.AutoModel.from_pretrained(bert))
    for kind in kinds:
        torch.manual_seed(1)
        assert digest(kind.from_pretrained(bert)) == expected
    assert expected.matches(digest(t.AutoModel.from_pretrained(bert))) == "same"


def test_a_new_pooler_is_left_out(tmp_path: Path) -> None:
    t.BertForMaskedLM(t.BertConfig(**TEXT)).save_pretrained(tmp_path)
    models = [t.AutoModel.from_pretrained(tmp_path) for _ in range(2)]
    assert {"pooler.dense.weight", "pooler.dense.bias"} == new_parameters(models[0])
    assert not torch.equal(models[0].pooler.dense.weight, models[1].pooler.dense.weight)
    assert digest(models[0]) == digest(models[1]) == digest(t.BertForMaskedLM.from_pretrained(tmp_path))


def test_a_model_that_was_never_loaded_counts_as_loaded_whole() -> None:
    assert new_parameters(t.BertModel(t.BertConfig(**TEXT))) == set()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_another_precision_is_told_from_other_weights_both_ways(bert: Path, dtype: torch.dtype) -> None:
    wide, narrow = (t.AutoModel.from_pretrained(bert, dtype=kind) for kind in (torch.float32, dtype))
    assert digest(wide).matches(digest(narrow)) == "dtype"
    assert digest(narrow).matches(digest(wide)) == "dtype"
    assert digest(narrow).dtype == str(dtype).removeprefix("torch.")
    move(narrow, "embeddings.word_embeddings.weight")
    assert digest(wide).matches(digest(narrow)) == "different"
    assert digest(narrow).matches(digest(wide)) == "different"


@pytest.mark.parametrize("name", ["encoder.layer.1.attention.self.key.bias", "embeddings.LayerNorm.weight"])
def test_one_changed_weight_is_another_backbone(bert: Path, name: str) -> None:
    plain, changed = (t.AutoModel.from_pretrained(bert) for _ in range(2))
    assert digest(plain).matches(digest(move(changed, name))) == "different"


class Parts(t.PreTrainedModel):
    """A trunk whose parts are registered in a given order, two of them tied."""

    config_class = t.BertConfig

    def __init__(self, names: str) -> None:
        super().__init__(t.BertConfig(**TEXT))
        generator = torch.Generator().manual_seed(0)
        shared = torch.randn(3, 4, generator=generator)
        values = {name: torch.randn(2, 3, generator=generator) for name in "abc"}
        self.tied = nn.Parameter(shared)
        for name in names:
            part = nn.Module()
            part.weight = self.tied if name in "de" else nn.Parameter(values[name])
            self.add_module(name, part)

    def get_output_embeddings(self) -> None:
        return None


def test_the_digest_does_not_depend_on_the_order_of_registration() -> None:
    one, other = Parts("abcde"), Parts("edcba")
    del one.tied, other.tied
    assert digest(one) == digest(other)
    assert [name for name, _ in pretrained_tensors(one)] == ["a.weight", "b.weight", "c.weight", "d.weight"]


def test_the_digest_depends_on_names_and_shapes() -> None:
    x = torch.randn(2, 6)
    named = [("a", x), ("b", x), ("a", x.view(3, 4))]
    assert len({digest_of([pair]).exact for pair in named}) == 3


@pytest.mark.parametrize(
    "build",
    [
        lambda: t.T5ForConditionalGeneration(t.T5Config(**T5)),
        lambda: t.LlamaForCausalLM(t.LlamaConfig(**CAUSAL)),
        lambda: t.LlamaForCausalLM(t.LlamaConfig(**CAUSAL, tie_word_embeddings=True)),
    ],
    ids=["t5", "llama", "llama tied"],
)
def test_an_output_head_does_not_change_the_digest(build: Callable[[], Any], tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    whole = type(build()).from_pretrained(tmp_path)
    assert digest(whole) == digest(t.AutoModel.from_pretrained(tmp_path))


def test_a_timm_models_head_does_not_change_the_digest() -> None:
    def build(classes: int) -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model("test_vit", num_classes=classes)

    headless, with_head = build(0), build(5)
    with_head.load_state_dict(headless.state_dict(), strict=False)
    assert digest(headless) == digest(with_head)
    assert digest(move(with_head, "blocks.0.mlp.fc1.bias")) != digest(headless)


def test_both_heads_of_a_distilled_model_are_left_out_of_the_digest() -> None:
    def build(classes: int) -> nn.Module:
        torch.manual_seed(0)
        sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": classes}
        return timm.create_model("deit_tiny_distilled_patch16_224", **sizes)

    one, other = build(3), build(5)
    other.load_state_dict({n: v for n, v in one.state_dict().items() if not n.startswith("head")}, strict=False)
    assert digest(one) == digest(other)
    assert digest(move(other, "blocks.0.mlp.fc1.bias")) != digest(one)


def test_a_network_of_convolutions_has_its_stages_and_blocks() -> None:
    places = find_places(timm.create_model("convnext_atto", num_classes=3))
    blocks = [place.site for place in places if place.site.kind == "block"]
    assert [site.stage for site in blocks] == [0, 0, 1, 1, *[2] * 6, 3, 3]
    assert all(site.convolutional and site.spatial for site in blocks)
