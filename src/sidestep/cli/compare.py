"""`sidestep compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from sidestep.cli import options as opt
from sidestep.cli.chosen import Chosen
from sidestep.cli.errors import INTERRUPTED, reporting
from sidestep.cli.launched import as_single_process
from sidestep.cli.values import backbone_named, unescaped
from sidestep.console import hush, remark, show_table
from sidestep.messages import about, counted

if TYPE_CHECKING:
    from sidestep.compare.spec import Comparison


#: The options that go with a comparison file. All others describe a comparison, as the file does.
WITH_A_FILE = ("file", "only", "quick", "dry_run", "share", "output", "debug")


def compare(
    context: typer.Context,
    file: opt.ComparisonFile = None,
    backbone: opt.ComparedBackbone = None,
    gguf: opt.Gguf = None,
    text_backbone: opt.TextBackbone = None,
    quantize: opt.Quantize = None,
    methods: opt.Methods = None,
    train: opt.ComparedRows = None,
    dev: opt.ComparedDev = None,
    text: opt.Text = None,
    text2: opt.Text2 = None,
    separator: opt.Separator = None,
    image: opt.Image = None,
    audio: opt.Audio = None,
    video: opt.Video = None,
    frames: opt.Frames = None,
    label: opt.Label = "label",
    problem: opt.Problem = None,
    max_length: opt.MaxLength = None,
    columns: opt.Columns = None,
    no_header: opt.NoHeader = False,
    no_quoting: opt.NoQuoting = False,
    encoding: opt.Encoding = "utf-8",
    rows: opt.MostRows = None,
    epochs: opt.Epochs = 3,
    batch_size: opt.BatchSize = 32,
    seeds: opt.Seeds = 3,
    bf16: opt.Bf16 = False,
    budget: opt.Budget = None,
    features: opt.Features = "off",
    features_folder: opt.FeaturesFolder = None,
    features_limit: opt.FeaturesLimit = "50GB",
    features_precision: opt.FeaturesPrecision = "same",
    no_costs: opt.NoCosts = False,
    only: opt.Only = None,
    quick: opt.Quick = False,
    dry_run: opt.DryRun = False,
    share: opt.Share = False,
    output: opt.Results = None,
    debug: opt.Debug = False,
) -> None:
    """Compare methods at the same settings: scores, memory, time. A stopped comparison continues."""
    launched = as_single_process()
    with reporting(debug):
        from sidestep.compare.files import check_results, comparison_file, comparison_from
        from sidestep.compare.spec import quick as made_quick

        hush()
        if (file is None) == (backbone is None):
            raise ValueError("give a comparison file (sidestep compare study.toml), or --backbone, --train and --text")
        if file is not None:
            _refuse_flags(context, file)
            comparison, results = comparison_file(file, output)
        else:
            task: dict[str, Any] = {
                "train": train,
                "dev": dev,
                "text": text,
                "text2": text2,
                "separator": unescaped(separator),
                "image": image,
                "audio": audio,
                "video": video,
                "frames": frames,
                "label": label,
                "problem": problem,
                "columns": None if columns is None else [name.strip() for name in columns.split(",")],
                "header": not no_header,
                "quoting": not no_quoting,
                "encoding": encoding,
            }
            values = {
                "backbone": [
                    {"model": backbone_named(backbone, gguf), "text_model": text_backbone, "quantize": quantize}
                ],
                "task": [task],
                "methods": _listed(methods),
                "seeds": list(range(seeds)),
                "rows": rows,
                "epochs": epochs,
                "batch_size": batch_size,
                "max_length": max_length,
                "bf16": bf16,
                "budget": budget,
                "features": features,
                "features_folder": None if features_folder is None else str(features_folder),
                "features_limit": features_limit,
                "features_precision": features_precision,
                **({"costs": False} if no_costs else {}),
            }
            comparison = comparison_from(values, Path(), "the command line")
            results = output or Path("comparison.jsonl")
        if only is not None:
            comparison = comparison.only(_listed(only) or [])
        if quick:
            comparison, cut = made_quick(comparison)
            results = output or results.with_stem(f"{results.stem}-quick")
            remark(f"quick: {'; '.join(cut) or 'nothing had to be cut'}")
        check_results(comparison, results, *([] if file is None else [file]))
        if dry_run:
            _show_plan(comparison)
        else:
            _run(comparison, results, shared=share or launched > 1)


def _refuse_flags(context: typer.Context, file: Path) -> None:
    """Refuses options that would have no effect beside a file."""
    typed = Chosen.of(context, None).typed.keys() - set(WITH_A_FILE)
    flags = [parameter.opts[0] for parameter in context.command.params if parameter.name in typed]
    if flags:
        raise ValueError(f"{', '.join(flags)} with {file}: the file says what is compared. Set it there")


def _run(comparison: Comparison, output: Path, *, shared: bool) -> None:
    from sidestep.compare.runs import run
    from sidestep.compare.summary import summary

    try:
        outcome = run(comparison, output, tell=remark, shared=shared)
    except KeyboardInterrupt:
        remark(f"Stopped. What is done is in {output}; the same command continues")
        raise typer.Exit(INTERRUPTED) from None
    show_table(f"{len(outcome.records)} results, {outcome.ran} of them new", *summary(outcome.records))
    for record in outcome.records:
        if record.status != "ok":
            asked = record.settings
            where = ", ".join(str(asked[name]) for name in ("backbone", "task", "contender") if name in asked)
            remark(f"{record.status}: {record.kind} of {where}: {record.reason}")
    if not any(record.kind == "score" and record.status == "ok" for record in outcome.records):
        raise ValueError(f"no run came to a score, for the reasons above, which {output} holds too")
    remark(f"results: {output}; as a page: sidestep report {output}")


def _show_plan(comparison: Comparison) -> None:
    from sidestep.compare.runs import planned

    lines = planned(comparison)
    seeds = ", ".join(map(str, comparison.seeds))
    table = [
        (one.backbone, one.task, one.contender.name, ", ".join(f"{rate:g}" for rate in one.contender.rates), seeds)
        for one in lines
    ]
    runs = sum(one.trials + one.scores for one in lines)
    title = f"{runs} runs of {counted(comparison.epochs, 'epoch')}"
    if comparison.budget is not None:
        title = f"{about(comparison.budget)} for each contender on each task"
    show_table(title, ("backbone", "task", "contender", "rates", "seeds"), table)
    for one in comparison.contenders:
        if (plain := comparison.score_of(one)) is not None:
            remark(f"{one.name}: costs only; its scores are those of {plain}")


def _listed(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",")]
