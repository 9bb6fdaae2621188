"""Runs whose head is solved from what the method reads, without steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidestep import ranks
from sidestep.data import DataError
from sidestep.disk.features import FeatureStore
from sidestep.kinds.features import Feed
from sidestep.kinds.solve import Problem, Solution, solve
from sidestep.kinds.task_data import TaskData
from sidestep.measure.memory import format_bytes
from sidestep.measure.step import accepted
from sidestep.methods.readout import ReadoutConfig
from sidestep.model.features import VECTOR
from sidestep.model.heads.tokens import ReadsTokens
from sidestep.model.side_model import SideModel
from sidestep.tasks.features import Kept, kept_features
from sidestep.training.outcome import judge_run, told_of
from sidestep.training.results import Results
from sidestep.training.settings import TrainSettings
from sidestep.training.shares import start_alike

PROBLEMS = ("single", "multi", "regress")
OF_TOKENS: dict[str, Problem] = {"tokens": "single", "spans": "multi"}
"""As what a head of all tokens is solved, by its kind."""
MOST_TOKENS = 2**16
"""Tokens of training rows that such a head is solved on, at most."""
RARE = 2
"""Training tokens below which a tag is not solved for."""
NEVER = -1e4
"""The logit of such a tag."""


def solve_run(
    model: SideModel,
    data: TaskData,
    settings: TrainSettings,
    metric: str,
    *,
    recipe: Mapping[str, Any] | None,
    tell: Callable[[str], object] | None,
    store: FeatureStore | None,
) -> Results:
    """Solve a model's head on the training rows, score it on the dev rows, and save it as a task with its results.

    Arguments and errors as of `train`.
    """
    if data.labels.kind not in (*PROBLEMS, *OF_TOKENS):
        raise ValueError(
            f"{model.record.name} solves a linear map for classes or numbers, and the problem is {data.labels.kind!r}: "
            "choose another method"
        )
    kept = None if data.labels.kind in OF_TOKENS else _kept(model, data, settings, tell, store)
    start_alike(model)
    begin = time.perf_counter()
    found = _solved_tokens(model, data, settings, tell) if kept is None else _solved(model, kept.data, settings)
    seconds = time.perf_counter() - begin
    if found.lost > 0.001 and tell is not None:
        tell(f"readout: {found.lost:.1%} of the variance of its vectors is outside of the span that it was solved in")
    model.eval()
    judged = judge_run(model, data if kept is None else kept.data, settings)
    loss = _dev_loss(model, data if kept is None else kept.data, settings.eval_rows)
    history = [{"epoch": 1.0, "train_loss": found.loss, "dev_loss": loss}]
    history[0] |= {f"dev_{name}": value for name, value in judged.scores.items()}

    def saved() -> Results:
        model.save_pretrained(settings.output, overwrite=settings.overwrite or settings.resume, scores=judged.scores)
        results = Results(
            **told_of(model, data, settings, recipe, judged),
            metric=metric,
            best_epoch=1.0,
            epochs=1.0,
            planned_epochs=1,
            method={"name": model.record.name, **model.settings.method.to_dict(), "chosen_penalty": found.penalty},
            step=None,
            seconds=round(seconds, 3),
            estimated_seconds=None,
            epoch_seconds=[round(seconds, 4)],
            resumed_from=None,
            history=history,
            features=None if kept is None else kept.told,
        )
        results.write(settings.output)
        return results

    return ranks.first(saved)


def _kept(
    model: SideModel,
    data: TaskData,
    settings: TrainSettings,
    tell: Callable[[str], object] | None,
    store: FeatureStore | None,
) -> Kept:
    """The vectors of all rows. They are few, and are read again and again, so they are kept in any case.

    Raises:
        ValueError: if they cannot be kept.
    """
    options = settings.feature_options
    if options.where in ("auto", "off"):
        options = replace(options, where="ram")
    found = kept_features(
        model,
        data,
        options,
        passes=1,
        batch_size=settings.eval_rows,
        autocast=settings.bf16,
        tell=tell,
        progress=settings.progress,
        store=store,
    )
    if found is None:
        raise ValueError(f"{model.record.name} needs the vectors of all rows, and they could not be kept")
    return found


def _solved(model: SideModel, data: TaskData, settings: TrainSettings) -> Solution:
    """Solve the head, and put the map into it."""
    config, head = cast("ReadoutConfig", model.settings.method), model.head
    assert head is not None
    found = solve(
        _vectors(data),
        torch.from_numpy(np.array(data.train.with_format(None)["labels"][:])),
        cast("Problem", data.labels.kind),
        outputs=head.linear.out_features,
        penalty=config.penalty,
        balanced=config.class_weights == "balanced",
        seed=settings.seed,
    )
    with torch.no_grad():
        head.linear.weight.copy_(found.weight)
        head.linear.bias.copy_(found.bias)
    return found


def _solved_tokens(
    model: SideModel, data: TaskData, settings: TrainSettings, tell: Callable[[str], object] | None
) -> Solution:
    """Solve a head of all tokens on those that count, and put the map into it.

    Their vectors are computed once and held. Of more tokens than `MOST_TOKENS` the most frequent target is drawn from,
    and what is drawn of it counts for all.
    """
    config, head = cast("ReadoutConfig", model.settings.method), model.head
    assert head is not None
    of_head = cast("ReadsTokens", head.config)
    lengths = data.train.with_format(None)["length"][:]
    terms = [of_head.terms(*row) for row in zip(data.train.with_format(None)["labels"][:], lengths, strict=True)]
    places, targets = [row[0] for row in terms], np.concatenate([row[1] for row in terms])
    rows = np.repeat(np.arange(len(terms)), [len(own) for own in places])
    chosen, weights = _drawn(targets, settings.seed)
    solved = _present(targets[chosen]) if targets.ndim == 1 else None
    if solved is not None:  # tags of no or one token are not learned
        kept = np.isin(targets[chosen], solved)
        chosen, weights = chosen[kept], weights[kept]
    held = _token_vectors(model, data, settings, rows[chosen], np.concatenate(places)[chosen])
    if tell is not None:
        tell(f"readout: solved on {len(chosen)} of the {len(targets)} tokens that count")
    own = targets[chosen] if solved is None else np.searchsorted(solved, targets[chosen])
    found = solve(
        lambda start, end: held[start:end].float(),
        torch.from_numpy(own),
        OF_TOKENS[data.labels.kind],
        outputs=of_head.outputs if solved is None else len(solved),
        penalty=config.penalty,
        balanced=config.class_weights == "balanced",
        weights=torch.from_numpy(weights),
        seed=settings.seed,
    )
    with torch.no_grad():
        which = slice(None) if solved is None else torch.from_numpy(solved)
        head.linear.weight.zero_()
        head.linear.bias.fill_(NEVER)
        head.linear.weight[which] = found.weight.to(head.linear.weight)
        head.linear.bias[which] = found.bias.to(head.linear.bias)
    return found


def _present(targets: NDArray[Any]) -> NDArray[Any]:
    """The tags with enough tokens, in order."""
    numbers, counts = np.unique(targets, return_counts=True)
    return numbers[counts >= RARE]


def _drawn(targets: NDArray[Any], seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Which tokens a head is solved on, in order, and how much each counts (1 on average)."""
    count = len(targets)
    if count <= MOST_TOKENS:
        return np.arange(count), np.ones(count)
    _, of, sizes = np.unique(targets, axis=0, return_inverse=True, return_counts=True)
    usual = np.flatnonzero(of.ravel() == sizes.argmax())
    others = np.flatnonzero(of.ravel() != sizes.argmax())
    few = max(MOST_TOKENS - len(others), MOST_TOKENS // 4)
    drawn = np.random.default_rng(seed).choice(usual, min(few, len(usual)), replace=False)
    chosen = np.sort(np.concatenate([others, drawn]))
    weights = np.where(np.isin(chosen, drawn), len(usual) / len(drawn), 1.0)
    return chosen, weights / weights.mean()


def _token_vectors(
    model: SideModel, data: TaskData, settings: TrainSettings, rows: NDArray[Any], places: NDArray[Any]
) -> Tensor:
    """(tokens, channels) of what the head reads at places of training rows, on the CPU.

    Raises:
        DataError: if memory is too small for them.
    """
    assert model.head is not None
    width, free = model.head.linear.in_features, psutil.virtual_memory().available
    if (needed := 4 * len(rows) * width) > free:
        raise DataError(
            f"{model.record.name} needs the vectors of {len(rows)} tokens, which take {format_bytes(needed)}, and "
            f"{format_bytes(free)} of memory are free. Read fewer levels (--set levels=2)"
        )
    held = torch.zeros(len(rows), width)
    starts = np.searchsorted(rows, np.arange(len(data.train) + 1))
    order = np.argsort(data.train.with_format(None)["length"][:], kind="stable")
    model.eval()
    order, size = order[ranks.rank() :: ranks.count()], ranks.share(settings.eval_rows)
    for begin in range(0, len(order), size):
        numbers = order[begin : begin + size].tolist()
        batch = accepted(model, data.collate([data.train[number] for number in numbers]))
        found, _ = model.vector({name: value for name, value in batch.items() if name != "labels"})
        for vectors, number in zip(found, numbers, strict=True):
            own = slice(starts[number], starts[number + 1])
            held[own] = vectors[torch.from_numpy(places[own]).to(vectors.device)].float().cpu()
    return ranks.total(held)


def _vectors(data: TaskData) -> Callable[[int, int], Tensor]:
    """The vectors of training rows from one number to another."""
    feed = cast("Feed", data.collate.features)

    def vectors(start: int, end: int) -> Tensor:
        return torch.cat([feed.entry.state(row, VECTOR) for row in feed.ids[start:end]]).float()

    return vectors


def _dev_loss(model: SideModel, data: TaskData, size: int) -> float:
    """The mean loss of the dev rows, of batches by their rows."""
    total, batches = torch.zeros((), dtype=torch.float64), range(0, len(data.dev), size)
    with torch.no_grad():
        for start in ranks.own(batches):
            rows = [data.dev[number] for number in range(start, min(start + size, len(data.dev)))]
            total += float(model(**accepted(model, data.collate(rows))).loss) * len(rows)
    return float(ranks.total(total)) / len(data.dev)
