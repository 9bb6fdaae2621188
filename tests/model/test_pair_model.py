"""Dual encoders: what a pair starts as, learns and leaves behind; the losses, GPO, and its task on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertModel,
    CLIPModel,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTModel,
)

import sidestep as ss
from dual_encoders import END, IMAGE, TEXT, clip
from sidestep.backbone.load import paired
from sidestep.backbone.source import LoadError
from sidestep.disk.task_folder import TaskError
from sidestep.methods import MethodConfig
from sidestep.model.heads.gpo import GPO
from sidestep.model.losses import contrastive_loss, triplet_loss
from tiny import FAMILIES

WORKING: list[MethodConfig] = [
    ss.ReadConfig(rank=4),
    ss.ProbeConfig(),
    ss.SherlConfig(dropout=0.0),
    ss.LoraConfig(),
    ss.FullConfig(),
]


def two_encoders() -> VisionTextDualEncoderModel:
    torch.manual_seed(0)
    return VisionTextDualEncoderModel(
        vision_model=ViTModel(ViTConfig(**IMAGE)), text_model=BertModel(BertConfig(**TEXT))
    ).eval()


def batch(tokens: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 38, (4, 7), generator=generator)
    ids[:, -1], ids[1, 4], ids[1, 5:] = END, END, 0
    ids = F.pad(ids, (0, tokens - 7))
    images = torch.randn(4, 3, 16, 16, generator=generator)
    return {"pixel_values": images, "input_ids": ids, "attention_mask": (ids > 0).long()}


def names(config: MethodConfig) -> str:
    return type(config).__name__


@pytest.mark.parametrize("method", [ss.ReadConfig(rank=4), ss.ProbeConfig(), ss.LoraConfig()], ids=names)
def test_a_zero_start_gives_clips_own_embeddings(method: MethodConfig) -> None:
    backbone, inputs = clip(), batch()
    with torch.no_grad():
        plain = backbone(**inputs)
        found = ss.attach(backbone, method, head=ss.Retrieve()).eval()(**inputs)
    assert torch.equal(found.image_embeds, plain.image_embeds)
    assert torch.equal(found.text_embeds, plain.text_embeds)


def test_a_zero_start_gives_two_encoders_own_embeddings() -> None:
    backbone, inputs = two_encoders(), batch()
    with torch.no_grad():
        plain = backbone(**inputs)
        found = ss.attach(backbone, ss.ReadConfig(rank=4), head=ss.Retrieve()).eval()(**inputs)
    torch.testing.assert_close(found.image_embeds, plain.image_embeds)
    torch.testing.assert_close(found.text_embeds, plain.text_embeds)


@pytest.mark.parametrize("dual", [clip, two_encoders], ids=["clip", "two"])
@pytest.mark.parametrize("method", WORKING, ids=names)
def test_what_is_trained_gets_gradients_and_detach_restores(dual: type, method: MethodConfig) -> None:
    backbone, inputs = dual(), batch()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    model = ss.attach(backbone, method, head=ss.Retrieve(dim=8, pool="own")).train()
    trained = dict(model.trained_parameters())
    for _ in range(2):
        model(**inputs, labels=torch.arange(4)).loss.backward()
        with torch.no_grad():
            for parameter in trained.values():
                parameter -= 0.01 * parameter.grad.sign()
    assert "logit_scale" in trained
    if not isinstance(method, ss.FullConfig | ss.LoraConfig):
        assert not [name for name in trained if ".backbone." in name]
    assert ss.detach(model) is backbone
    assert all(parameter.requires_grad and parameter.grad is None for parameter in backbone.parameters())
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_nothing_of_the_towers_is_kept_for_the_probe() -> None:
    model, inputs = ss.attach(clip(), ss.ProbeConfig(), head=ss.Retrieve()).train(), batch()
    with ss.saved_bytes(model) as kept:
        assert model(**inputs, labels=torch.arange(4)).loss > 0
    assert not [name for name, size in kept.by_module().items() if "encoder.layers" in name and size]


@pytest.mark.parametrize("method", [ss.ReadConfig(rank=4), ss.SherlConfig(reduction=4)], ids=names)
def test_bytes_kept_are_within_the_stated_formula(method: MethodConfig) -> None:
    model, inputs = ss.attach(clip(), method, head=ss.Retrieve()).train(), batch(32)
    with ss.saved_bytes(model) as kept:
        assert model(**inputs, labels=torch.arange(4)).loss > 0
    late = [block for tower in model.parts for block in tower.late_blocks()]
    inside = tuple(f"{name}." for name, module in model.named_modules() if any(module is block for block in late))
    total = kept.total - sum(row.counted for row in kept.rows if inside and row.module.startswith(inside))
    kind, stated = model.record.implementation, 0
    for tower, tokens in ((model.image, 5), (model.text, 32)):
        sites = [place.site for place in tower.places]
        per_row = sum(tokens * kind.kept_per_token(method, site) + kind.kept_per_row(method, site) for site in sites)
        # the tower's pooled output with its norm, the embedding before and after its length is one, padding masks
        stated += 4 * 4 * (per_row + 4 * sites[-1].width + 4 * 8) + 5 * 4 * tokens * len(sites)
    assert total <= stated + 4 * 8 * 4 * 4, str(kept)


@pytest.mark.parametrize("method", [ss.SherlConfig(reduction=4, dropout=0.0), ss.LoraConfig(dropout=0.0)], ids=names)
def test_recomputed_blocks_keep_less_and_leave_the_gradients(method: MethodConfig) -> None:
    found, kept = [], []
    for checkpoint in (None, "late"):
        torch.manual_seed(4)
        model = ss.attach(clip(), method, head=ss.Retrieve(), checkpoint=checkpoint).eval()
        with torch.no_grad():
            for _, parameter in model.trained_parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        with ss.saved_bytes(model) as record:
            loss = model(**batch(), labels=torch.arange(4)).loss
        loss.backward()
        found.append({name: parameter.grad for name, parameter in model.trained_parameters()})
        kept.append(record.total)
    assert kept[1] < kept[0]
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("method", [ss.ReadConfig(rank=4), ss.SherlConfig(dropout=0.0)], ids=names)
def test_towers_in_bfloat16_train_in_float32(method: MethodConfig) -> None:
    inputs = batch()
    exact = ss.attach(clip(), method, head=ss.Retrieve()).eval()
    model = ss.attach(clip().bfloat16(), method, head=ss.Retrieve()).eval()
    model.load_state_dict(exact.state_dict())
    expected = exact(**inputs, labels=torch.arange(4))
    found = model(**inputs | {"pixel_values": inputs["pixel_values"].bfloat16()}, labels=torch.arange(4))
    found.loss.backward()
    trained = dict(model.trained_parameters())
    assert all(
        p.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in trained.values() if p.grad is not None
    )
    assert found.image_embeds.dtype == torch.float32
    torch.testing.assert_close(found.image_embeds, expected.image_embeds, atol=0.05, rtol=0)
    torch.testing.assert_close(found.text_embeds, expected.text_embeds, atol=0.05, rtol=0)


@pytest.mark.parametrize("pool", ["own", "mean", "gpo"])
def test_padding_changes_nothing(pool: str) -> None:
    model = ss.attach(clip(), ss.ReadConfig(rank=4), head=ss.Retrieve(pool=pool)).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch(14)).text_embeds, model(**batch()).text_embeds)


@pytest.mark.parametrize("head", [ss.Retrieve(), ss.Retrieve(loss="triplet", pool="gpo")], ids=["contrastive", "vse"])
def test_gradients_equal_finite_differences(head: ss.Retrieve) -> None:
    model = ss.attach(clip().double(), ss.ReadConfig(rank=2), head=head).double().eval()
    inputs = batch()
    inputs["pixel_values"] = inputs["pixel_values"].double()
    labels = torch.tensor([0, 1, 2, 1])
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    generator = torch.Generator().manual_seed(3)
    for _, parameter in model.trained_parameters():
        if parameter.grad is None:
            continue
        way = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * 1e-6 * way
                values.append(model(**inputs, labels=labels).loss)
                parameter -= sign * 1e-6 * way
        torch.testing.assert_close((values[0] - values[1]) / 2e-6, (parameter.grad * way).sum(), rtol=1e-4, atol=1e-7)


def test_the_contrastive_loss_is_clips_and_leaves_out_texts_of_the_same_image() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.5], [0.0, 3.0, 1.0], [1.0, 0.0, 2.0]])
    plain = (F.cross_entropy(logits, torch.arange(3)) + F.cross_entropy(logits.T, torch.arange(3))) / 2
    torch.testing.assert_close(contrastive_loss(logits, torch.eye(3).bool()), plain)
    same = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()
    rows = [(2.0, [0.5]), (3.0, [1.0]), (2.0, [1.0, 0.0])]
    columns = [(2.0, [1.0]), (3.0, [0.0]), (2.0, [0.5, 1.0])]
    losses = [torch.tensor([right, *others]).logsumexp(0) - right for right, others in (*rows, *columns)]
    torch.testing.assert_close(contrastive_loss(logits, same), torch.stack(losses).mean())
    assert contrastive_loss(logits[:1, :1], same[:1, :1]) == 0


def test_the_triplet_loss_by_hand() -> None:
    cosines = torch.tensor([[0.5, 0.4, 0.6], [0.1, 0.9, 0.2], [0.3, 0.0, 0.7]])
    one = torch.eye(3).bool()
    # image to text: 0.3 and 0.1, nothing, nothing; text to image: nothing (0.3 to 0.5 is 0), nothing, 0.1
    torch.testing.assert_close(triplet_loss(cosines, one, 0.2, hardest=True), torch.tensor(0.3 / 3 + 0.1 / 3))
    torch.testing.assert_close(triplet_loss(cosines, one, 0.2, hardest=False), torch.tensor(0.4 / 2 + 0.1))
    same = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]]).bool()
    torch.testing.assert_close(triplet_loss(cosines, same, 0.2, hardest=True), torch.tensor(0.1 / 3))


def test_vses_loss_goes_from_the_mean_to_the_hardest() -> None:
    model, inputs = ss.attach(clip(), ss.ProbeConfig(), head=ss.Retrieve(loss="triplet", mean_epochs=1)), batch()
    inputs["labels"] = torch.arange(4)

    def loss(epoch: float) -> Tensor:
        model.epoch = epoch
        return model(**inputs).loss

    mean, hardest = (
        ss.attach(clip(), ss.ProbeConfig(), head=ss.Retrieve(loss="triplet", hardest=h)) for h in (False, True)
    )
    for other in (mean, hardest):
        other.load_state_dict(model.state_dict())
    model.train()
    assert loss(0) == loss(0.99) == mean(**inputs).loss
    assert loss(1) == 0
    torch.testing.assert_close(loss(1.25), hardest(**inputs).loss / 4)
    assert loss(2) == loss(7) == hardest(**inputs).loss != mean(**inputs).loss
    model.eval()
    assert loss(0) == hardest(**inputs).loss
    with pytest.raises(ValueError, match="mean_epochs=1: choose 0 or more, and 0 with hardest=False"):
        ss.Retrieve(loss="triplet", hardest=False, mean_epochs=1)


def test_gpo_weighs_the_sorted_kept_tokens() -> None:
    torch.manual_seed(0)
    gpo, tokens = GPO(4, 5), torch.randn(2, 6, 3)
    keep = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0]]).bool()
    weights = gpo.weights(torch.tensor([3, 6]))
    torch.testing.assert_close(weights.sum(1), torch.ones(2))
    assert (weights[0, 3:] == 0).all()
    ordered = tokens[1, 2:5].sort(0, descending=True).values
    torch.testing.assert_close(gpo(tokens, keep)[1], weights[0, :3] @ ordered)


def test_a_saved_pair_is_loaded_onto_its_backbone_and_no_other(tmp_path: Path) -> None:
    clip().save_pretrained(tmp_path / "clip")
    backbone = CLIPModel.from_pretrained(tmp_path / "clip").eval()
    model = ss.attach(backbone, ss.ReadConfig(rank=4), head=ss.Retrieve())
    with torch.no_grad():
        for _, parameter in model.trained_parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.eval().save_pretrained(tmp_path / "task")
    again = ss.load(tmp_path / "task")
    with torch.no_grad():
        before, after = model(**batch()), again(**batch())
    assert torch.equal(before.image_embeds, after.image_embeds)
    assert torch.equal(before.text_embeds, after.text_embeds)
    other = clip()
    with torch.no_grad():
        other.text_model.embeddings.token_embedding.weight[5] += 1
    with pytest.raises(TaskError, match="was made on CLIPModel"):
        ss.load(tmp_path / "task", other)


def test_what_cannot_be_attached_is_refused_by_name() -> None:
    backbone = clip()
    with pytest.raises(ss.UnsupportedBackbone, match="the text tower of CLIPModel: unipt does not work on"):
        ss.attach(backbone, ss.UniPTConfig(), head=ss.Retrieve())
    assert all(parameter.requires_grad for parameter in backbone.parameters())  # the image tower was put back
    with pytest.raises(ValueError, match=r"needs a dual encoder .* but BertModel is none"):
        ss.attach(BertModel(BertConfig(**TEXT)), ss.ReadConfig(), head=ss.Retrieve())
    with pytest.raises(ValueError, match="pool='max': choose None or one of cls, mean"):
        ss.Retrieve(pool="max")
    inputs = {name: value if name == "pixel_values" else value[:3] for name, value in batch().items()}
    model = ss.attach(backbone, ss.ReadConfig(), head=ss.Retrieve())
    ss.detach(model)
    fisher = ss.attach(backbone, ss.SparseConfig(density=0.05, select="fisher"), head=ss.Retrieve())
    with pytest.raises(ValueError, match="sparse as configured would start by one backbone's loss, and this is a pair"):
        ss.initialise(fisher, [batch()])
    ss.detach(fisher)
    model = ss.attach(backbone, ss.ReadConfig(), head=ss.Retrieve())
    with pytest.raises(ValueError, match="read as configured starts without data: there is nothing to initialise"):
        ss.initialise(model, [batch()])
    with pytest.raises(ValueError, match="a loss needs pairs, but there are 4 images, 3 texts, 3 labels"):
        model(**inputs, labels=torch.arange(3))


def test_an_encoder_without_one_width_is_no_tower() -> None:
    with pytest.raises(LoadError, match="cannot be one of two towers: its config has no hidden_size"):
        paired(FAMILIES["resnet"].model(), BertModel(BertConfig(**TEXT)))
