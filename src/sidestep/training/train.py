"""Training a task with the plain `transformers.Trainer`."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch.optim import Optimizer
from transformers import Trainer

from sidestep import ranks
from sidestep.backbone import drop_path_rate
from sidestep.backbone.processors import tokenizer_of
from sidestep.backbone.shards import is_sharded
from sidestep.data import DataWarning
from sidestep.data.contents import content_hash
from sidestep.disk.features import FeatureStore
from sidestep.interface.offload import offloaded_size
from sidestep.kinds.base import UNREAD, kind_named
from sidestep.kinds.prepare import head_for
from sidestep.kinds.task_data import TaskData
from sidestep.measure.memory import format_bytes
from sidestep.measure.plan import check_fits, settle_keep
from sidestep.measure.rows import rows_at_once
from sidestep.measure.step import measure_step
from sidestep.messages import about, counted
from sidestep.model.attach import Attached
from sidestep.model.heads import named
from sidestep.model.initialise import initialise, samples_of
from sidestep.model.side_model import SideModel
from sidestep.tasks.features import Kept, kept_features
from sidestep.training import checkpoints
from sidestep.training import dense_stage as relax
from sidestep.training.callbacks import (
    Diverged,
    EpochClock,
)
from sidestep.training.checks import check_run
from sidestep.training.outcome import ends_scored, history_of, judge_run, results_of
from sidestep.training.pace import Pace
from sidestep.training.results import Results
from sidestep.training.settings import TrainSettings
from sidestep.training.shares import agree_on_run, start_alike
from sidestep.training.solved import solve_run
from sidestep.training.trainer import largest_batch, make_trainer

__all__ = ["TrainError", "TrainSettings", "head_for", "largest_batch", "train"]


class TrainError(RuntimeError):
    """Training could not go on. The message says what to change and where the last good checkpoint is."""


def train(
    model: Attached,
    data: TaskData,
    settings: TrainSettings,
    *,
    recipe: Mapping[str, Any] | None = None,
    tell: Callable[[str], object] | None = None,
    store: FeatureStore | None = None,
) -> Results:
    """Train a model, choose its best epoch on the dev rows (or keep the last), and save it as a task with its results.

    If the best epoch is kept, training stops early when no epoch is better for a while (see `TrainSettings.waits`).

    `settings.output` then holds the task, results.json, checkpoints/ (the best and the last, of the task
    alone) and logs/ (for TensorBoard).

    In a process that `torchrun` or `accelerate launch` has started, all such processes share the work (see
    docs/distributed.md). The first owns the folder.

    Args:
        model: attached, with a head for `data.labels` (see `head_for` and `load_backbone(writes=...)`).
        data: see `prepare`.
        settings: how.
        recipe: the name of the recipe that is followed and what differs from it. The results tell it.
        tell: called before training with lines that say what is stored, and how long training will take, if steps are
            measured.
        store: in memory, for features of several runs of this process. With one, a method whose features cannot be
            stored runs live, whatever the settings ask for.

    Returns:
        What results.json holds. The model is left with the kept weights, in eval mode.

    Raises:
        OutputError: if the output folder is taken, or the run to resume was another one.
        RanksDiffer, RankEnded: of several processes, if they do not do the same, or another one has ended.
        TrainError: if training diverges or memory runs out. Checkpoints stay.
        ValueError: if a setting does not fit the problem, or texts the backbone's positions.

    Warns:
        PlanWarning: if a step will need more memory than there is.
    """
    with ranks.together():
        return _train(model, data, settings, recipe=recipe, tell=tell if ranks.is_first() else None, store=store)


def _train(
    model: Attached,
    data: TaskData,
    settings: TrainSettings,
    *,
    recipe: Mapping[str, Any] | None,
    tell: Callable[[str], object] | None,
    store: FeatureStore | None,
) -> Results:
    data, settings = readable(model, data), checkpoints.as_begun(settings)
    if is_sharded(model):
        # plans copy the model, and passes whose number depends on the clock would not be the same everywhere
        settings = replace(settings, measure=False)
    check_run(model, data, settings)
    if settings.eval_batch_size is None:
        settings = replace(settings, eval_batch_size=rows_at_once(model, _longest(data)))
    _describe(model, data)
    metric = kind_named(data.labels.kind).best_by(settings.metric, len(data.labels.names))
    identity = _identity(model, data, settings)
    if relax.relaxes(model):
        relax.check(model, settings)
    agree_on_run(identity)
    ranks.first(lambda: checkpoints.check_output(settings))
    ranks.check_seen(settings.output)
    start = ranks.first(lambda: checkpoints.begin(settings, identity))
    if isinstance(model, SideModel) and model.side.solved:
        with _failures(settings):
            return solve_run(model, data, settings, metric, recipe=recipe, tell=tell, store=store)
    first, clock, estimate = None, EpochClock(), None
    last = relax.last_stage(model, settings) if relax.relaxes(model) else settings
    if relax.relaxes(model):
        with _failures(relax.own(model, settings)):
            batch = largest_batch(data, ranks.share(settings.batch_size)) if settings.measure else None

            if batch is not None and start is None:
                check_fits(model, batch, precision="bf16 autocast" if settings.bf16 else "float32")
                if not settings.resume:  # how much of this stage is left is not known here
                    estimate = _estimate(model, data, last, relax.epochs(model, settings), tell)

            def trainer_of(
                own: TrainSettings, at: Path | None, clock: EpochClock, optimizer: Callable[[], Optimizer]
            ) -> Trainer:
                return make_trainer(model, data, own, metric, at, clock, optimizer)

            first = relax.projected(model, settings, identity, start, trainer_of, batch)
    with _failures(settings):
        if start is None:
            _initialise(model, data, settings)
            start_alike(model)
        live, kept = data, _kept(model, data, last, start, store, tell)
        data = live if kept is None else kept.data
        if kept is None and tell is not None and (size := offloaded_size(model.backbone)):
            tell(
                f"the backbone is offloaded, and each step reads its {format_bytes(size)} of weights again: with "
                "--features ram or disk they are read once for each row, where the method's frozen part can be stored"
            )
        trainer = make_trainer(model, data, last, metric, start, clock)
        cost = None if first is None else first.cost
        if settings.measure and first is None:
            batch = largest_batch(data, ranks.share(settings.batch_size))
            # the Trainer's optimizer is the fused one
            how: Any = {"precision": "bf16 autocast" if settings.bf16 else "float32", "optimizer": "AdamW (fused)"}
            largest = largest_batch(live, ranks.share(settings.batch_size))
            if (chosen := _keep_alike(model, settle_keep(model, largest, **how))) and tell is not None:
                tell(chosen)
            check_fits(model, largest, **how)
            cost = measure_step(model, batch, bf16=settings.bf16)
            left = checkpoints.epochs_left(settings.epochs, start)
            estimate = _estimate(model, data, settings, left, tell) if left else None
        seconds = _run(trainer, start)
        history = history_of(trainer.state.log_history)
        judged = (trainer.judged(history) if ends_scored(settings) else None) or judge_run(model, data, settings)
    model.eval()

    def saved() -> Results:
        model.save_pretrained(settings.output, overwrite=settings.overwrite or settings.resume, scores=judged.scores)
        results = results_of(trainer, live, settings, recipe, judged, cost, seconds, estimate, start, history, clock)
        if kept is not None:
            results = replace(results, features=kept.told)
        if first is not None:
            results = replace(results, first_stage=first.told(history_of(first.log)))
        results.write(settings.output)
        return results

    return ranks.first(saved)


def _keep_alike(model: Attached, chosen: str | None) -> str | None:
    """Have all processes keep the inputs of taps in the first one's way. Returns what is said of it."""
    keepings = [part.fold.keeping for part in model.parts]
    for keeping, way in zip(keepings, ranks.first(lambda: [each.way for each in keepings]), strict=True):
        keeping.way = way
    return chosen


def _longest(data: TaskData) -> int | None:
    """Tokens of the longest dev text. None: rows are no texts."""
    return max(data.dev.with_format(None)["length"][:]) if "length" in data.dev.column_names else None


def _kept(
    model: Attached,
    data: TaskData,
    settings: TrainSettings,
    start: Path | None,
    store: FeatureStore | None,
    tell: Callable[[str], object] | None,
) -> Kept | None:
    """The rows with their frozen part stored, where the settings ask for that and it can be."""
    left = checkpoints.epochs_left(settings.epochs, start)
    return kept_features(
        model,
        data,
        settings.feature_options,
        passes=left + (not ends_scored(settings)) * len(data.dev) / (len(data.train) + len(data.dev)),
        batch_size=settings.eval_rows,
        autocast=settings.bf16,
        store=store,
        tell=tell,
        progress=settings.progress,
    )


def readable(model: Attached, data: TaskData) -> TaskData:
    """The data without columns that the model's forward does not take.

    The Trainer's column removal is not used. It takes the lengths away before the sampler asks for them. It also takes
    the row numbers by which an unreadable image is named.
    """
    names = {*inspect.signature(model.forward).parameters, *UNREAD, *kind_named(data.labels.kind).beside}

    def prune(rows: Dataset) -> Dataset:
        return rows.remove_columns([name for name in rows.column_names if name not in names])

    return replace(data, train=prune(data.train), dev=prune(data.dev))


def _describe(model: Attached, data: TaskData) -> None:
    """Store in the model what is needed to read further rows the same way."""
    _choose_padding_side(model, data)
    model.extras["processor"] = data.processor
    model.extras["preprocessing"] = data.preprocessing()
    config = getattr(model, "config", None)
    if config is None or data.generation is not None:
        return
    for name, value in named(data.labels.names).items():
        setattr(config, name, value)
    if model.head is not None:
        return
    if (kind := kind_named(data.labels.kind)).problem_type is not None:
        config.problem_type = kind.problem_type
    # a head of the backbone's own finds a row's last token by this id
    if getattr(config, "pad_token_id", None) is None and data.fields.text is not None:
        config.pad_token_id = data.processor.pad_token_id or 0


def _choose_padding_side(model: Attached, data: TaskData) -> None:
    """Have texts padded where the backbone does not mistake padding for text. A task stores its tokenizer.

    Warns:
        DataWarning: if that is another side than the tokenizer's.
    """
    tokenizer = tokenizer_of(data.processor) if data.fields.text is not None else None
    reader = model.parts[-1]
    if tokenizer is None or reader.facts.left != "moved" or tokenizer.padding_side != "left":
        return
    # what it was made with is what it saves
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "right"
    warnings.warn(
        f"texts are padded on the right, and not on the left as {type(tokenizer).__name__} does: "
        f"{type(reader.backbone).__name__} would read them otherwise in other batches",
        DataWarning,
        stacklevel=2,
    )


def _identity(model: Attached, data: TaskData, settings: TrainSettings) -> dict[str, Any]:
    """What a run is. A resumed run has to be the same."""
    return {
        **settings.fixed(),
        "method": {"name": model.record.name, **model.settings.method.to_dict()},
        "head": model.settings.head and model.settings.head.to_dict(),
        "noise": model.settings.backbone_noise,
        "drop path": drop_path_rate(model.trunk),
        "backbone": model.digest.exact[:16],
        "preprocessing": model.extras["preprocessing"],
        "training rows": _fingerprint(data.train),
        "dev rows": _fingerprint(data.dev),
        "handling": dict(data.handling),
    }


def _fingerprint(rows: Dataset) -> str:
    """A hash of all that the rows hold. Other texts of equal length, or other pictures of equal labels, change it."""
    return f"{len(rows)}, {content_hash(rows)[:12]}"


def _initialise(model: Attached, data: TaskData, settings: TrainSettings) -> None:
    """Show training rows, drawn by the seed, to a method whose starting weights depend on them."""
    if not isinstance(model, SideModel):
        if any(part.sparse is not None and part.sparse.is_idle for part in model.parts):
            raise ValueError(
                f"{model.record.name} as configured chooses weights by one backbone's loss, and this is a pair: choose "
                'select="random" or "grow"'
            )
        return
    samples = samples_of(model)
    if not samples:
        return
    drawn = np.random.default_rng(settings.seed).permutation(len(data.train))[:samples]
    initialise(model, (data.collate([data.train[int(index)]]) for index in drawn))


def _estimate(
    model: Attached, data: TaskData, settings: TrainSettings, epochs: float, tell: Callable[[str], object] | None
) -> float:
    """Seconds that so many epochs and the final evaluation will take. They are told, if somebody listens.

    The settings are those of the last stage, which may stop early.
    """
    seconds = Pace.measured(model, data, settings).seconds(epochs, more_evaluations=not ends_scored(settings))
    if tell is not None:
        early = ", less if training stops early" if 0 < settings.waits < settings.epochs else ""
        tell(f"time: {about(seconds)} for {counted(epochs, 'epoch')}{early}")
    return seconds


def _run(trainer: Trainer, start: Path | None) -> float:
    """Train, or take up the best weights of a run that had ended. Returns the seconds that this took."""
    begin = time.perf_counter()
    if start is not None and checkpoints.is_finished(start):
        best = checkpoints.best_of(start) if trainer.args.load_best_model_at_end else start
        trainer.model.load_state_dict(load_file(best / checkpoints.WEIGHTS))
        trainer.state.log_history = checkpoints.read_state(start)["log_history"]
        trainer.state.global_step = checkpoints.step_of(start)
        trainer.state.best_global_step = checkpoints.step_of(best)
    elif start is not None:
        ranks.first(lambda: checkpoints.relocate(start))
        trainer.train(resume_from_checkpoint=str(start.resolve()))
    else:
        trainer.train()
    return time.perf_counter() - begin


@contextmanager
def _failures(settings: TrainSettings) -> Iterator[None]:
    """Turn what ends training into an error that says what to change and what is left."""
    try:
        yield
    except Diverged as error:
        advice = "choose a lower learning rate (--lr), or look for odd rows in the data"
        if settings.bf16:
            advice += ", or train in fp32 (without --bf16)"
        raise TrainError(f"training diverged ({error}): {advice}. {_left(settings)}") from error
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        raise TrainError(
            f"out of memory ({str(error).splitlines()[0] if str(error) else type(error).__name__}): lower "
            f"--batch-size ({settings.batch_size} now, and --accumulate makes up for it) or --max-length, "
            f"recompute late blocks with --checkpoint late, or try --bf16. {_left(settings)}"
        ) from error


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    known = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(part in text for part in known)


def _left(settings: TrainSettings) -> str:
    last = checkpoints.last_complete(settings.output / checkpoints.FOLDER)
    return "No checkpoint had been written" if last is None else f"The last good checkpoint stays at {last}"
