"""What Sidestep adds to the plain Trainer's loop: exact resuming, a stop at divergence, a quieter bar."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sidestep import ranks
from sidestep.data.augment import Epoch
from sidestep.measure.step import sparse_deltas
from sidestep.model.pair_model import PairModel
from sidestep.model.side_model import SideModel

SPREAD = 1_000_003  # between the seeds of two runs: epoch 1 of seed 0 is not epoch 0 of seed 1


class Diverged(RuntimeError):
    """A loss or gradient is no longer a number."""


class ExactResume(TrainerCallback):
    """Lets a run that continues from any checkpoint compute what the uninterrupted one does, bit for bit.

    Every epoch begins from a seed of its own. The Trainer's length-grouped order comes from the global generator, and
    a checkpoint from an epoch's middle lacks that generator's state at the epoch's begin.
    The loss is logged at every checkpoint, because the mean since the last entry is not stored.
    Of several processes every step has a seed of its own, which differs from one process to the other. So their noise
    differs, and does not depend on where the run was interrupted.
    """

    def __init__(self, seed: int, steps_per_epoch: int, save_steps: int | None) -> None:
        self.seed, self.steps_per_epoch, self.save_steps = seed, steps_per_epoch, save_steps

    def _seed_epoch(self, state: TrainerState) -> None:
        set_seed((self.seed * SPREAD + int(state.epoch or 0)) % 2**32)

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Seed the epoch."""
        self._seed_epoch(state)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Seed the step, once the epoch's order was drawn."""
        if ranks.count() > 1:
            drawn = np.random.SeedSequence([self.seed, state.global_step, ranks.rank()]).generate_state(1)
            set_seed(int(drawn[0]))

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Seed the next epoch already: the checkpoint made now is loaded after that epoch has begun."""
        self._seed_epoch(state)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint within an epoch. The one at its end waits for the evaluation."""
        step = state.global_step
        if self.save_steps and step % self.save_steps == 0 and step % self.steps_per_epoch:
            control.should_save = control.should_log = True

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log before the epoch's checkpoint."""
        control.should_log = True


class SetEpoch(TrainerCallback):
    """Tells the augmentation of images which epoch is being trained."""

    def __init__(self, epoch: Epoch) -> None:
        self.epoch = epoch

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Set the number, before the epoch's rows are read or processes that read them are started."""
        self.epoch.number = int(state.epoch or 0)


class TellEpoch(TrainerCallback):
    """Tells a dual encoder before each step how far training is. VSE's loss depends on it.

    In training its loss is that of the pairs of all processes.
    """

    def __init__(self, model: PairModel, steps_per_epoch: int) -> None:
        self.model, self.steps_per_epoch = model, steps_per_epoch

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Set the epoch, with its fraction."""
        self.model.gathers = ranks.count() > 1
        self.model.epoch = state.global_step / self.steps_per_epoch

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the loss as it was at the end of training."""
        self.model.gathers = False
        self.model.epoch = math.inf


class MoveSupport(TrainerCallback):
    """Tells methods with a sparse diff when an optimizer step begins and ends. They may move its positions then."""

    def __init__(self, models: Sequence[SideModel]) -> None:
        self.models = models

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Before the step's first batch."""
        for delta, diff in sparse_deltas(self.models):
            delta.before_step(diff, state.global_step + 1, state.max_steps)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After the step, before a checkpoint is made of it."""
        for delta, diff in sparse_deltas(self.models):
            delta.after_step(diff, kwargs["optimizer"])


class SaveTask(TrainerCallback):
    """Makes every checkpoint of a Trainer a task folder too, which `ss.load` reads, with the Trainer's tokenizer.

    A Trainer by itself stores the task's tensors alone, not what method and which backbone they belong to.
    """

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After a checkpoint was written."""
        if not state.is_world_process_zero:
            return
        model, processor = kwargs["model"], kwargs.get("processing_class")
        if processor is not None:
            model.extras.setdefault("processor", processor)
        model.save_pretrained(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", overwrite=True)


class StopIfDiverged(TrainerCallback):
    """Ends training when a logged loss or gradient norm is not finite, before another checkpoint is made."""

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Look at the numbers.

        Raises:
            Diverged: if one of them is not finite.
        """
        for name in ("loss", "grad_norm", "eval_loss"):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(value):
                raise Diverged(f"{name.replace('_', ' ')} is {value} at step {state.global_step}")


class EpochClock(TrainerCallback):
    """Times the optimizer steps of each epoch, without evaluations and checkpoints.

    Attributes:
        seconds: of each epoch.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begin = 0.0

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start."""
        self._begin = time.perf_counter()

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop, when the device has done its work."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.seconds.append(round(time.perf_counter() - self._begin, 4))


class Bars(ProgressCallback):
    """The Trainer's bars, with a line for each evaluation instead of one for each log entry."""

    def __init__(self, metric: str) -> None:
        super().__init__()
        self.metric, self.loss = metric, float("nan")

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Remember the training loss."""
        self.loss = (logs or {}).get("loss", self.loss)

    def on_evaluate(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the line of an epoch."""
        super().on_evaluate(args, state, control, **kwargs)
        value = (metrics or {}).get(f"eval_{self.metric}")
        if self.training_bar is not None and value is not None:
            self.training_bar.write(
                f"epoch {state.epoch:g}: training loss {self.loss:.4f}, dev {self.metric} {value:.4f}"
            )
