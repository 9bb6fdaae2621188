"""The options of the commands, by what they are about."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

_model = partial(typer.Option, rich_help_panel="Model")
_data = partial(typer.Option, rich_help_panel="Data")
_training = partial(typer.Option, rich_help_panel="Training")
_running = partial(typer.Option, rich_help_panel="Output and running")


def path(text: str | Path) -> Path:
    """A place to write to. An empty text would be the current folder. A script's unset variable gives an empty text."""
    if not str(text).strip():
        raise typer.BadParameter("it is empty: name a file or folder")
    return Path(text)


_output = partial(_running, parser=path)

Backbone = Annotated[
    str, _model(help="Hub id, folder, .gguf file, timm:NAME, timm:NAME@FILE or vit:FILE.npz.", show_default=False)
]
Gguf = Annotated[str | None, _model("--gguf", help="GGUF file in the folder or hub id of --backbone.")]
OtherBackbone = Annotated[str | None, _model("--backbone", help="Where the backbone is, if it has moved.")]
TextBackbone = Annotated[
    str | None, _model(help="Encoder of texts beside that of images, for --kind retrieval and vqa.")
]
Recipe = Annotated[str | None, _model(help="One of `sidestep recipes`: it sets what no option here does.")]
Method = Annotated[str, _model(help="One of `sidestep methods`, or auto: it is chosen by trials.")]
Set = Annotated[list[str] | None, _model("--set", help="name=value, a setting of the method. Repeatable.")]
Pool = Annotated[
    str | None,
    _model(help="What the head reads: cls, mean, mean_pre_norm, last (of a dual encoder own, gpo too)."),
]
TextPool = Annotated[str | None, _model(help="The same of the text tower, where it is another (--kind retrieval).")]
Dim = Annotated[int | None, _model(help="Channels of the embeddings (--kind retrieval). Default: the model's own.")]
Loss = Annotated[str, _model(help="contrastive or triplet (--kind retrieval).")]
OwnHead = Annotated[bool, _model("--own-head", help="Train the backbone's own classification head.")]
Checkpoint = Annotated[str | None, _model(help="late: recompute the late blocks in backward.")]
Keep = Annotated[
    str,
    _model(
        "--keep",
        help="How the inputs of taps are kept for backward: full, bf16, int8, offload, replay or auto (what fits). "
        "replay keeps none and runs the frozen blocks twice.",
    ),
]
LmLoss = Annotated[
    str,
    _model(
        "--lm-loss",
        help="Loss of a language model's own head in training: chunked (without keeping logits) or own (the model's).",
    ),
]
Noise = Annotated[str | None, _model(help="Noise of the frozen backbone: drop_path, dropout or all.")]
DropPath = Annotated[float | None, _model(help="Rate of the backbone's drop path. Turns that noise on in training.")]
Dtype = Annotated[str | None, _model(help="Precision of the backbone. Default: its checkpoint's.")]
Quantize = Annotated[
    str | None, _model("--quantize", help="Quantise the backbone: 4bit, 8bit (bitsandbytes), int8 or int4 (torchao).")
]
Revision = Annotated[str | None, _model(help="Branch, tag or commit of a hub id.")]
Shard = Annotated[bool, _model("--shard", help="Share the frozen blocks out among the processes of torchrun (FSDP2).")]

DeviceMap = Annotated[
    str | None,
    _model(
        help="Where the backbone's weights go: auto, balanced, sequential, disk, a device, or JSON (text or file) of "
        "devices by modules. Default: memory, or the GPU.",
    ),
]
OffloadFolder = Annotated[
    Path | None,
    _model(parser=path, help="Folder for weights on disk that cannot be read from the model's own safetensors files."),
]
MaxMemory = Annotated[
    str | None, _model("--max-memory", help="The most that --device-map auto puts where: 0=10GiB,cpu=600MiB.")
]

SOURCE = "csv, tsv, json, jsonl or parquet file, folder or list (.txt) of images, sounds or videos, or hub id"
Train = Annotated[str, _data(help=f"Training rows: {SOURCE}.", show_default=False)]
Dev = Annotated[str | None, _data(help="Dev rows. Default: a share of the training rows is held out.")]
Rows = Annotated[str, _data("--data", help=f"Rows: {SOURCE}.", show_default=False)]
TrainSplit = Annotated[str, _data(help="Split of --train, where it has several.")]
DevSplit = Annotated[str, _data(help="Split of --dev, where it has several.")]
Split = Annotated[str, _data(help="Split of --data, where it has several.")]
DevFraction = Annotated[float, _data(help="Share held out where there is no --dev.")]
Text = Annotated[str | None, _data("--text", "--prompt", help="Column of the text, or of the prompt.")]
Text2 = Annotated[str | None, _data(help="Column of the second text of a pair.")]
Separator = Annotated[
    str | None,
    _data(
        help="Stands between the texts of a pair, and between prompt and answer of --kind lm. Default: a newline in "
        "pairs where the tokenizer puts nothing, else nothing."
    ),
]
Image = Annotated[str | None, _data(help="Column of images, or of their paths. Of a model of both beside --text.")]
Answers = Annotated[
    int | None, _data(help="How many of the most frequent answers are learned (--kind vqa). Default: all in 9 rows.")
]
Boxes = Annotated[str, _data(help="Form of the boxes, in pixels (--kind grounding): xyxy or xywh.")]
Audio = Annotated[str | None, _data(help="Column of sounds, or of their paths.")]
Video = Annotated[
    str | None, _data(help="Column of videos, or of paths of video files or folders of frames (--kind retrieval).")
]
Frames = Annotated[int | None, _data(help="Frames taken of a video, evenly spread. Default: 12.")]
Label = Annotated[
    str | None, _data("--label", "--target", "--completion", help="Column of the label, or of the text to write.")
]
Problem = Annotated[
    str | None,
    _data(
        "--kind",
        "--task",
        "--problem",
        help="single, multi, regress, tokens, spans, text2text, lm, retrieval, vqa or grounding. Default: single, or "
        "multi for lists.",
    ),
]
Shots = Annotated[int | None, _data(help="Training rows of each class. Default: all.")]
ShotsSeed = Annotated[int | None, _data(help="Seed of their draw. Default: --seed.")]
SkipBadFiles = Annotated[
    bool,
    _data("--skip-bad-files", "--skip-bad-images", help="Leave out images, sounds and videos that cannot be read."),
]
Normalize = Annotated[str | None, _data(help="imagenet or half. Default: the backbone's mean and deviation.")]
Augment = Annotated[str, _data(help="Views of training images or videos: none, flip, crop or randaugment.")]
MaxLength = Annotated[int | None, _data(help="Tokens kept of a text. Default: the tokenizer's limit.")]
MaxNewTokens = Annotated[
    int | None, _data(help="Tokens to write at most. Default: those of the longest training target.")
]
NumBeams = Annotated[int, _data(help="Beams to search with, where texts are written.")]
Columns = Annotated[str | None, _data(help="Names for a table's columns, in order: a,b,c.")]
NoHeader = Annotated[bool, _data("--no-header", help="The table's first line is a row already.")]
NoQuoting = Annotated[bool, _data("--no-quoting", help="Quotes in the table are plain characters.")]
Encoding = Annotated[str, _data(help="Encoding of the table, such as latin-1.")]

Epochs = Annotated[int, _training(help="Passes over the training rows.")]
BatchSize = Annotated[int, _training(help="Rows of one step, of all processes.")]
EvalBatchSize = Annotated[
    int | None,
    _training(help="Rows of one pass over the dev rows, of all processes. Default: 64, or what fits if offloaded."),
]
PassSize = Annotated[
    int | None, _training("--batch-size", help="Rows of one pass. Default: 64, or what fits if offloaded.")
]
Accumulate = Annotated[int, _training(help="Batches for one optimizer step.")]
Rate = Annotated[float | None, _training("--lr", help="Learning rate. Default: the method's.")]
Schedule = Annotated[str, _training(help="What the rate does: linear, cosine, cosine_epochs, step or constant.")]
Warmup = Annotated[float, _training(help="Share of the steps in which the rate rises.")]
WarmupEpochs = Annotated[int | None, _training(help="The same in epochs.")]
WarmupSteps = Annotated[int | None, _training(help="The same in steps.")]
Milestones = Annotated[
    str | None, _training(help="Epochs after which the schedule step divides the rate by 10: 15,20.")
]
StartRate = Annotated[float, _training(help="Rate at which the warm-up begins.")]
EndRate = Annotated[float, _training(help="Rate at which the schedule ends.")]
DropLast = Annotated[
    bool, _training("--drop-last/--no-drop-last", help="Leave out what is left over of whole batches.")
]
WeightDecay = Annotated[float, _training(help="AdamW's.")]
Decay = Annotated[str, _training(help="What it is applied to: weights (no biases, no norms) or all.")]
MaxGradNorm = Annotated[float, _training(help="Where the gradient's norm is cut. 0: never.")]
LabelSmoothing = Annotated[float, _training(help="For single-label classification.")]
Patience = Annotated[
    int | None,
    _training(
        help="Stop after so many epochs without a better dev score. 0: never. Default: 3 (--keep-epoch last: never)."
    ),
]
KeepEpoch = Annotated[str, _training("--keep-epoch", help="The epoch to keep: best (by its dev score) or last.")]
Metric = Annotated[str | None, _training(help="Dev score that chooses the best epoch.")]
Seed = Annotated[int, _training(help="Of weights, order, noise, held-out rows, shots and views.")]
Bf16 = Annotated[bool, _training("--bf16", help="Autocast to bfloat16.")]

Features = Annotated[
    str,
    _running("--features", help="Keep what frozen blocks compute, so that they run once: ram, disk, auto or off."),
]
FeaturesFolder = Annotated[
    Path | None, _output("--features-folder", help="Folder for disk. Default: in the user's cache.")
]
FeaturesLimit = Annotated[str, _running("--features-limit", help="Most that features may take, such as 20GB.")]
FeaturesPrecision = Annotated[
    str, _running("--features-precision", help="same, or bf16: half the size of float32, rounded.")
]

FeaturesOnly = Annotated[
    bool,
    _running("--features-only", help="Fill the folder of features, and train nothing. Several jobs share the rows."),
]

FeaturesNames = Annotated[list[str] | None, typer.Argument(help="Names as listed, or their beginnings. Default: all.")]

Output = Annotated[Path, _output(help="Folder for the task.", show_default=False)]
SaveSteps = Annotated[int | None, _running(help="Checkpoints within an epoch, every so many steps.")]
LogSteps = Annotated[int, _running(help="Steps between log entries.")]
Workers = Annotated[int, _running(help="Processes that load data.")]
Resume = Annotated[bool, _running("--resume", help="Continue an interrupted run exactly.")]
Overwrite = Annotated[bool, _running("--overwrite", help="Replace what is there.")]
Quiet = Annotated[bool, _running("--quiet", help="No progress bars.")]
Debug = Annotated[bool, _running("--debug", help="Show an error's traceback, and what other packages log.")]

RecipePrefix = Annotated[str, typer.Argument(help="Such as dtl, dtl/vtab or dtl/vtab/svhn.")]
Task = Annotated[Path, typer.Argument(help="Folder of a task.", show_default=False)]
TaskOrBank = Annotated[Path | None, typer.Argument(help="Folder of a task, or of a bank.", show_default=False)]
Bank = Annotated[Path, typer.Argument(help="Folder of a bank.", show_default=False, parser=path)]
BankName = Annotated[str, typer.Argument(help="Name of a task in the bank.", show_default=False)]
OneTask = Annotated[str | None, _data("--task", help="Name of the task that all rows are for.")]
AllTasks = Annotated[
    str | None, _data("--tasks", help="Names of tasks, with commas. Each row is answered by all of them.")
]
TaskColumn = Annotated[
    str | None, _data(help="Column with the name of each row's task, or of several with | between them.")
]
Table = Annotated[Path, _output("--output", help="csv, tsv, json, jsonl or parquet file to write.", show_default=False)]
Probabilities = Annotated[
    str, _running(help="Columns of probabilities: all (p_NAME for each class), one (probability) or none.")
]
BankProbabilities = Annotated[
    str | None,
    _running(
        "--probabilities",
        help="As of `sidestep predict`. Default: all for one task, one for several.",
    ),
]
AsJson = Annotated[bool, _running("--json", help="Print everything as JSON.")]
Vision = Annotated[bool, _running("--vision", help="Digits on a vision Transformer, instead of text.")]
DemoOutput = Annotated[Path, _output(help="Folder for the demo's tasks.")]
ResultsFiles = Annotated[
    list[Path], typer.Argument(help="Files that `sidestep compare` has written.", show_default=False)
]
Page = Annotated[Path | None, _output("--output", help="HTML file to write.")]
Figures = Annotated[Path | None, _output(help="Folder for every figure as PNG, SVG and csv.")]
AsMarkdown = Annotated[bool, _running("--markdown", help="Print the tables as Markdown.")]

ComparisonFile = Annotated[Path | None, typer.Argument(help="TOML file that describes a comparison.")]
ComparedBackbone = Annotated[str | None, _model("--backbone", help="Instead of a file: hub id, folder or timm:NAME.")]
Methods = Annotated[str | None, _model(help="Names, such as read,lora,lora+checkpoint. Default: all.")]
ComparedRows = Annotated[str | None, _data("--train", help=f"Training rows: {SOURCE}.")]
ComparedDev = Annotated[str | None, _data("--dev", help="Dev rows. Default: a fifth of the training rows.")]
MostRows = Annotated[int | None, _data("--rows", help="Most training rows. Default: all.")]
Seeds = Annotated[int, _training(help="How many seeds, from 0.", min=1, max=1000)]
AutoBudget = Annotated[str, _training("--budget", help="Time for --method auto, with its last training: 90s, 10m, 1h.")]
Budget = Annotated[
    str | None, _training("--budget", help="Equal time for each contender on each task instead of equal epochs: 10m.")
]
NoCosts = Annotated[bool, _running("--no-costs", help="Measure no memory and time of steps.")]
Only = Annotated[str | None, _running("--only", help="Contenders to run, of those compared: read,lora.")]
Quick = Annotated[bool, _running("--quick", help="One seed, few rows, epochs and rates: ends in minutes.")]
DryRun = Annotated[bool, _running("--dry-run", help="List the runs and stop.")]
Share = Annotated[
    bool, _running("--share", help="Share the runs with other processes that run the same comparison with --share.")
]
Results = Annotated[Path | None, _output("--output", help="Results file to write or continue (.jsonl).")]

Planned = Annotated[
    str, _model("--backbone", help="Folder with a config.json, such a file, hub id or timm:NAME.", show_default=False)
]
Labels = Annotated[int, _model(help="Classes of the head.")]
Batch = Annotated[int, _training("--batch", help="Rows of one step.")]
Length = Annotated[
    int | None, _training(help="Tokens of a text (default: 128), or samples of a sound (default: 160000).")
]
ImageSize = Annotated[int | None, _data(help="Rows and columns of an image. Default: the model's, or 224.")]
PlannedFrames = Annotated[
    int | None, _data("--frames", help="Frames of a video (--kind retrieval). Default: pairs are of images.")
]
Gpu = Annotated[str | None, _training(help="Memory of the card to plan for, such as 16GB. Default: plan for the CPU.")]
Precision = Annotated[
    str | None,
    _training(help="float32, 'bf16 autocast' or bfloat16 (the backbone's weights). As --bf16 and --dtype say it."),
]
PlannedDtype = Annotated[
    str | None, _model("--dtype", help="Precision of the backbone: float32 or bfloat16. Default: float32.")
]
PlannedKind = Annotated[
    str | None,
    _data(
        "--kind",
        help="single, multi, regress, tokens, spans, text2text, lm (all tokens have a label), retrieval, vqa or "
        "grounding.",
    ),
]
Optimizer = Annotated[str, _training(help="AdamW, 'AdamW (fused)', SGD or Adafactor.")]
Measure = Annotated[bool, _running("--measure", help="Run steps with random weights here instead of predicting.")]

_serving = partial(typer.Option, rich_help_panel="Batches and limits")
Host = Annotated[str, _running("--host", help="Address to listen on. Others than this machine need keys.")]
Port = Annotated[int, _running("--port", help="Port to listen on. 0: one that is free.", min=0, max=65535)]
KeysFile = Annotated[Path | None, _running("--keys", help="File with lines 'use KEY' and 'change KEY'.")]
Root = Annotated[Path | None, _running("--root", help="Folder that tasks are added from by path. Default: the bank.")]
Url = Annotated[str | None, _model("--url", help="Server (`sidestep serve`) whose tasks label the rows.")]
Key = Annotated[
    str | None,
    _model("--key", envvar="SIDESTEP_KEY", show_envvar=True, help="Of the server. Better in the variable than here."),
]
Device = Annotated[str | None, _model(help="Such as cpu or cuda:1. Default: a GPU if there is one.")]
KeepTasks = Annotated[int | None, _model("--keep", help="Most tasks that rest in memory. Default: all.")]
Compiled = Annotated[bool, _model("--compile", help="Compile each block of the backbone.")]
MaxTokens = Annotated[int, _serving(help="Tokens of a batch, padding included.")]
MaxRows = Annotated[int, _serving(help="Rows of a batch.")]
MaxWait = Annotated[float, _serving("--max-wait-ms", help="How long a row waits for others to fill its batch.")]
Queue = Annotated[int, _serving(help="Rows that may wait. Further requests are refused.")]
RequestRows = Annotated[int, _serving(help="Most rows of a request.")]
RequestTokens = Annotated[int, _serving(help="Most tokens of a request.")]
BodyMib = Annotated[int, _serving(help="Most MiB of a body.")]
UploadMib = Annotated[int, _serving(help="Most MiB of an uploaded task, packed and unpacked.")]
Seconds = Annotated[float, _serving(help="Until a request has to be answered.")]
DrainSeconds = Annotated[float, _serving(help="For requests that wait when the server is stopped.")]
NoLog = Annotated[bool, _running("--quiet", help="No line for each request.")]
