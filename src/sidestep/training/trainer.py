"""Hugging Face's Trainer, with what a run adds to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, Trainer, TrainingArguments
from transformers.integrations import TensorBoardCallback

from sidestep import ranks
from sidestep.backbone.shards import is_sharded
from sidestep.kinds.assess import Assessment
from sidestep.kinds.base import kind_named
from sidestep.kinds.task_data import TaskData
from sidestep.metrics import IGNORED
from sidestep.model.attach import Attached
from sidestep.model.build import refuse_zero3
from sidestep.model.pair_model import PairModel
from sidestep.training import checkpoints, shares
from sidestep.training.callbacks import (
    Bars,
    EpochClock,
    ExactResume,
    MoveSupport,
    SetEpoch,
    StopIfDiverged,
    TellEpoch,
)
from sidestep.training.outcome import judge_run, last_scores
from sidestep.training.schedules import rate_factor
from sidestep.training.settings import TrainSettings


def largest_batch(data: TaskData, size: int) -> Any:
    """The batch of the longest training texts or sounds (or of the first images)."""
    order = kind_named(data.labels.kind).by_size(data.train)
    return data.collate([data.train[int(index)] for index in order[:size]])


def make_trainer(
    model: Attached,
    data: TaskData,
    settings: TrainSettings,
    metric: str,
    start: Path | None,
    clock: EpochClock,
    optimizer: Callable[[], Optimizer] | None = None,
) -> Trainer:
    """The Trainer of a run, or of its first stage with an `optimizer` of its own."""
    steps, writes = settings.steps_per_epoch(len(data.train)), data.generation is not None
    if _differ_in_length(data):  # so that little is padding
        order = np.argsort(data.dev.with_format(None)["length"][:], kind="stable")[::-1]
        data = replace(data, dev=data.dev.select(order))
    callbacks: list[Any] = [
        ExactResume(settings.seed, steps, settings.save_steps),
        StopIfDiverged(),
        clock,
    ]
    if ranks.is_first():
        callbacks.append(TensorBoardCallback(_writer(settings, start)))
    moving = [part for part in model.parts if part.sparse is not None]
    if moving:
        callbacks.append(MoveSupport(moving))
    if data.augment is not None:
        callbacks.append(SetEpoch(data.augment.epoch))
    if isinstance(model, PairModel):
        callbacks.append(TellEpoch(model, steps))
    if settings.waits:
        callbacks.append(EarlyStoppingCallback(settings.waits))
    trainer = TaskTrainer(
        settings,
        rate_factor(settings, settings.rate(model.record.config), steps),
        model=model,
        args=_arguments(model, data, settings, metric),
        # a bound method: of a collator with a tokenizer the Trainer stores that in every checkpoint
        data_collator=data.collate.__call__,
        train_dataset=data.train,
        eval_dataset=data.dev,
        compute_metrics=kind_named(data.labels.kind).compute_metrics(data),
        callbacks=callbacks,
        data=data,
        judge_texts=(lambda: judge_run(model, data, settings)) if writes else None,
        make_optimizer=optimizer,
    )
    refuse_zero3()  # which a launcher's config may ask for: it is read where the Trainer is made
    for printer in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(printer)
    if settings.progress and ranks.is_first():
        trainer.add_callback(Bars(metric))
    return trainer


class TaskTrainer(Trainer):
    """The Trainer with the settings' schedule, weight decay and whole batches, shared out to the processes.

    `judge_texts` scores problems that are not scored by logits. Without it `compute_metrics` scores them. The result of
    the last evaluation is remembered, for `judged`.
    `make_optimizer` makes an optimizer other than AdamW, when a checkpoint's weights have been loaded.
    """

    lr_scheduler: Any
    optimizer: Any

    def __init__(
        self,
        settings: TrainSettings,
        factor: Callable[[int], float],
        *,
        data: TaskData,
        judge_texts: Callable[[], Assessment] | None,
        make_optimizer: Callable[[], Optimizer] | None,
        **given: Any,
    ) -> None:
        super().__init__(**given)
        self._settings, self._factor, self._make_optimizer = settings, factor, make_optimizer
        self._model: Attached = given["model"]
        self._data, self._judge_texts = data, judge_texts
        self._last: Callable[[], Assessment] | None = None

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """AdamW, or the optimizer of a first stage."""
        if self.optimizer is None and self._make_optimizer is not None:
            self.optimizer = self._make_optimizer()
        if ranks.count() > 1:  # not sooner: that optimizer decides what is trained
            shares.keep_apart(self._model)
        return super().create_optimizer(model)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """The Trainer's loop, with the scores of written texts where the answers are texts."""
        found = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._judge_texts is None:
            self._last = partial(kind_named(self._data.labels.kind).assess_evaluation, found, self._data)
            return found
        judged = self._judge_texts()
        self._last = lambda: judged
        found.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in judged.scores.items()})
        return found

    def judged(self, history: list[dict[str, float]]) -> Assessment | None:
        """The result of the last evaluation, with the scores that the history ends with. None: there was none here."""
        return None if self._last is None else replace(self._last(), scores=last_scores(history))

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """The model with its gradients averaged over the processes. accelerate refuses to do that for shards."""
        if not training or not is_sharded(self._model) or model is not self._model:
            return super()._wrap_model(model, training, dataloader)
        # what accelerate does besides, which is autocast
        prepared = self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        return DistributedDataParallel(prepared)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's step, with the gradients that its wrapper does not see averaged over the processes."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        if ranks.count() > 1 and self.accelerator.sync_gradients:
            shares.average_sparse(self._model)
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The Trainer's loss. A mean over a process's labels counts by their share of the batch's labels."""
        counts = ranks.count() > 1 and model.training and not self.model_accepts_loss_kwargs
        if not counts or isinstance(self._model, PairModel):
            return super().compute_loss(model, inputs, *args, **kwargs)
        items = (inputs["labels"] != IGNORED).sum()
        share = ranks.count() * items / ranks.total(items.clone())
        found = super().compute_loss(model, inputs, *args, **kwargs)
        return (found[0] * share, *found[1:]) if isinstance(found, tuple) else found * share

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """The settings' schedule."""
        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self._factor)
        return self.lr_scheduler

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """What weight decay acts on, as the settings say."""
        if self._settings.decay == "all":
            return [name for name, _ in model.named_parameters()]
        return super().get_decay_parameter_names(model)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The dev batches in the order of the rows, by which windows of a text are put together again."""
        asked, self.args.train_sampling_strategy = self.args.train_sampling_strategy, "random"
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.train_sampling_strategy = asked

    def get_train_dataloader(self) -> DataLoader:
        """The training batches. Where the settings say so, a last one that is not whole is left out."""
        # set for this one only: with it the Trainer leaves out dev rows too
        self.args.dataloader_drop_last = self._settings.drop_last
        try:
            loader = super().get_train_dataloader()
            return loader if ranks.count() == 1 else shares.shared(loader)
        finally:
            self.args.dataloader_drop_last = False

    def _save_rng_state(self, output_dir: str) -> None:
        """Wait until all processes have written their states: the file that ends a checkpoint comes next."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()


def _arguments(model: Attached, data: TaskData, settings: TrainSettings, metric: str) -> TrainingArguments:
    return TrainingArguments(
        # absolute: the path of the best checkpoint is stored
        output_dir=str((settings.output / checkpoints.FOLDER).resolve()),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,  # the whole batch, which `shares.shared` shares out
        per_device_eval_batch_size=ranks.share(min(settings.eval_rows, len(data.dev))),  # so that all have some
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.rate(model.record.config),
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
        greater_is_better=kind_named(data.labels.kind).greater_is_better(metric),
        restore_callback_states_from_checkpoint=True,  # how long early stopping has waited
        logging_steps=settings.log_steps,
        logging_nan_inf_filter=False,  # on, it puts an average where the loss was NaN
        report_to="none",  # TensorBoard is among the callbacks, with a folder of our choice
        disable_tqdm=not settings.progress,
        train_sampling_strategy="group_by_length" if _differ_in_length(data) else "random",
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,  # see `train.readable`
        label_names=["labels"],  # whatever the heads of models call them
        dataloader_num_workers=settings.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _differ_in_length(data: TaskData) -> bool:
    """Whether rows are texts, or sounds that are not brought to one length."""
    pictures = data.fields.image is not None or data.fields.video is not None
    return not pictures and "length" in data.train.column_names


def _writer(settings: TrainSettings, start: Path | None) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    # what was logged after the checkpoint is logged again
    purge = None if start is None else checkpoints.step_of(start) + 1
    return SummaryWriter(str(settings.output / checkpoints.LOGS), purge_step=purge)
