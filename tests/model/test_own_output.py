"""Heads where something follows the last block and its norm: they read the trunk's own last hidden state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor, nn

import sidestep as ss
from sidestep.model.features import FeaturesRefused, check_storable
from tiny import randomize

METHODS = {"read": ss.ReadConfig(rank=4), "probe": ss.ProbeConfig(), "lora": ss.LoraConfig(rank=2)}


def convnext() -> nn.Module:
    """Its last hidden state is the mean of the tokens in front of them, all of them normed."""
    return t.DINOv3ConvNextModel(t.DINOv3ConvNextConfig(hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 2, 1]))


def opt() -> nn.Module:
    """OPT-350m's form: its last hidden state is narrower than its blocks', and has no final norm."""
    config = t.OPTConfig(
        vocab_size=60,
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        do_layer_norm_before=False,
    )
    return t.OPTModel(config)


def images(rows: int = 3) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(rows, 3, 64, 96)}


def texts(rows: int = 3, tokens: int = 6) -> dict[str, Tensor]:
    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[-1, -2:] = 0
    return {"input_ids": torch.randint(5, 60, (rows, tokens)), "attention_mask": mask}


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "convnext": (convnext, images),
    "opt": (opt, texts),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("case", "pool", "read"),
    [
        ("convnext", "mean", lambda last: last[:, 1:].mean(1)),
        ("convnext", "cls", lambda last: last[:, 0]),
        ("opt", "last", lambda last: torch.stack([last[0, 5], last[1, 5], last[2, 3]])),
        ("opt", "mean", lambda last: torch.stack([last[0].mean(0), last[1].mean(0), last[2, :4].mean(0)])),
    ],
)
def test_a_head_reads_the_trunks_own_output_with_what_was_written(
    case: str, pool: Any, read: Callable[[Tensor], Tensor], method: str
) -> None:
    build, batch = CASES[case]
    backbone, inputs = build(), batch()
    bare = backbone(**inputs).last_hidden_state
    model = ss.attach(backbone, METHODS[method], head=ss.Classify(num_labels=2, pool=pool))
    randomize(model)
    given: list[Tensor] = []
    model.trunk.register_forward_hook(lambda module, args, output: given.append(output.last_hidden_state))
    logits = model.eval()(**inputs).logits
    assert (given[-1] - bare).abs().max() > 1e-4 or method != "read"
    assert given[-1].shape == bare.shape
    torch.testing.assert_close(logits, model.head.map(read(given[-1])))
    model.train()(**inputs, labels=torch.tensor([0, 1, 0])).loss.backward()
    assert all(p.grad is not None for _, p in model.trained_parameters())


@pytest.mark.parametrize("case", CASES)
def test_replay_gives_the_same_gradients(case: str) -> None:
    build, batch = CASES[case]
    backbone, inputs = build(), batch()
    found = {}
    for keep in ("full", "replay"):
        torch.manual_seed(0)
        model = ss.attach(backbone, METHODS["read"], head=ss.Classify(num_labels=2), keep=keep)
        randomize(model)
        model.train()(**inputs, labels=torch.tensor([0, 1, 0])).loss.backward()
        found[keep] = {name: p.grad for name, p in model.trained_parameters()}
        ss.detach(model)
    for name, grad in found["full"].items():
        torch.testing.assert_close(found["replay"][name], grad, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_tasks_of_a_bank_run_alone_and_right(case: str, tmp_path: Any) -> None:
    build, batch = CASES[case]
    backbone, inputs = build(), batch()
    expected = {}
    for number, name in enumerate(("a", "b")):
        torch.manual_seed(number)
        model = ss.attach(backbone, METHODS["read"], head=ss.Classify(num_labels=2))
        randomize(model, number)
        expected[name] = model.eval()(**inputs).logits
        model.save_pretrained(tmp_path / name)
        ss.detach(model)
    with ss.TaskBank(backbone) as bank:
        for name in expected:
            bank.add(name, tmp_path / name)
        found = bank(inputs, tasks=list(expected))
        assert bank.together.alone.keys() == expected.keys()
    for name, logits in expected.items():
        torch.testing.assert_close(found[name].logits, logits)


def test_what_it_does_not_go_with_is_refused() -> None:
    with pytest.raises(ss.UnsupportedBackbone, match="ends in something else: choose another pool"):
        ss.attach(convnext(), METHODS["read"], head=ss.Classify(num_labels=2, pool="mean_pre_norm"))
    with pytest.raises(FeaturesRefused, match="what the model makes of its last block"):
        check_storable(ss.attach(opt(), METHODS["read"], head=ss.Classify(num_labels=2)))
