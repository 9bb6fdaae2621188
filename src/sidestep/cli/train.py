"""`sidestep train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sidestep.cli import options as opt
from sidestep.cli.errors import reporting

if TYPE_CHECKING:
    from sidestep.model import SideModel
    from sidestep.prepare import TaskData
    from sidestep.results import Results


def train(
    backbone: Annotated[
        str,
        typer.Option(
            help="Hub id, folder, timm:NAME or timm:NAME@FILE.", rich_help_panel=opt.MODEL, show_default=False
        ),
    ],
    train: Annotated[
        str,
        typer.Option(
            help="Training rows: csv, tsv, json, jsonl or parquet file, folder of images, or hub id.",
            rich_help_panel=opt.DATA,
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="Folder for the task.", rich_help_panel=opt.OUTPUT, show_default=False)
    ],
    method: Annotated[
        str, typer.Option(help="See `sidestep methods`.", rich_help_panel=opt.MODEL)
    ] = "read",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="A setting of the method, name=value; repeatable.", rich_help_panel=opt.MODEL
        ),
    ] = None,
    pool: Annotated[
        str | None,
        typer.Option(
            help="What the head reads: cls, mean or last (default: the family's).", rich_help_panel=opt.MODEL
        ),
    ] = None,
    own_head: Annotated[
        bool,
        typer.Option(
            "--own-head", help="Train the backbone's own classification head.", rich_help_panel=opt.MODEL
        ),
    ] = False,
    checkpoint: Annotated[
        str | None,
        typer.Option(help='"late": recompute the late blocks in backward.', rich_help_panel=opt.MODEL),
    ] = None,
    backbone_noise: Annotated[
        str | None,
        typer.Option(help="Noise of the backbone: drop_path, dropout or all.", rich_help_panel=opt.MODEL),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Precision of the backbone (default: its checkpoint's).", rich_help_panel=opt.MODEL
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub id.", rich_help_panel=opt.MODEL)
    ] = None,
    dev: Annotated[
        str | None,
        typer.Option(help="Dev rows (default: a share of the training rows).", rich_help_panel=opt.DATA),
    ] = None,
    train_split: Annotated[
        str, typer.Option(help="Split of --train, for a hub id or folder.", rich_help_panel=opt.DATA)
    ] = "train",
    dev_split: Annotated[
        str, typer.Option(help="Split of --dev.", rich_help_panel=opt.DATA)
    ] = "validation",
    dev_fraction: Annotated[
        float, typer.Option(help="Share held out where --dev is not given.", rich_help_panel=opt.DATA)
    ] = 0.1,
    text: opt.Text = None,
    text2: opt.Text2 = None,
    image: opt.Image = None,
    label: opt.Label = "label",
    problem: Annotated[
        str | None,
        typer.Option(
            "--problem",
            "--task",
            help="single, multi or regress (default: multi for lists of labels, else single).",
            rich_help_panel=opt.DATA,
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(help="Tokens kept of a text (default: the tokenizer's limit).", rich_help_panel=opt.DATA),
    ] = None,
    columns: opt.Columns = None,
    no_header: opt.NoHeader = False,
    no_quoting: opt.NoQuoting = False,
    encoding: opt.Encoding = "utf-8",
    epochs: Annotated[int, typer.Option(rich_help_panel=opt.TRAINING)] = 10,
    batch_size: Annotated[int, typer.Option(rich_help_panel=opt.TRAINING)] = 32,
    eval_batch_size: Annotated[int, typer.Option(rich_help_panel=opt.TRAINING)] = 64,
    accumulate: Annotated[
        int, typer.Option(help="Batches for one optimizer step.", rich_help_panel=opt.TRAINING)
    ] = 1,
    lr: Annotated[
        float | None,
        typer.Option(help="Learning rate (default: the method's).", rich_help_panel=opt.TRAINING),
    ] = None,
    schedule: Annotated[
        str, typer.Option(help="linear, cosine or constant.", rich_help_panel=opt.TRAINING)
    ] = "linear",
    warmup: Annotated[
        float, typer.Option(help="Share of the steps.", rich_help_panel=opt.TRAINING)
    ] = 0.06,
    weight_decay: Annotated[float, typer.Option(rich_help_panel=opt.TRAINING)] = 0.0,
    max_grad_norm: Annotated[
        float, typer.Option(help="0: gradients are not cut.", rich_help_panel=opt.TRAINING)
    ] = 1.0,
    label_smoothing: Annotated[float, typer.Option(rich_help_panel=opt.TRAINING)] = 0.0,
    patience: Annotated[
        int | None,
        typer.Option(help="Stop after so many epochs without a better score.", rich_help_panel=opt.TRAINING),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(help="The dev score that chooses the best epoch.", rich_help_panel=opt.TRAINING),
    ] = None,
    seed: Annotated[int, typer.Option(rich_help_panel=opt.TRAINING)] = 0,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Autocast to bfloat16.", rich_help_panel=opt.TRAINING)
    ] = False,
    save_steps: Annotated[
        int | None,
        typer.Option(help="Checkpoints within an epoch, every so many steps.", rich_help_panel=opt.OUTPUT),
    ] = None,
    log_steps: Annotated[
        int, typer.Option(help="Steps between log entries.", rich_help_panel=opt.OUTPUT)
    ] = 10,
    workers: Annotated[
        int, typer.Option(help="Processes that load data.", rich_help_panel=opt.OUTPUT)
    ] = 0,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue an interrupted run exactly.", rich_help_panel=opt.OUTPUT),
    ] = False,
    overwrite: opt.Overwrite = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Train a task and save it in a folder."""
    with reporting(debug):
        from sidestep.checkpoints import check_output
        from sidestep.cli.values import config_from, table_options
        from sidestep.data import Fields, read
        from sidestep.loading import load_backbone, load_processor
        from sidestep.methods import method_named
        from sidestep.prepare import check_modality, check_problem, prepare
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
        check_output(settings)
        config = config_from(method_named(method).config, set_ or [])
        kind = check_problem(problem)
        table = table_options(columns, no_header, no_quoting, encoding)
        rows = read(train, table, split=train_split)
        dev_rows = None if dev is None else read(dev, table, split=dev_split)
        data = prepare(
            rows,
            dev_rows,
            Fields(text=text, text2=text2, image=image, label=label),
            load_processor(backbone, revision=revision),
            kind=kind,
            max_length=max_length,
            dev_fraction=dev_fraction,
            seed=seed,
        )

        def load(**head: Any) -> Any:
            model = load_backbone(backbone, dtype=dtype, revision=revision, **head)
            check_modality(model, data.fields)
            return model

        model = _attached(load, config, data, pool, own_head, backbone_noise, checkpoint, seed)
        _say_start(model, data, quiet)
        _say_end(run(model, data, settings), output)
