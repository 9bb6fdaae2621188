"""What a head reads, its losses, and its config."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sidestep as ss
from sidestep.backbone.families import Pool
from sidestep.fold import Reading, mean_tokens
from sidestep.interface.layers import last_kept
from sidestep.interface.sites import Site
from sidestep.model.heads import Head, HeadConfig, head_from_dict

WIDTH = 6
RIGHT = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
LEFT = RIGHT.flip(1)


def head(pool: Pool = "mean", config: HeadConfig | None = None) -> Head:
    return (config or ss.Classify(num_labels=3)).build(WIDTH, pool)


def reading(hidden: Tensor, keep: Tensor | None = None, prefix: int = 0, pooled: Tensor | None = None) -> Reading:
    site = Site(kind="block", stack="encoder", stage=0, index=0, depth=1, width=WIDTH, prefix=prefix, keep=keep)
    return Reading(hidden, site, pooled)


# --- what is read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [None, RIGHT, LEFT], ids=["whole", "right", "left"])
@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("pool", ["cls", "mean", "last"])
def test_a_pool_reads_its_tokens(pool: Pool, prefix: int, keep: Tensor | None) -> None:
    hidden = torch.randn(3, 5, WIDTH)
    mask = torch.ones(3, 5).bool() if keep is None else keep
    rows = []
    for tokens, kept in zip(hidden, mask, strict=True):
        if pool == "mean":
            inner = tokens[prefix:][kept[prefix:]]
            rows.append(inner.mean(0) if len(inner) else torch.zeros(WIDTH))
        else:
            rows.append(tokens[0] if pool == "cls" else tokens[kept][-1])
    found = head(pool).read(reading(hidden, keep, prefix))
    torch.testing.assert_close(found, torch.stack(rows))


def test_the_last_kept_token_is_found_on_either_side() -> None:
    assert last_kept(RIGHT).tolist() == [4, 2, 0]
    assert last_kept(LEFT).tolist() == [4, 4, 4]


@pytest.mark.parametrize("pool", ["cls", "last"])
@pytest.mark.parametrize("keep", [None, RIGHT], ids=["whole", "padded"])
def test_a_row_does_not_pin_its_neighbours(pool: Pool, keep: Tensor | None) -> None:
    found = head(pool).read(reading(torch.randn(3, 5, WIDTH), keep))
    assert found.untyped_storage().nbytes() == 3 * WIDTH * 4


def test_a_single_token_is_read_as_it_is() -> None:
    hidden = torch.randn(3, 1, WIDTH)
    for pool in ("cls", "mean", "last"):
        assert torch.equal(head(pool).read(reading(hidden, prefix=1)), hidden[:, 0])


def test_a_read_out_of_the_methods_own_goes_first() -> None:
    made, pooled = head(), torch.randn(3, WIDTH)
    out = made(reading(torch.randn(3, 5, WIDTH), pooled=pooled))
    torch.testing.assert_close(out, made.linear(pooled))


def test_features_come_in_the_heads_precision() -> None:
    made = head()
    assert made(reading(torch.randn(3, 5, WIDTH).bfloat16())).dtype == torch.float32


class MeanPool(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return mean_tokens(hidden, reading(hidden, RIGHT).site)


def test_mean_pool_keeps_the_mask_and_no_masked_copy() -> None:
    hidden = torch.randn(3, 5, WIDTH, requires_grad=True)
    pool = MeanPool()
    with ss.saved_bytes(pool) as kept:
        out = pool(hidden)
    weights = torch.randn(3, WIDTH)
    (out * weights).sum().backward()
    expected = (RIGHT / RIGHT.sum(1, keepdim=True))[..., None] * weights[:, None]
    torch.testing.assert_close(hidden.grad, expected)
    assert kept.total <= 4 * RIGHT.numel() + 4 * 3 * (1 + WIDTH)
    assert all(row.shape != hidden.shape for row in kept.rows)


# --- losses --------------------------------------------------------------------------------------------------

CASES: dict[str, tuple[HeadConfig, Tensor]] = {
    "single": (ss.Classify(num_labels=3), torch.tensor([2, 0, 1, 2])),
    "multi": (
        ss.Classify(num_labels=3, problem="multi"),
        torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]),
    ),
    "regress": (ss.Regress(), torch.tensor([0.3, -1.2, 2.5, 0.1])),
    "regress two": (ss.Regress(targets=2), torch.randn(4, 2)),
}


def by_hand(config: HeadConfig, logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of every term, unreduced."""
    if config.kind == "single":
        return -logits.log_softmax(-1)[torch.arange(len(labels)), labels]
    if config.kind == "multi":
        return -(labels * F.logsigmoid(logits) + (1 - labels) * F.logsigmoid(-logits))
    return (logits - labels.reshape(logits.shape)).square()


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_the_mean_or_the_sum_over_the_items_of_the_batch(case: str) -> None:
    config, labels = CASES[case]
    made, logits = head(config=config), torch.randn(4, config.outputs)
    terms = by_hand(config, logits, labels)
    torch.testing.assert_close(made.loss(logits, labels), terms.mean())
    torch.testing.assert_close(made.loss(logits, labels, 7), terms.sum() / 7)
    torch.testing.assert_close(made.loss(logits, labels, torch.tensor(7)), terms.sum() / 7)


@pytest.mark.parametrize("case", ["single", "regress"])
def test_accumulated_losses_add_up_to_the_batchs(case: str) -> None:
    config, labels = CASES[case]
    made, logits = head(config=config), torch.randn(4, config.outputs)
    parts = [made.loss(logits[i : i + 1], labels[i : i + 1], 4) for i in range(4)]
    torch.testing.assert_close(torch.stack(parts).sum(), made.loss(logits, labels))


def test_the_loss_is_computed_in_float32() -> None:
    config, labels = CASES["single"]
    assert head(config=config).loss(torch.randn(4, 3).bfloat16(), labels).dtype == torch.float32


def test_regression_starts_at_the_center() -> None:
    assert head(config=ss.Regress(targets=2, center=2.5)).linear.bias.tolist() == [2.5, 2.5]
    assert head().linear.bias.tolist() == [0, 0, 0]


# --- configs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ss.Classify(num_labels=1), "num_labels=1: a single-label head needs more"),
        (lambda: ss.Classify(num_labels=0, problem="multi"), "num_labels=0: a multi-label head needs more"),
        (lambda: ss.Classify(num_labels=2, labels=("a",)), "num_labels=2, but 1 label names were given"),
        (lambda: ss.Classify(num_labels=2, pool="max"), "pool='max': choose None or one of cls, mean, "),
        (lambda: ss.Classify(num_labels=2, problem="token"), "Take ss.Tag(num_labels=...)"),
        (lambda: ss.Classify(num_labels=2, problem="both"), 'problem=\'both\', but it must be "single" or "multi"'),
        (lambda: ss.Tag(num_labels=1), "num_labels=1: a head of tags needs at least 2"),
        (lambda: ss.Tag(num_labels=3, labels=("a",)), "num_labels=3, but 1 label names were given"),
        (lambda: ss.Tag(num_labels=3, pool="cls"), "pool='cls': choose None or one of all"),
        (lambda: ss.Regress(targets=0), "targets=0: at least 1"),
        (lambda: head_from_dict({"head": "Rank"}), "unknown head 'Rank': this version knows Classify, Regress"),
    ],
)
def test_a_wrong_config_says_what_it_was_given(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        make()


@pytest.mark.parametrize(
    "config",
    [
        ss.Classify(num_labels=2, labels=["no", "yes"], pool="last"),
        ss.Classify(num_labels=1, problem="multi"),
        ss.Regress(targets=3, center=-0.5, pool="cls"),
        ss.Tag(num_labels=2, labels=["O", "B-PER"]),
        ss.Span(),
    ],
)
def test_a_config_comes_back_from_json(config: HeadConfig) -> None:
    assert head_from_dict(json.loads(json.dumps(config.to_dict()))) == config
