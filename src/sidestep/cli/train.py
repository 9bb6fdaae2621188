"""`sidestep train`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from sidestep.cli import options as opt
from sidestep.cli.chosen import Chosen
from sidestep.cli.errors import reporting
from sidestep.cli.values import backbone_named, config_from, feature_options, placed, table_options, unescaped, value_of
from sidestep.console import Shown, hush, remark, show_answers, show_results
from sidestep.messages import duration_of

AUTO = "auto"
"""In the place of a method: it is chosen."""

if TYPE_CHECKING:
    from sidestep.backbone.formats import Format
    from sidestep.backbone.recompute import Checkpoint
    from sidestep.data.boxes import BoxForm
    from sidestep.interface.keep import Keep
    from sidestep.model.token_loss import LmLoss


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
    taps: opt.Keep = "full",
    lm_loss: opt.LmLoss = "chunked",
    backbone_noise: opt.Noise = None,
    drop_path: opt.DropPath = None,
    dtype: opt.Dtype = None,
    quantize: opt.Quantize = None,
    revision: opt.Revision = None,
    device_map: opt.DeviceMap = None,
    offload_folder: opt.OffloadFolder = None,
    max_memory: opt.MaxMemory = None,
    shard: opt.Shard = False,
    text: opt.Text = None,
    text2: opt.Text2 = None,
    separator: opt.Separator = None,
    image: opt.Image = None,
    audio: opt.Audio = None,
    video: opt.Video = None,
    frames: opt.Frames = None,
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
    answers: opt.Answers = None,
    boxes: opt.Boxes = "xyxy",
    skip_bad_files: opt.SkipBadFiles = False,
    columns: opt.Columns = None,
    no_header: opt.NoHeader = False,
    no_quoting: opt.NoQuoting = False,
    encoding: opt.Encoding = "utf-8",
    epochs: opt.Epochs = 10,
    batch_size: opt.BatchSize = 32,
    eval_batch_size: opt.EvalBatchSize = None,
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
    keep: opt.KeepEpoch = "best",
    patience: opt.Patience = None,
    metric: opt.Metric = None,
    seed: opt.Seed = 0,
    bf16: opt.Bf16 = False,
    budget: opt.AutoBudget = "10m",
    save_steps: opt.SaveSteps = None,
    log_steps: opt.LogSteps = 10,
    workers: opt.Workers = 0,
    features: opt.Features = "auto",
    features_folder: opt.FeaturesFolder = None,
    features_limit: opt.FeaturesLimit = "50GB",
    features_precision: opt.FeaturesPrecision = "same",
    features_only: opt.FeaturesOnly = False,
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Train a task and save it in a folder."""
    with reporting(debug, shared=True):
        from sidestep import ranks
        from sidestep.kinds.base import kind_named
        from sidestep.methods import method_named
        from sidestep.model.heads import Retrieve
        from sidestep.training.auto import CANDIDATES, auto
        from sidestep.training.run import DataSpec, ModelSpec, RunSpec, store_features
        from sidestep.training.run import train as run
        from sidestep.training.settings import TrainSettings

        if taps in ("best", "last"):  # what --keep was about before
            keep, taps = taps, "full"
            context.params["keep"] = keep
            if (source := context.get_parameter_source("taps")) is not None:
                context.set_parameter_source("keep", source)
        chosen = Chosen.of(context, recipe)
        training = {
            "epochs": epochs,
            "batch_size": batch_size,
            "drop_last": drop_last,
            "learning_rate": learning_rate,
            "schedule": schedule,
            "accumulate": accumulate,
            "warmup": warmup,
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
            **feature_options(features, features_folder, features_limit, features_precision),
        )
        asked = chosen.over(
            {
                "method": method,
                "pool": pool,
                "dim": dim,
                "loss": loss,
                "problem": problem,
                "max_length": max_length,
                "frames": frames,
                "backbone_noise": backbone_noise,
                "drop_path": drop_path,
                "shots": shots,
                "augment": augment,
            }
        )
        hush()
        pairs = asked["problem"] is not None and kind_named(asked["problem"]).dual
        head = None
        if pairs or (text_pool, dim, loss) != (None, None, "contrastive"):  # which the run refuses for other kinds
            given = {"pool": asked["pool"], "text_pool": text_pool, "dim": asked["dim"], "loss": asked["loss"]}
            head = Retrieve(**{**chosen.head(), **given})
        data = DataSpec(
            train=train,
            dev=dev,
            text=text,
            text2=text2,
            image=image,
            audio=audio,
            video=video,
            frames=asked["frames"],
            label=label,
            kind=asked["problem"],
            table=table_options(columns, no_header, no_quoting, encoding),
            train_split=train_split,
            dev_split=dev_split,
            dev_fraction=dev_fraction,
            max_length=asked["max_length"],
            shots=asked["shots"],
            shots_seed=shots_seed,
            transform=chosen.recipe.transform() if chosen.recipe else None,
            image_size=image_size,
            normalize=normalize,
            augment=asked["augment"],
            skip_bad_files=skip_bad_files,
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            separator=unescaped(separator),
            answers=answers,
            boxes=cast("BoxForm", boxes),
        )
        chooses = asked["method"] == AUTO
        _check_auto(chosen.typed, chooses=chooses)
        found = method_named(CANDIDATES[0].name if chooses else asked["method"])
        model = ModelSpec(
            backbone=backbone_named(backbone, gguf),
            method=config_from(found.config, set_ or [], chosen.method_settings(found.name)),
            text_backbone=text_backbone,
            head=head,
            pool=None if pairs else asked["pool"],
            own_head=own_head,
            checkpoint=cast("Checkpoint | None", checkpoint),
            keep=cast("Keep", taps),
            lm_loss=cast("LmLoss", lm_loss),
            backbone_noise=asked["backbone_noise"],
            drop_path=asked["drop_path"],
            dtype=dtype,
            quantize=cast("Format | None", quantize),
            revision=revision,
            **placed(device_map, offload_folder, max_memory),
            shard=shard,
        )
        spec = RunSpec(data=data, model=model, training=settings, recipe=chosen.record())
        if features_only:
            if chooses:
                raise ValueError("--features-only with --method auto: name the method whose features are to be stored")
            told = store_features(spec, Shown(spec.recipe))
            remark(f"{told['rows']} rows are stored. The same command without --features-only trains from them")
            return
        if chooses:
            if ranks.count() > 1:
                raise ValueError(f"--method auto with {ranks.count()} processes: it is chosen in one. Name a method")
            trained, rows, results = auto(spec, budget=duration_of(budget), watch=Shown(spec.recipe))
        else:
            trained, rows, results = run(spec, Shown(spec.recipe))
        with ranks.alone():  # each of them, because those that share a sharded backbone make the same passes
            show_answers(trained, rows)
        if ranks.is_first():
            show_results(results, Path(output))


def _check_auto(typed: Mapping[str, Any], *, chooses: bool) -> None:
    """Refuse what would have no effect: settings that auto chooses, or a time for a method that is named."""
    if not chooses and "budget" in typed:
        raise ValueError(f"--budget {typed['budget']} is for --method auto: leave it out")
    flags = {"set_": "--set", "learning_rate": "--lr", "epochs": "--epochs", "weight_decay": "--weight-decay"}
    if chooses and (given := [flag for name, flag in flags.items() if name in typed]):
        raise ValueError(f"{', '.join(given)} with --method auto: its candidates have their own. Leave it out")
