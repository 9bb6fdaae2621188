"""`sidestep train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidestep.cli import options as opt
from sidestep.cli.errors import reporting
from sidestep.cli.values import config_from, table_options
from sidestep.show import hush, show_results, show_start

if TYPE_CHECKING:
    from sidestep.methods import MethodConfig
    from sidestep.model import SideModel
    from sidestep.prepare import TaskData


def train(
    backbone: opt.Backbone,
    train: opt.Train,
    output: opt.Output,
    method: opt.Method = "read",
    set_: opt.Set = None,
    pool: opt.Pool = None,
    own_head: opt.OwnHead = False,
    checkpoint: opt.Checkpoint = None,
    backbone_noise: opt.Noise = None,
    dtype: opt.Dtype = None,
    revision: opt.Revision = None,
    text: opt.Text = None,
    text2: opt.Text2 = None,
    image: opt.Image = None,
    label: opt.Label = "label",
    problem: opt.Problem = None,
    dev: opt.Dev = None,
    dev_fraction: opt.DevFraction = 0.1,
    train_split: opt.TrainSplit = "train",
    dev_split: opt.DevSplit = "validation",
    max_length: opt.MaxLength = None,
    columns: opt.Columns = None,
    no_header: opt.NoHeader = False,
    no_quoting: opt.NoQuoting = False,
    encoding: opt.Encoding = "utf-8",
    epochs: opt.Epochs = 10,
    batch_size: opt.BatchSize = 32,
    eval_batch_size: opt.EvalBatchSize = 64,
    accumulate: opt.Accumulate = 1,
    lr: opt.Rate = None,
    schedule: opt.Schedule = "linear",
    warmup: opt.Warmup = 0.06,
    weight_decay: opt.WeightDecay = 0.0,
    max_grad_norm: opt.MaxGradNorm = 1.0,
    label_smoothing: opt.LabelSmoothing = 0.0,
    patience: opt.Patience = None,
    metric: opt.Metric = None,
    seed: opt.Seed = 0,
    bf16: opt.Bf16 = False,
    save_steps: opt.SaveSteps = None,
    log_steps: opt.LogSteps = 10,
    workers: opt.Workers = 0,
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Train a task and save it in a folder."""
    with reporting(debug):
        from sidestep.checkpoints import check_output
        from sidestep.data import Fields, read
        from sidestep.loading import load_processor
        from sidestep.methods import method_named
        from sidestep.prepare import check_problem, prepare
        from sidestep.settings import TrainSettings
        from sidestep.train import train as run

        settings = TrainSettings(
            output=output,
            epochs=epochs,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            learning_rate=lr,
            weight_decay=weight_decay,
            warmup=warmup,
            schedule=schedule,  # type: ignore[arg-type]
            accumulate=accumulate,
            max_grad_norm=max_grad_norm,
            label_smoothing=label_smoothing,
            seed=seed,
            bf16=bf16,
            patience=patience,
            metric=metric,
            save_steps=save_steps,
            log_steps=log_steps,
            workers=workers,
            resume=resume,
            overwrite=overwrite,
            progress=not quiet,
        )
        hush(quiet)
        check_output(settings)
        config = config_from(method_named(method).config, set_ or [])
        kind = check_problem(problem)
        table = table_options(columns, no_header, no_quoting, encoding)
        data = prepare(
            read(train, table, split=train_split),
            None if dev is None else read(dev, table, split=dev_split),
            Fields(text=text, text2=text2, image=image, label=label),
            load_processor(backbone, revision=revision),
            kind=kind,
            max_length=max_length,
            dev_fraction=dev_fraction,
            seed=seed,
        )
        where = {"name": backbone, "dtype": dtype, "revision": revision}
        how = {"backbone_noise": backbone_noise, "checkpoint": checkpoint}
        model = _attached(config, data, where, how, pool=pool, own_head=own_head, seed=seed)
        show_start(model, data, settings)
        show_results(run(model, data, settings), Path(output))


def _attached(
    config: MethodConfig,
    data: TaskData,
    where: dict[str, Any],
    how: dict[str, Any],
    *,
    pool: str | None,
    own_head: bool,
    seed: int,
) -> SideModel:
    """The model to train: with a Sidestep head, or the backbone's own."""
    import torch

    from sidestep.loading import load_backbone
    from sidestep.model import attach
    from sidestep.train import head_for

    if own_head and pool is not None:
        raise ValueError(f"--pool {pool} with --own-head: the backbone's own head reads what it reads")
    torch.manual_seed(seed)
    backbone = load_backbone(**where, head=own_head, num_labels=data.labels.outputs if own_head else None)
    return attach(backbone, config, head=None if own_head else head_for(data, pool), **how)
