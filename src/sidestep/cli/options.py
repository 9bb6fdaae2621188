"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DATA, MODEL, TRAINING, OUTPUT = "Data", "Model", "Training", "Output and running"

Columns = Annotated[
    str | None, typer.Option(help="Names for a table's columns, in order: a,b,c.", rich_help_panel=DATA)
]
NoHeader = Annotated[
    bool,
    typer.Option("--no-header", help="The table's first line is a row already.", rich_help_panel=DATA),
]
NoQuoting = Annotated[
    bool,
    typer.Option("--no-quoting", help="Quotes in the table are plain characters.", rich_help_panel=DATA),
]
Encoding = Annotated[
    str, typer.Option(help="Encoding of the table, such as latin-1.", rich_help_panel=DATA)
]
Text = Annotated[str | None, typer.Option(help="Column of the text.", rich_help_panel=DATA)]
Text2 = Annotated[
    str | None, typer.Option(help="Column of the second text of a pair.", rich_help_panel=DATA)
]
Image = Annotated[
    str | None, typer.Option(help="Column of images or their paths.", rich_help_panel=DATA)
]
Label = Annotated[str | None, typer.Option(help="Column of the label.", rich_help_panel=DATA)]
Task = Annotated[Path, typer.Argument(help="Folder of a task.", show_default=False)]
Rows = Annotated[
    str,
    typer.Option(
        "--data", help="csv, tsv, json, jsonl or parquet file, folder, or hub id.", rich_help_panel=DATA
    ),
]
OtherBackbone = Annotated[
    str | None,
    typer.Option("--backbone", help="Where the backbone is, if it has moved.", rich_help_panel=MODEL),
]
Batch = Annotated[int, typer.Option("--batch-size", min=1, help="Rows of one pass.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
