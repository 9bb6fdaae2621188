"""Training a task with the plain `transformers.Trainer`."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, Trainer, TrainingArguments
from transformers.integrations import TensorBoardCallback

from sidestep.backbone import drop_path_rate
from sidestep.backbone.source import source_of
from sidestep.data import DataWarning, Generation, LabelSpace
from sidestep.data.contents import content_hash
from sidestep.disk.task_folder import WEIGHTS
from sidestep.kinds.assess import Assessment, assess_evaluation
from sidestep.kinds.prepare import TaskData, written_kind
from sidestep.measure.plan import check_fits
from sidestep.measure.step import StepCost, measure_step
from sidestep.messages import about
from sidestep.metrics import GREATER_IS_BETTER, ComputeMetrics
from sidestep.model.attach import Attached
from sidestep.model.heads import Classify, HeadConfig, Regress, Retrieve, named
from sidestep.model.initialise import initialise, samples_of
from sidestep.model.pair_model import PairModel
from sidestep.model.side_model import SideModel
from sidestep.tasks.predict import judge_encoded
from sidestep.training import checkpoints
from sidestep.training import dense_stage as relax
from sidestep.training.callbacks import (
    Bars,
    Diverged,
    EpochClock,
    ExactResume,
    MoveSupport,
    SetEpoch,
    StopIfDiverged,
    TellEpoch,
)
from sidestep.training.checks import check_run
from sidestep.training.notes import notes_of
from sidestep.training.pace import Pace
from sidestep.training.results import PACKAGES, Results, device_name
from sidestep.training.schedules import rate_factor
from sidestep.training.settings import TrainSettings
from sidestep.versions import versions

__all__ = ["TrainError", "TrainSettings", "head_for", "largest_batch", "train"]


class TrainError(RuntimeError):
    """Training could not go on; the message says what to change and where the last good checkpoint is."""


def train(
    model: Attached,
    data: TaskData,
    settings: TrainSettings,
    *,
    recipe: Mapping[str, Any] | None = None,
    tell: Callable[[str], object] | None = None,
) -> Results:
    """Train a model, choose its best epoch on the dev rows (or keep the last), and save it as a task with its results.

    Training stops early where no epoch is better for a while, if the best one is kept (see `TrainSettings.waits`).

    `settings.output` then holds the task, results.json, checkpoints/ (the best and the last, of the task
    alone) and logs/ (for TensorBoard).

    Args:
        model: attached, with a head for `data.labels` (see `head_for` and `load_backbone(writes=...)`).
        data: see `prepare`.
        settings: how.
        recipe: the name of the recipe that it follows and what differs from it, to be told in the results.
        tell: takes a line that says before training how long it will take, if steps are measured.

    Returns:
        What results.json holds; the model is left with the kept weights, in eval mode.

    Raises:
        OutputError: if the output folder is taken, or the run to resume was another one.
        TrainError: if training diverges or memory runs out; checkpoints stay.
        ValueError: if a setting does not fit the problem, or texts the backbone's positions.

    Warns:
        PlanWarning: if a step will need more memory than there is.
    """
    data, settings = _readable(model, data), checkpoints.as_begun(settings)
    check_run(model, data, settings)
    _describe(model, data)
    metric = settings.best_by(data.labels.kind, len(data.labels.names))
    identity = _identity(model, data, settings)
    if relax.relaxes(model):
        relax.check(model, settings)
    start = checkpoints.begin(settings, identity)
    first, clock, estimate = None, EpochClock(), None
    last = relax.last_stage(model, settings) if relax.relaxes(model) else settings
    if relax.relaxes(model):
        with _failures(relax.own(model, settings)):
            batch = largest_batch(data, settings.batch_size) if settings.measure else None

            if batch is not None and start is None:
                check_fits(model, batch, precision="bf16 autocast" if settings.bf16 else "float32")
                if not settings.resume:  # how much of this stage is left is not known here
                    estimate = _estimate(model, data, last, relax.epochs(model, settings), tell)

            def trainer_of(
                own: TrainSettings, at: Path | None, clock: EpochClock, optimizer: Callable[[], Optimizer]
            ) -> Trainer:
                return _trainer(model, data, own, metric, at, clock, optimizer)

            first = relax.projected(model, settings, identity, start, trainer_of, batch)
    trainer = _trainer(model, data, last, metric, start, clock)
    with _failures(settings):
        if start is None:
            _initialise(model, data, settings)
        cost = None if first is None else first.cost
        if settings.measure and first is None:
            batch = largest_batch(data, settings.batch_size)
            # the Trainer's optimizer is the fused one
            check_fits(
                model, batch, precision="bf16 autocast" if settings.bf16 else "float32", optimizer="AdamW (fused)"
            )
            cost = measure_step(model, batch, bf16=settings.bf16)
            left = checkpoints.epochs_left(settings.epochs, start)
            estimate = _estimate(model, data, settings, left, tell) if left else None
        seconds = _run(trainer, start)
        history = _history(trainer.state.log_history)
        judged = (trainer.judged(history) if _ends_scored(settings) else None) or _judged(model, data, settings)
    model.eval()
    model.save_pretrained(settings.output, overwrite=settings.overwrite or settings.resume, scores=judged.scores)
    results = _results(trainer, data, settings, recipe, judged, cost, seconds, estimate, start, history, clock)
    if first is not None:
        results = replace(results, first_stage=first.told(_history(first.log)))
    results.write(settings.output)
    return results


def head_for(data: TaskData, pool: Any = None) -> HeadConfig | None:
    """The Sidestep head for what the data's labels are; a regression starts at the mean of its targets.

    None where texts are written: the backbone's own language model head does that.

    Raises:
        ValueError: for a pool where texts are written.
    """
    if (kind := written_kind(data.labels.kind)) is not None:
        if pool is not None:
            raise ValueError(
                f"pool={pool!r} with problem {kind!r}: a language model head reads all tokens; leave it out"
            )
        return None
    if data.labels.kind == "retrieval":
        return Retrieve(pool=pool)
    if data.labels.kind == "regress":
        return Regress(pool=pool, center=float(np.mean(data.train.with_format(None)["labels"][:])))
    problem: Literal["single", "multi"] = "multi" if data.labels.kind == "multi" else "single"
    return Classify(num_labels=data.labels.outputs, labels=data.labels.names, problem=problem, pool=pool)


# --- before ------------------------------------------------------------------------------------------------


def _readable(model: Attached, data: TaskData) -> TaskData:
    """The data without columns that the model's forward does not take.

    Not left to the Trainer's column removal: that takes the lengths away before the sampler asks for them,
    and the row numbers by which an unreadable image is named.
    """
    names = {*inspect.signature(model.forward).parameters, "labels", "length", "row", "target"}

    def prune(rows: Dataset) -> Dataset:
        return rows.remove_columns([name for name in rows.column_names if name not in names])

    return replace(data, train=prune(data.train), dev=prune(data.dev))


def _describe(model: Attached, data: TaskData) -> None:
    """Store in the model what reads further rows the same way."""
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
    if data.labels.kind == "multi":
        config.problem_type = "multi_label_classification"
    # a head of the backbone's own finds a row's last token by this id
    if getattr(config, "pad_token_id", None) is None and data.fields.text is not None:
        config.pad_token_id = data.processor.pad_token_id or 0


def _choose_padding_side(model: Attached, data: TaskData) -> None:
    """Have texts padded where the backbone does not mistake padding for text; a task stores its tokenizer.

    Warns:
        DataWarning: if that is another side than the tokenizer's.
    """
    tokenizer = getattr(data.processor, "text", data.processor) if data.fields.text is not None else None
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
    """What a run is: a resumed one has to be the same."""
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
    """Of all that the rows hold: texts of the same length and other pictures of the same labels are other rows."""
    return f"{len(rows)}, {content_hash(rows)[:12]}"


def _initialise(model: Attached, data: TaskData, settings: TrainSettings) -> None:
    """Let a method whose start hangs on training rows see some, drawn by the seed."""
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


def largest_batch(data: TaskData, size: int) -> Any:
    """The batch of the longest training texts (or of the first images)."""
    rows = data.train
    order = np.argsort(rows["length"][:])[::-1] if "length" in rows.column_names else np.arange(len(rows))
    return data.collate([rows[int(index)] for index in order[:size]])


def _estimate(
    model: Attached, data: TaskData, settings: TrainSettings, epochs: float, tell: Callable[[str], object] | None
) -> float:
    """Seconds that so many epochs and the final evaluation will take; told, if somebody listens.

    The settings are those of the last stage, which may stop early.
    """
    seconds = Pace.measured(model, data, settings).seconds(epochs, more_evaluations=not _ends_scored(settings))
    if tell is not None:
        early = ", less if training stops early" if 0 < settings.waits < settings.epochs else ""
        tell(f"time: {about(seconds)} for {epochs:g} epochs{early}")
    return seconds


# --- the Trainer -------------------------------------------------------------------------------------------


def _trainer(
    model: Attached,
    data: TaskData,
    settings: TrainSettings,
    metric: str,
    start: Path | None,
    clock: EpochClock,
    optimizer: Callable[[], Optimizer] | None = None,
) -> Trainer:
    steps, writes = _steps_per_epoch(data, settings), data.generation is not None
    callbacks: list[Any] = [
        ExactResume(settings.seed, steps, settings.save_steps),
        StopIfDiverged(),
        clock,
        TensorBoardCallback(_writer(settings, start)),
    ]
    moving = [part for part in model.parts if part.sparse is not None]
    if moving:
        callbacks.append(MoveSupport(moving))
    if data.augment is not None:
        callbacks.append(SetEpoch(data.augment.epoch))
    if isinstance(model, PairModel):
        callbacks.append(TellEpoch(model, steps))
    if settings.waits:
        callbacks.append(EarlyStoppingCallback(settings.waits))
    trainer = _Trainer(
        settings,
        rate_factor(settings, settings.rate(model.record.name), steps),
        model=model,
        args=_arguments(model, data, settings, metric),
        # a bound method: of a collator with a tokenizer the Trainer stores that in every checkpoint
        data_collator=data.collate.__call__,
        train_dataset=data.train,
        eval_dataset=data.dev,
        compute_metrics=None if writes else ComputeMetrics(data.labels.kind, data.labels.names or None),
        callbacks=callbacks,
        labels=data.labels,
        judge_texts=(lambda: _judged(model, data, settings)) if writes else None,
        make_optimizer=optimizer,
    )
    for printer in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(printer)
    if settings.progress:
        trainer.add_callback(Bars(metric))
    return trainer


class _Trainer(Trainer):
    """The Trainer with the settings' schedule, weight decay and whole batches.

    `judge_texts` scores problems that are not scored by logits; without it `compute_metrics` does. What the last
    evaluation gave is remembered, for `judged`.
    `make_optimizer` makes another optimizer than AdamW, when a checkpoint's weights have been loaded.
    """

    lr_scheduler: Any
    optimizer: Any

    def __init__(
        self,
        settings: TrainSettings,
        factor: Callable[[int], float],
        *,
        labels: LabelSpace,
        judge_texts: Callable[[], Assessment] | None,
        make_optimizer: Callable[[], Optimizer] | None,
        **given: Any,
    ) -> None:
        super().__init__(**given)
        self._settings, self._factor, self._make_optimizer = settings, factor, make_optimizer
        self._labels, self._judge_texts = labels, judge_texts
        self._last: Callable[[], Assessment] | None = None

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        if self.optimizer is None and self._make_optimizer is not None:
            self.optimizer = self._make_optimizer()
        return super().create_optimizer(model)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        found = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._judge_texts is None:
            self._last = partial(assess_evaluation, self._labels.kind, found, self._labels.names or None)
            return found
        judged = self._judge_texts()
        self._last = lambda: judged
        found.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in judged.scores.items()})
        return found

    def judged(self, history: list[dict[str, float]]) -> Assessment | None:
        """What the last evaluation came to, with the scores that the history ends with; None: there was none here."""
        return None if self._last is None else replace(self._last(), scores=_last_scores(history))

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self._factor)
        return self.lr_scheduler

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        if self._settings.decay == "all":
            return [name for name, _ in model.named_parameters()]
        return super().get_decay_parameter_names(model)

    def get_train_dataloader(self) -> DataLoader:
        # set for this one only: with it the Trainer leaves out dev rows too
        self.args.dataloader_drop_last = self._settings.drop_last
        try:
            return super().get_train_dataloader()
        finally:
            self.args.dataloader_drop_last = False


def _arguments(model: Attached, data: TaskData, settings: TrainSettings, metric: str) -> TrainingArguments:
    return TrainingArguments(
        # absolute: the path of the best checkpoint is stored
        output_dir=str((settings.output / checkpoints.FOLDER).resolve()),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.eval_batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.rate(model.record.name),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        label_smoothing_factor=settings.label_smoothing,
        seed=settings.seed,
        data_seed=settings.seed,
        bf16=settings.bf16,
        use_cpu=not torch.accelerator.is_available(),  # bf16 on a CPU has to be asked for so
        eval_strategy="epoch",
        save_strategy="epoch" if settings.checkpoints else "no",
        save_total_limit=2,  # the best and the last
        load_best_model_at_end=settings.keep == "best",
        metric_for_best_model=metric,
        greater_is_better=GREATER_IS_BETTER[metric],
        restore_callback_states_from_checkpoint=True,  # how long early stopping has waited
        logging_steps=settings.log_steps,
        logging_nan_inf_filter=False,  # on, it puts an average where the loss was NaN
        report_to="none",  # TensorBoard is among the callbacks, with a folder of our choice
        disable_tqdm=not settings.progress,
        train_sampling_strategy="random" if data.fields.image is not None else "group_by_length",
        remove_unused_columns=False,  # see _readable
        dataloader_num_workers=settings.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _steps_per_epoch(data: TaskData, settings: TrainSettings) -> int:
    """Optimizer steps of an epoch; the last one may have fewer batches."""
    whole, rest = divmod(len(data.train), settings.batch_size)
    batches = whole + (rest > 0 and not settings.drop_last)
    return -(-batches // settings.accumulate)


def _writer(settings: TrainSettings, start: Path | None) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    # what was logged after the checkpoint is logged again
    purge = None if start is None else checkpoints.step_of(start) + 1
    return SummaryWriter(str(settings.output / checkpoints.LOGS), purge_step=purge)


def _run(trainer: Trainer, start: Path | None) -> float:
    """Train, or take up the best weights of a run that had ended; the seconds that it took."""
    begin = time.perf_counter()
    if start is not None and checkpoints.is_finished(start):
        best = checkpoints.best_of(start) if trainer.args.load_best_model_at_end else start
        trainer.model.load_state_dict(load_file(best / checkpoints.WEIGHTS))
        trainer.state.log_history = checkpoints.read_state(start)["log_history"]
        trainer.state.global_step = checkpoints.step_of(start)
        trainer.state.best_global_step = checkpoints.step_of(best)
    elif start is not None:
        checkpoints.relocate(start)
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
            f"--batch-size ({settings.batch_size} now; --accumulate makes up for it) or --max-length, "
            f"recompute late blocks with --checkpoint late, or try --bf16. {_left(settings)}"
        ) from error


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    known = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(part in text for part in known)


def _left(settings: TrainSettings) -> str:
    last = checkpoints.last_complete(settings.output / checkpoints.FOLDER)
    return "No checkpoint had been written" if last is None else f"The last good checkpoint stays at {last}"


# --- after -------------------------------------------------------------------------------------------------


def _ends_scored(settings: TrainSettings) -> bool:
    """Whether the last epoch's evaluation is that of the kept weights (under autocast it is not `sidestep eval`'s)."""
    return settings.keep == "last" and not settings.bf16


def _last_scores(history: list[dict[str, float]]) -> dict[str, float]:
    scored = {name.removeprefix("dev_"): value for name, value in history[-1].items() if name.startswith("dev_")}
    return {name: value for name, value in scored.items() if name != "loss"}


def _judged(model: Attached, data: TaskData, settings: TrainSettings) -> Assessment:
    how = data.generation or Generation()
    size, workers = settings.eval_batch_size, settings.workers
    return judge_encoded(model, data.dev, data.fields, data.labels, how, batch_size=size, workers=workers)


def _results(
    trainer: Trainer,
    data: TaskData,
    settings: TrainSettings,
    recipe: Mapping[str, Any] | None,
    judged: Assessment,
    cost: StepCost | None,
    seconds: float,
    estimate: float | None,
    start: Path | None,
    history: list[dict[str, float]],
    clock: EpochClock,
) -> Results:
    model, state, steps = trainer.model, trainer.state, _steps_per_epoch(data, settings)
    kept = (state.best_global_step if settings.keep == "best" else None) or state.global_step
    return Results(
        scores=judged.scores,
        constant=judged.constant,
        classes=judged.classes,
        metric=str(trainer.args.metric_for_best_model),
        best_epoch=round(kept / steps, 3),
        epochs=round(state.global_step / steps, 3),
        planned_epochs=round(trainer.args.num_train_epochs),
        method={"name": model.record.name, **model.settings.method.to_dict()},
        head=model.head_config,
        backbone={**asdict(source_of(model.backbone)), "dtype": model.precisions, "digest": model.digest.exact},
        labels=list(data.labels.names),
        data={
            "train_rows": len(data.train),
            "dev_rows": len(data.dev),
            "dev_source": data.dev_source,
            "truncated": data.truncated,
            **data.handling,
        },
        trainable_parameters=sum(parameter.numel() for _, parameter in model.trained_parameters()),
        task_bytes=(settings.output / WEIGHTS).stat().st_size,
        step=cost,
        seconds=round(seconds, 3),
        estimated_seconds=None if estimate is None else round(estimate, 3),
        epoch_seconds=clock.seconds,
        resumed_from=None if start is None else checkpoints.step_of(start),
        device=device_name(model.device),
        versions=versions(PACKAGES),
        seed=settings.seed,
        learning_rate=settings.rate(model.record.name),
        settings=settings.to_dict(),
        recipe=dict(recipe) if recipe else None,
        history=history,
        notes=list(notes_of(model, writes=data.generation is not None)),
    )


def _history(log: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The dev scores of each epoch, with the training loss logged at its end."""
    history, loss = [], float("nan")
    for entry in log:
        loss = entry.get("loss", loss)
        if "eval_loss" in entry:
            own = {name: value for name, value in entry.items() if name.startswith("eval_")}
            timing = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
            dev = {name.replace("eval_", "dev_"): value for name, value in own.items() if name not in timing}
            history.append({"epoch": entry["epoch"], "train_loss": loss, **dev})
    return history
