"""Sums of sparse diffs are sums of weights, and only of one backbone's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sidestep as ss
from sidestep.store import TaskError
from sidestep.sums import DifferentBackbones
from tiny import FAMILIES, LABELS, logits

BERT = FAMILIES["bert"]


def task(folder: Path, seed: int, backbone: int = 0) -> Path:
    torch.manual_seed(seed)
    config = ss.SparseConfig(density=0.2, select="random", seed=seed)
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
    ss.add_diff(first, folders[1])
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


def test_diffs_of_two_backbones_and_what_is_no_diff_are_refused(tmp_path: Path) -> None:
    model = ss.load(task(tmp_path / "task", 0), BERT.model())
    with pytest.raises(DifferentBackbones, match="diffs add up on one backbone only"):
        ss.add_diff(model, task(tmp_path / "other", 1, backbone=9))
    read = ss.attach(BERT.model(), ss.ReadConfig(rank=2), head=ss.Classify(num_labels=LABELS))
    read.save_pretrained(tmp_path / "read")
    with pytest.raises(TaskError, match="is a task of read, which is no sparse diff"):
        ss.add_diff(model, tmp_path / "read")
    with pytest.raises(TaskError, match="read, has no trained sparse diff"):
        ss.add_diff(read, tmp_path / "task")
