"""Sums of sparse diffs are sums of weights, and only of one backbone's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sidestep as ss
from dual_encoders import clip
from sidestep.tasks.load import DtypeMismatch
from tiny import FAMILIES, LABELS, logits

BERT = FAMILIES["bert"]


def task(folder: Path, seed: int, backbone: int = 0, **settings: Any) -> Path:
    torch.manual_seed(seed)
    config = ss.SparseConfig(density=0.2, select="random", seed=seed, **settings)
    model = ss.attach(BERT.model(backbone), config, head=ss.Classify(num_labels=LABELS))
    with torch.no_grad():
        for _, parameter in model.trained_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def test_the_weights_are_the_pretrained_ones_plus_both_diffs(tmp_path: Path) -> None:
    folders = [task(tmp_path / name, seed) for seed, name in enumerate(("task", "language"))]
    first, second = (ss.load(folder, BERT.model()) for folder in folders)
    total = {name: torch.zeros(shape) for name, shape in first.sparse.shapes.items()}
    shared = torch.isin(first.sparse.positions, second.sparse.positions)
    assert 0 < int(shared.sum()) < len(shared)
    for model in (first, second):
        for name, (positions, values) in model.sparse.entries().items():
            total[name].view(-1)[positions] += values
    head = first.head.linear.weight.clone()
    first.extras["scores"] = {"accuracy": 0.9}
    ss.add_diff(first, folders[1])
    assert "scores" not in first.extras
    plain = BERT.model().base_model
    for name, tensor in first.sparse.tensors.items():
        torch.testing.assert_close(tensor, plain.get_parameter(name) + total[name], rtol=0, atol=1e-7)
    assert torch.equal(first.head.linear.weight, head)
    expected = logits(first(**BERT.inputs()))
    first.save_pretrained(tmp_path / "sum")
    again = ss.load(tmp_path / "sum", BERT.model())
    assert torch.equal(logits(again(**BERT.inputs())), expected)
    bare = ss.detach(first)
    assert all(torch.equal(p, q) for p, q in zip(bare.parameters(), BERT.model().parameters(), strict=True))


Entries = dict[str, tuple[Tensor, Tensor]]
SIZES = {name: tensor.numel() for name, tensor in BERT.model().base_model.named_parameters() if "pooler" not in name}


@st.composite
def changes(draw: st.DrawFn) -> Entries:
    """Whole numbers, whose sums are exact, at any entries of some weights."""
    found = {}
    for name in draw(st.lists(st.sampled_from(list(SIZES)), unique=True, min_size=1, max_size=4)):
        values = draw(st.dictionaries(st.integers(0, min(20, SIZES[name]) - 1), st.integers(-8, 8), min_size=1))
        found[name] = torch.tensor(sorted(values)), torch.tensor([float(values[place]) for place in sorted(values)])
    return found


def dense(entries: Entries, name: str) -> Tensor:
    total = torch.zeros(SIZES[name])
    if name in entries:
        positions, values = entries[name]
        total[positions] = values
    return total


@settings(max_examples=settings().max_examples // 10)
@given(changes(), changes(), st.sampled_from((1.0, -1.0, 0.5, 2.0, 0.0)))
@torch.no_grad()
def test_any_two_diffs_add_up_entry_by_entry_and_one_can_be_taken_away_again(
    tmp_path_factory: pytest.TempPathFactory, first: Entries, second: Entries, scale: float
) -> None:
    models = [ss.attach(BERT.model(), ss.SparseConfig(), head=ss.Classify(num_labels=LABELS)) for _ in range(2)]
    plain = {name: tensor.detach().flatten().clone() for name, tensor in models[0].sparse.tensors.items()}
    for model, entries in zip(models, (first, second), strict=True):
        model.sparse.place(entries)
    folder = tmp_path_factory.mktemp("sum") / "second"
    models[1].save_pretrained(folder)
    for taken_away in (False, True):
        ss.add_diff(models[0], folder, -scale if taken_away else scale)
        sums = models[0].sparse.entries()
        for name, tensor in models[0].sparse.tensors.items():
            wanted = dense(first, name) + (0 if taken_away else scale) * dense(second, name)
            assert torch.equal(dense(sums, name), wanted)
            assert torch.equal(tensor.flatten(), plain[name] + wanted)


def test_diffs_of_two_backbones_and_what_is_no_diff_are_refused(tmp_path: Path) -> None:
    model = ss.load(task(tmp_path / "task", 0), BERT.model())
    with pytest.raises(ss.DifferentBackbones, match="diffs add up on one backbone only"):
        ss.add_diff(model, task(tmp_path / "other", 1, backbone=9))
    read = ss.attach(BERT.model(), ss.ReadConfig(rank=2), head=ss.Classify(num_labels=LABELS))
    read.save_pretrained(tmp_path / "read")
    with pytest.raises(ss.TaskError, match="is a task of read, which is no sparse diff"):
        ss.add_diff(model, tmp_path / "read")
    with pytest.raises(ss.TaskError, match="read, has no trained sparse diff"):
        ss.add_diff(read, tmp_path / "task")


def test_another_precision_is_refused_as_by_load_or_told(tmp_path: Path) -> None:
    folders = [task(tmp_path / name, seed) for seed, name in enumerate(("task", "language"))]
    with pytest.warns(DtypeMismatch):
        model = ss.load(folders[0], BERT.model().bfloat16(), allow_mismatch=True)
    said = r"language was made on these weights in float32, .* is in bfloat16"
    with pytest.raises(ss.TaskError, match=f"{said}.*load the backbone in float32"):
        ss.add_diff(model, folders[1])
    with pytest.warns(DtypeMismatch, match=said) as told:
        ss.add_diff(model, folders[1], allow_mismatch=True)
    assert told[0].filename == __file__


@pytest.mark.parametrize(
    ("weights", "values", "scale", "said"),
    [
        (torch.float32, "float16", 1e9, r"values up to .*e\+0\d in .*, out of the range of torch.float16"),
        (torch.float16, "float32", 1e9, r"values up to .*e\+0\d in .*, out of the range of torch.float16"),
        (torch.float32, "float32", 1e39, "out of the range of torch.float32. Choose a smaller scale"),
        (torch.float32, "float32", float("nan"), "scale=nan, but it must be a finite number"),
        (torch.float32, "float32", float("-inf"), "scale=-inf"),
    ],
)
@pytest.mark.filterwarnings("ignore::sidestep.tasks.load.DtypeMismatch")
def test_sums_that_do_not_fit_are_refused_and_nothing_is_changed(
    tmp_path: Path, weights: torch.dtype, values: Any, scale: float, said: str
) -> None:
    folders = [task(tmp_path / name, seed, value_dtype=values) for seed, name in enumerate(("task", "language"))]
    model = ss.load(folders[0], BERT.model().to(weights), allow_mismatch=True)
    diff, before = model.sparse.values, {name: value.clone() for name, value in model.trunk.state_dict().items()}
    kept = diff.detach().clone()
    with pytest.raises(ValueError, match=said):
        ss.add_diff(model, folders[1], scale=scale, allow_mismatch=True)
    assert model.sparse.values is diff
    assert torch.equal(diff, kept)
    assert all(torch.equal(value, before[name]) for name, value in model.trunk.state_dict().items())


def test_diffs_of_pairs_are_refused(tmp_path: Path) -> None:
    pair = ss.attach(clip(), ss.SparseConfig(density=0.05, select="random"), head=ss.Retrieve())
    pair.save_pretrained(tmp_path / "pair")
    model = ss.load(task(tmp_path / "task", 0), BERT.model())
    with pytest.raises(ss.TaskError, match="pair is of a dual encoder, and diffs of pairs cannot be added"):
        ss.add_diff(model, tmp_path / "pair")
    for folder in ("pair", "task"):
        with pytest.raises(ss.TaskError, match="the model is of a dual encoder, and diffs of pairs cannot be added"):
            ss.add_diff(pair, tmp_path / folder)
