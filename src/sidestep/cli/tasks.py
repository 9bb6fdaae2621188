"""`sidestep eval` and `sidestep predict`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from sidestep.cli import options as opt
from sidestep.cli.errors import reporting
from sidestep.cli.values import backbone_named, check_batch, placed, table_options
from sidestep.console import NARROW, hush, remark, score_facts, show_facts, show_many, show_unnamed

if TYPE_CHECKING:
    from datasets import Dataset

    from sidestep.data import Fields, TableOptions
    from sidestep.disk.feature_options import FeatureOptions, Where
    from sidestep.model.attach import Attached


def evaluate(
    task: opt.Task,
    rows: opt.Rows,
    text: opt.Text = None,
    text2: opt.Text2 = None,
    image: opt.Image = None,
    audio: opt.Audio = None,
    video: opt.Video = None,
    skip_bad_files: opt.SkipBadFiles = False,
    label: opt.Label = None,
    split: opt.Split = "validation",
    columns: opt.Columns = None,
    no_header: opt.NoHeader = False,
    no_quoting: opt.NoQuoting = False,
    encoding: opt.Encoding = "utf-8",
    backbone: opt.OtherBackbone = None,
    gguf: opt.Gguf = None,
    device_map: opt.DeviceMap = None,
    offload_folder: opt.OffloadFolder = None,
    max_memory: opt.MaxMemory = None,
    shard: opt.Shard = False,
    batch_size: opt.PassSize = None,
    features: opt.Features = "auto",
    features_folder: opt.FeaturesFolder = None,
    features_limit: opt.FeaturesLimit = "50GB",
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Score a task on rows with labels."""
    with reporting(debug, shared=True):
        from sidestep import ranks
        from sidestep.data import Fields
        from sidestep.disk.feature_options import FeatureOptions
        from sidestep.measure.plan import memory_of
        from sidestep.tasks import predict as predicting

        hush()
        check_batch(batch_size)
        kept = FeatureOptions(where=cast("Where", features), folder=features_folder, limit=memory_of(features_limit))
        table = table_options(columns, no_header, no_quoting, encoding)
        model = _load(
            task, backbone_named(backbone, gguf), placed(device_map, offload_folder, max_memory), sharded=shard
        )
        fields = _fields(model, Fields(text=text, text2=text2, image=image, audio=audio, video=video, label=label))
        found = _read(model, rows, table, split, fields, skip_bad_files=skip_bad_files)
        judged = predicting.judge(
            model,
            found,
            fields=fields,
            batch_size=batch_size,
            progress=not quiet and ranks.is_first(),
            features=kept,
            tell=_tell(kept),
        )
        show_facts(f"{task} on {rows}", {"rows": len(found), **score_facts(judged)}, piped=NARROW)


def predict(
    rows: opt.Rows,
    output: opt.Table,
    task: opt.TaskOrBank = None,
    tasks: opt.AllTasks = None,
    url: opt.Url = None,
    key: opt.Key = None,
    text: opt.Text = None,
    text2: opt.Text2 = None,
    image: opt.Image = None,
    audio: opt.Audio = None,
    video: opt.Video = None,
    skip_bad_files: opt.SkipBadFiles = False,
    split: opt.Split = "test",
    columns: opt.Columns = None,
    no_header: opt.NoHeader = False,
    no_quoting: opt.NoQuoting = False,
    encoding: opt.Encoding = "utf-8",
    backbone: opt.OtherBackbone = None,
    gguf: opt.Gguf = None,
    device_map: opt.DeviceMap = None,
    offload_folder: opt.OffloadFolder = None,
    max_memory: opt.MaxMemory = None,
    shard: opt.Shard = False,
    batch_size: opt.PassSize = None,
    probabilities: opt.Probabilities = "all",
    overwrite: opt.Overwrite = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Label rows. The output is the rows with a prediction and the probability of each class.

    With --tasks TASK is a bank, and each row is answered by several of its tasks, as `sidestep bank run` does. With
    --url they are a server's, and no TASK is named.
    """
    if url is not None:
        with reporting(debug):
            from sidestep.cli.served import label
            from sidestep.data import Fields

            hush()
            if task is not None or tasks is None or backbone or gguf or video or skip_bad_files:
                raise ValueError(
                    "with --url name the server's tasks (--tasks), and leave out TASK, --backbone, --gguf, --video and "
                    "--skip-bad-files"
                )
            if probabilities not in ("all", "one"):
                raise ValueError(
                    "with --url each task has a prediction with its probability: leave out --probabilities"
                )
            check_batch(batch_size)
            label(
                url,
                key,
                rows,
                output,
                tasks=tasks,
                given=Fields(text=text, text2=text2, image=image, audio=audio),
                table=table_options(columns, no_header, no_quoting, encoding),
                split=split,
                batch_size=batch_size or 64,
                overwrite=overwrite,
            )
        return
    if task is None:
        raise typer.BadParameter("name the folder of a task or of a bank, or a server (--url)")
    if tasks is not None:
        from sidestep.cli.bank import run

        if skip_bad_files:
            raise typer.BadParameter("with --tasks there is no --skip-bad-files: take those rows out")
        if (device_map, offload_folder, max_memory) != (None, None, None):
            raise typer.BadParameter("with --tasks there is no --device-map: a bank's backbone stays in memory")
        run(
            task,
            rows,
            output,
            tasks=tasks,
            text=text,
            text2=text2,
            image=image,
            audio=audio,
            split=split,
            columns=columns,
            no_header=no_header,
            no_quoting=no_quoting,
            encoding=encoding,
            backbone=backbone,
            gguf=gguf,
            batch_size=batch_size or 64,
            probabilities=None if probabilities == "all" else probabilities,
            overwrite=overwrite,
            quiet=quiet,
            debug=debug,
        )
        return
    with reporting(debug, shared=True):
        from sidestep import ranks
        from sidestep.data import Fields
        from sidestep.disk.table_files import check_table, write_table
        from sidestep.disk.task_folder import read_config
        from sidestep.tasks import predict as predicting

        hush()
        check_batch(batch_size)
        shares = predicting.check_probabilities(probabilities)
        ranks.first(lambda: check_table(output, overwrite=overwrite))
        _refuse_inputs(output, task, rows, backbone_named(backbone, gguf))
        table = table_options(columns, no_header, no_quoting, encoding)
        model = _load(
            task, backbone_named(backbone, gguf), placed(device_map, offload_folder, max_memory), sharded=shard
        )
        fields = _fields(model, Fields(text=text, text2=text2, image=image, audio=audio, video=video))
        given = _read(model, rows, table, split, fields, skip_bad_files=skip_bad_files)
        found = predicting.predict(
            model,
            given,
            fields=fields,
            batch_size=batch_size,
            progress=not quiet and ranks.is_first(),
            probabilities=shares,
        )
        columns_ = predicting.share_columns(found, given)
        ranks.first(lambda: write_table(found, output, shares=columns_, overwrite=overwrite))
        remark(f"{len(found)} rows written to {output}")
        show_unnamed(read_config(task))


def _tell(kept: FeatureOptions) -> Callable[[str], object] | None:
    """Who is told what is stored: of "auto" nobody, as it is no news that one pass is live."""
    return None if kept.where == "auto" else remark


def _refuse_inputs(output: Path, task: Path, rows: str, backbone: str | None) -> None:
    """Refuses an output that would replace the rows, the task or its backbone."""
    from sidestep.disk.atomic import refuse_inputs
    from sidestep.disk.sources import backbones_at, rows_at, stored_backbones_at
    from sidestep.disk.task_folder import read_config
    from sidestep.training.checkpoints import parts_of

    models = backbones_at(backbone) if backbone else stored_backbones_at(read_config(task))
    refuse_inputs([output], [*rows_at(rows), *parts_of(task), *models])


def _load(task: Path, name: str | None, where: Mapping[str, Any], *, sharded: bool = False) -> Attached:
    """The model of a task, on its backbone or one from elsewhere.

    The backbone is placed as asked, or shared out among all processes, or on a GPU if there is one.
    """
    import torch

    from sidestep.backbone.placement import Placement
    from sidestep.model.sharding import shard
    from sidestep.tasks import load as loading
    from sidestep.training.launchers import asks_for_fsdp, check_passes

    placement = Placement.of(**where)
    if asks_for_fsdp() or sharded:
        if placement is not None:
            raise ValueError("--device-map with --shard: each process would place all of it. Leave one out")
        model = loading.load(task, loading.stored_backbone(task, moved_to=name))
        check_passes(model)
        return shard(model)
    device = "cuda" if torch.cuda.is_available() and placement is None else None
    return loading.load(task, loading.stored_backbone(task, moved_to=name, placement=placement), device=device)


def _read(
    model: Attached, rows: str, table: TableOptions, split: str, fields: Fields, *, skip_bad_files: bool
) -> Dataset:
    from sidestep.data import check_fields
    from sidestep.kinds.base import kind_named
    from sidestep.kinds.prepare import read_rows
    from sidestep.tasks.predict import labels_of

    kind = labels_of(model).kind
    found = read_rows(rows, fields, table, kind, split=split)
    show_many(len(found))
    if not skip_bad_files:
        return found
    if fields.files is None:
        raise ValueError("--skip-bad-files is for images, sounds and videos, but the task reads text: leave it out")
    if not kind_named(kind).dual:
        check_fields(found, replace(fields, label=None))
    medium, column = fields.files
    return medium.drop_unreadable(found, column)


def _fields(model: Attached, given: Fields) -> Fields:
    """The columns that the task was trained on, with the user's in their place."""
    from sidestep.kinds.prepare import chosen_fields

    return chosen_fields(model.extras.get("preprocessing") or {}, given)
