"""`sidestep train`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from sidestep.cli import options as opt
from sidestep.cli.chosen import Chosen
from sidestep.cli.errors import reporting
from sidestep.cli.values import backbone_named, config_from, table_options, unescaped, value_of
from sidestep.console import hush, remark, show_answers, show_many, show_recipe, show_results, show_start

if TYPE_CHECKING:
    from sidestep.kinds.prepare import TaskData
    from sidestep.methods import MethodConfig
    from sidestep.model.attach import Attached
    from sidestep.model.pair_model import PairModel
    from sidestep.model.side_model import SideModel


def train(
    context: typer.Context,
    backbone: opt.Backbone,
    train: opt.Train,
    output: opt.Output,
    gguf: opt.Gguf = None,
    recipe: opt.Recipe = None,
    method: opt.Method = "read",
    set_: opt.Set = None,
    text_backbone: opt.TextBackbone = None,
    pool: opt.Pool = None,
    text_pool: opt.TextPool = None,
    dim: opt.Dim = None,
    loss: opt.Loss = "contrastive",
    own_head: opt.OwnHead = False,
    checkpoint: opt.Checkpoint = None,
    backbone_noise: opt.Noise = None,
    drop_path: opt.DropPath = None,
    dtype: opt.Dtype = None,
    revision: opt.Revision = None,
    text: opt.Text = None,
    text2: opt.Text2 = None,
    separator: opt.Separator = None,
    image: opt.Image = None,
    label: opt.Label = "label",
    problem: opt.Problem = None,
    dev: opt.Dev = None,
    dev_fraction: opt.DevFraction = 0.1,
    train_split: opt.TrainSplit = "train",
    dev_split: opt.DevSplit = "validation",
    max_length: opt.MaxLength = None,
    max_new_tokens: opt.MaxNewTokens = None,
    num_beams: opt.NumBeams = 1,
    shots: opt.Shots = None,
    shots_seed: opt.ShotsSeed = None,
    image_size: opt.ImageSize = None,
    normalize: opt.Normalize = None,
    augment: opt.Augment = "none",
    skip_bad_images: opt.SkipBadImages = False,
    columns: opt.Columns = None,
    no_header: opt.NoHeader = False,
    no_quoting: opt.NoQuoting = False,
    encoding: opt.Encoding = "utf-8",
    epochs: opt.Epochs = 10,
    batch_size: opt.BatchSize = 32,
    eval_batch_size: opt.EvalBatchSize = 64,
    accumulate: opt.Accumulate = 1,
    drop_last: opt.DropLast = False,
    learning_rate: opt.Rate = None,
    schedule: opt.Schedule = "linear",
    warmup: opt.Warmup = 0.06,
    warmup_epochs: opt.WarmupEpochs = None,
    warmup_steps: opt.WarmupSteps = None,
    start_rate: opt.StartRate = 0.0,
    end_rate: opt.EndRate = 0.0,
    milestones: opt.Milestones = None,
    weight_decay: opt.WeightDecay = 0.0,
    decay: opt.Decay = "weights",
    max_grad_norm: opt.MaxGradNorm = 1.0,
    label_smoothing: opt.LabelSmoothing = 0.0,
    keep: opt.Keep = "best",
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
        from sidestep.backbone.load import check_writes
        from sidestep.backbone.pixels import adjusted
        from sidestep.backbone.processors import load_pair_processor, load_processor
        from sidestep.data import Fields
        from sidestep.disk.atomic import refuse_inputs
        from sidestep.disk.sources import backbones_at, rows_at
        from sidestep.kinds.base import kind_named
        from sidestep.kinds.prepare import check_kind, prepare, read_rows
        from sidestep.methods import method_named
        from sidestep.training.checkpoints import as_begun, check_output, parts_of
        from sidestep.training.settings import TrainSettings
        from sidestep.training.train import train as run

        name, chosen = backbone_named(backbone, gguf), Chosen.of(context, recipe)
        training = {
            "epochs": epochs,
            "batch_size": batch_size,
            "drop_last": drop_last,
            "learning_rate": learning_rate,
            "schedule": schedule,
            "warmup_epochs": warmup_epochs,
            "warmup_steps": warmup_steps,
            "start_rate": start_rate,
            "end_rate": end_rate,
            "milestones": () if milestones is None else value_of(tuple[int, ...], milestones, "--milestones"),
            "weight_decay": weight_decay,
            "decay": decay,
            "max_grad_norm": max_grad_norm,
            "keep": keep,
            "patience": patience,
        }
        settings = TrainSettings(
            output=output,
            **chosen.over(training),
            eval_batch_size=eval_batch_size,
            warmup=warmup,
            accumulate=accumulate,
            label_smoothing=label_smoothing,
            seed=seed,
            bf16=bf16,
            metric=metric,
            save_steps=save_steps,
            log_steps=log_steps,
            workers=workers,
            resume=resume,
            overwrite=overwrite,
            progress=not quiet,
        )
        asked = chosen.over(
            {
                "method": method,
                "pool": pool,
                "dim": dim,
                "loss": loss,
                "problem": problem,
                "max_length": max_length,
                "backbone_noise": backbone_noise,
                "drop_path": drop_path,
                "shots": shots,
                "augment": augment,
            }
        )
        hush()
        check_output(settings)
        refuse_inputs(parts_of(output), [*rows_at(train, dev), *backbones_at(name, text_backbone)])
        settings = as_begun(settings)
        config = config_from(method_named(asked["method"]).config, set_ or [], chosen.method_settings(asked["method"]))
        kind = check_kind(asked["problem"])
        which = None if kind is None else kind_named(kind)
        pairs = which is not None and which.dual
        if not pairs and (text_backbone, text_pool, dim, loss) != (None, None, None, "contrastive"):
            raise ValueError("--text-backbone, --text-pool, --dim and --loss are for pairs: say --task retrieval")
        if which is not None and which.writes is not None:
            check_writes(name, which.writes, revision=revision)
        table = table_options(columns, no_header, no_quoting, encoding)
        own = chosen.recipe and chosen.recipe.transform()
        fields = Fields(text=text, text2=text2, image=image, label=None if pairs else label)
        if pairs:
            both = load_pair_processor(name, text_backbone, revision=revision)
            processor = replace(both, image=adjusted(both.image, size=image_size, normalize=normalize))
        else:
            found = own or load_processor(name, revision=revision)
            processor = adjusted(found, size=image_size, normalize=normalize)
        rows = read_rows(train, fields, table, kind, split=train_split)
        show_many(len(rows))
        data = prepare(
            rows,
            None if dev is None else read_rows(dev, fields, table, kind, split=dev_split),
            fields,
            processor,
            kind=kind,
            max_length=asked["max_length"],
            dev_fraction=dev_fraction,
            seed=seed,
            shots=asked["shots"],
            shots_seed=shots_seed,
            augment=asked["augment"],
            skip_bad_images=skip_bad_images,
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            separator=unescaped(separator),
        )
        where = {"name": name, "dtype": dtype, "revision": revision, "drop_path": asked["drop_path"]}
        noise = asked["backbone_noise"] or ("drop_path" if asked["drop_path"] else None)
        how = {"backbone_noise": noise, "checkpoint": checkpoint}
        model: Attached
        if pairs:
            if own_head:
                raise ValueError("--own-head with --task retrieval: the embeddings are Sidestep's; leave it out")
            head = {"pool": asked["pool"], "text_pool": text_pool, "dim": asked["dim"], "loss": asked["loss"]}
            model = _attached_pair(config, {**where, "text_name": text_backbone}, how, {**chosen.head(), **head}, seed)
        else:
            model = _attached(config, data, where, how, pool=asked["pool"], own_head=own_head, seed=seed)
        show_start(model, data, settings)
        record = chosen.record()
        if record is not None:
            show_recipe(record)
        results = run(model, data, settings, recipe=record, tell=remark)
        show_answers(model, data)
        show_results(results, Path(output))


def _attached_pair(
    config: MethodConfig, where: dict[str, Any], how: dict[str, Any], head: dict[str, Any], seed: int
) -> PairModel:
    """The dual encoder to train, with new projections where there are none."""
    import torch

    from sidestep.backbone.load import load_pair
    from sidestep.model.attach import attach
    from sidestep.model.heads import Retrieve

    asked = Retrieve(**head)
    torch.manual_seed(seed)
    return attach(load_pair(**where), config, head=asked, **how)


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
    """The model to train: with a Sidestep head, or the backbone's own (for classes, or to write text)."""
    import torch

    from sidestep.backbone.load import load_backbone
    from sidestep.kinds.base import kind_named
    from sidestep.kinds.prepare import head_for
    from sidestep.model.attach import attach

    if own_head and pool is not None:
        raise ValueError(f"--pool {pool} with --own-head: the backbone's own head reads what it reads")
    writes = kind_named(data.labels.kind).writes
    if own_head and writes is not None:
        raise ValueError(f"--own-head with --task {writes}: it is for classification; leave it out")
    head = None if own_head else head_for(data, pool)
    torch.manual_seed(seed)
    backbone = load_backbone(
        **where, head=own_head, num_labels=data.labels.outputs if own_head else None, writes=writes
    )
    return attach(backbone, config, head=head, **how)
