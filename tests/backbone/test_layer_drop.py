"""Layer drop: noise of a backbone whose weights are trained, and off beside a method that reads its blocks."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sidestep as ss
from sidestep.backbone import set_noise
from sweep.build import LABELS
from sweep.catalogue import catalogue
from sweep.inputs import Batch
from sweep.subject import Subject
from tiny import ALL

#: Encoders of sounds with a final norm and without one, decoders, and encoder-decoders of either kind.
TYPES = ("wav2vec2", "wavlm", "wav2vec2-bert", "whisper+asr", "opt", "bart", "mbart")
SEEDS = range(5)
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")  # WavLM's


@pytest.fixture(params=TYPES)
def subject(request: pytest.FixtureRequest) -> Subject:
    """A tiny model that leaves out half of its blocks in training."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own, on configs as small as these
        subject = Subject(catalogue()[request.param])
    for module in subject.model.modules():
        for owner in (module, getattr(module, "config", None)):
            for name in [name for name in vars(owner or module) if name.endswith("layerdrop")]:
                setattr(owner, name, 0.5)
    return subject


@pytest.mark.parametrize("method", [ss.LoraConfig(rank=2), ss.FullConfig()], ids=["lora", "full"])
def test_a_head_reads_the_last_hidden_state_whichever_blocks_are_left_out(subject: Subject, method: Any) -> None:
    batch, model = subject.uses[0].batch, ss.attach(subject.model, method, head=ss.Classify(num_labels=LABELS)).train()
    ran: list[str] = []
    names = _watched(model, ran)
    counts = set()
    for seed in SEEDS:
        _seed(seed)
        ran.clear()
        logits = model(**batch, labels=subject.uses[0].labels).logits
        counts.add(len(ran))
        _seed(seed)
        last = model.trunk(**batch, **_without_cache(subject)).last_hidden_state
        torch.testing.assert_close(logits[0], model.head.map(_pooled(last, model.pool))[0])
    assert min(counts) < len(names)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.head.parameters())


def test_a_method_that_reads_every_block_sees_every_block_whatever_noise_is_asked_for(subject: Subject) -> None:
    batch, method = subject.uses[0].batch, ss.ReadConfig(rank=4)
    model = ss.attach(subject.model, method, head=ss.Classify(num_labels=LABELS), backbone_noise="all").train()
    ran: list[str] = []
    names = _watched(model, ran)
    for seed in SEEDS:
        _seed(seed)
        ran.clear()
        model(**batch, labels=subject.uses[0].labels).loss.backward()
        assert ran == names


def test_an_own_head_needs_no_block(subject: Subject) -> None:
    own = [use for use in subject.uses if use.own]
    for use in own:
        model = ss.attach(subject.model, ss.FullConfig()).train()
        for seed in SEEDS:
            _seed(seed)
            assert model(**use.batch, labels=use.labels).loss.isfinite()
        ss.detach(model)


def test_only_the_module_that_leaves_out_blocks_stays_in_eval_mode() -> None:
    class Loop(nn.Module):
        def __init__(self, rate: float) -> None:
            super().__init__()
            self.layerdrop, self.blocks, self.dropout = rate, nn.ModuleList([nn.Dropout()]), nn.Dropout()

    for rate in (0.0, 0.1):
        trunk = nn.Sequential(Loop(rate))
        set_noise(trunk, "dropout")
        assert [name for name, part in trunk.named_modules() if not part.training] == (["0"] if rate else [])


def _watched(model: ss.SideModel, ran: list[str]) -> list[str]:
    """The blocks of the stack that a head reads, whose names go into `ran` when they run."""
    places = [place for place in model.places if place.site.kind == "block"]
    for place in places:
        place.module.register_forward_hook(lambda *_, name=place.name: ran.append(name))
    return [place.name for place in places]


def _pooled(last: Tensor, pool: str) -> Tensor:
    return last.mean(1) if pool == "mean" else last[:, {"cls": 0, "last": -1}[pool]]


def _without_cache(subject: Subject) -> Batch | dict[str, bool]:
    return {"use_cache": False} if subject.kind.group in ("causal", "seq2seq") else {}


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)  # wav2vec2 draws from here


@pytest.mark.parametrize(
    ("method", "kept"), [(ss.LoraConfig(rank=2), False), (ss.FullConfig(), True)], ids=["lora", "full"]
)
def test_a_front_without_trained_weights_is_out_of_the_graph(method: Any, kept: bool) -> None:
    family = ALL["wav2vec2"]
    model = ss.attach(family.model(), method, head=ss.Classify(num_labels=3)).train()
    seen: list[bool] = []
    front = model.trunk.feature_extractor
    front.register_forward_hook(lambda module, given, out: seen.append(out.requires_grad))
    model(**family.inputs(), labels=family.labels()).loss.backward()
    assert seen == [kept]
