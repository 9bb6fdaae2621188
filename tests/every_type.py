"""Tries methods on a tiny random model of every type of transformers, and on timm models of many designs.

    python tests/every_type.py                                       # 45 minutes on one core
    python tests/every_type.py --groups causal,vlm --methods read,lora
    python tests/every_type.py --types llama,bert --redo --out try.jsonl
    python tests/every_type.py --table                               # writes the section of docs/backbones.md

Each type runs in a child process with limits of time and memory. One JSON line a type is added to the results, and
what is there is not tried again. What is tried, and the verdicts, are in tests/sweep/checks.py.
"""

from __future__ import annotations

import os

# before torch is imported: models of this size take longer where threads wait for each other
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import argparse
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from sweep.catalogue import GROUPS, ModelType, catalogue
from sweep.methods import DEFAULT, config_of
from sweep.records import Record, Results, in_child
from sweep.table import verdicts, write_section

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "every_type.jsonl"


def sweep(results: Results, kinds: Sequence[ModelType], methods: Sequence[str], *, redo: bool) -> None:
    """Try methods on types, where they were not tried before or that is asked for."""
    for kind in kinds:
        names = list(methods) if redo else results.missing(kind.name, methods)
        if names:
            results.add(record := in_child(kind, names))
            print(_line(record), flush=True)


def _line(record: Record) -> str:
    found = record.get("unbuildable") or " ".join(f"{method}:{verdict}" for method, verdict in verdicts(record).items())
    return f"{record['seconds']:6} {record['group']:8} {record['type']:32} {found}"


def chosen(groups: str | None, types: str | None) -> Iterator[ModelType]:
    """The types that were asked for.

    Raises:
        ValueError: if a group or a type is unknown.
    """
    known = catalogue()
    wanted_groups = groups.split(",") if groups else list(GROUPS)
    wanted = types.split(",") if types else list(known)
    if unknown := [*(set(wanted_groups) - set(GROUPS)), *(set(wanted) - set(known))]:
        raise ValueError(f"unknown: {', '.join(unknown)}. Groups are {', '.join(GROUPS)}")
    yield from (known[name] for name in wanted if known[name].group in wanted_groups)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file of results")
    parser.add_argument("--groups", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--types", help="by transformers' names")
    parser.add_argument("--methods", default=",".join(DEFAULT))
    parser.add_argument("--redo", action="store_true", help="try again what was tried")
    parser.add_argument("--table", action="store_true", help="write the section of docs/backbones.md and try nothing")
    asked = parser.parse_args()
    results = Results(asked.out)
    if asked.table:
        write_section(results.records)
        return
    methods = asked.methods.split(",")
    for name in methods:
        config_of(name)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    sweep(results, list(chosen(asked.groups, asked.types)), methods, redo=asked.redo)


if __name__ == "__main__":
    main()
