"""Reproduce oracle files: `python tests/parity.py FILE...`.

An oracle file holds inputs, weights, outputs and gradients of an official implementation. For each file, the largest
absolute differences of Sidestep's outputs and gradients are shown. The exit code is 1 if one is above its tolerance or
a file cannot be reproduced.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from parity_diff import Comparison, diff_fixmask, diff_project, diff_step, diff_z
from parity_files import Oracle, OracleError, Reproduction
from parity_lst import lst_t5
from parity_sherl import sherl_block, sherl_pooled, sherl_t5, sherl_vse_bert, sherl_vse_cnn
from parity_unipt import unipt_clip4clip, unipt_vse
from parity_vision import dtl_swin, dtl_vit, synqt

OUTPUT_TOLERANCE = 1e-5

FAMILIES: dict[str, Callable[[Oracle], Reproduction]] = {
    "dtl_vit_": dtl_vit,
    "dtl_swin_": dtl_swin,
    "synqt_": synqt,
    "sherl_t5": sherl_t5,
    "sherl_vse_bert": sherl_vse_bert,
    "sherl_vse_cnn_train": sherl_vse_cnn,
    "sherl_vse_cnn_eval": sherl_vse_cnn,
    "sherl_clipvil_block": sherl_block,
    "sherl_mdetr_block": sherl_block,
    "sherl_clip4clip_": sherl_pooled,
    "lst_t5": lst_t5,
    "unipt_vse_": unipt_vse,
    "unipt_clip4clip_": unipt_clip4clip,
}
"""By the beginning of a file's name."""
DIFFS: dict[str, Callable[[Oracle], Comparison]] = {
    "diff_z": diff_z,
    "diff_step_": diff_step,
    "diff_project": diff_project,
    "diff_fixmask": diff_fixmask,
}
"""The same for files that name their tensors and tolerances in a way of their own."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Largest absolute differences, and what is allowed; those of hidden states are relative to their size."""

    outputs: float
    gradients: float
    states: float
    gradient_tolerance: float
    unequal: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether all is within its tolerance (a NaN is not)."""
        close = self.outputs <= OUTPUT_TOLERANCE and self.states <= OUTPUT_TOLERANCE
        return close and self.gradients <= self.gradient_tolerance and not self.unequal

    def __str__(self) -> str:
        numbers = (
            f"outputs {self.outputs:.1e} (tolerance {OUTPUT_TOLERANCE:.0e}), "
            f"gradients {self.gradients:.1e} ({self.gradient_tolerance:.0e}), "
            f"hidden states {self.states:.1e} of their size"
        )
        unequal = "".join(f"; {text}" for text in self.unequal)
        return f"{'ok  ' if self.passed else 'FAIL'} {numbers}{unequal}"


def family_of(path: Path) -> Callable[[Oracle], Reproduction | Comparison]:
    """How a file is reproduced, by the beginning of its name.

    Raises:
        OracleError: if it is of no known family.
    """
    for prefix, reproduce in (FAMILIES | DIFFS).items():
        if path.name.startswith(prefix):
            return reproduce
    raise OracleError(f"is of no known family: the name has to begin with {', '.join(FAMILIES | DIFFS)}")


def check(path: Path) -> Verdict | Comparison:
    """Reproduce one file.

    Raises:
        OracleError: if it is of no known family, incomplete, or asks for what Sidestep does not have.
    """
    reproduce = family_of(path)
    oracle = Oracle.read(path)
    found = reproduce(oracle)
    return found if isinstance(found, Comparison) else judge(oracle, found)


def judge(oracle: Oracle, found: Reproduction) -> Verdict:
    """Compare with the file.

    Raises:
        OracleError: if an output is missing on one side, or a shape differs.
    """
    outputs, gradients, states = oracle.group("out."), oracle.gradients(), oracle.states()
    seen = states.keys() & found.states.keys()
    if outputs.keys() != found.outputs.keys():
        raise OracleError(f"has the outputs {sorted(outputs)}, Sidestep's are {sorted(found.outputs)}")
    return Verdict(
        outputs=_largest(found.outputs, outputs),
        gradients=_largest(found.gradients, gradients),
        states=max((_difference(name, found.states[name], states[name], relative=True) for name in seen), default=0.0),
        gradient_tolerance=found.gradient_tolerance,
        unequal=tuple(
            f"{name} is {values}, in the file {expected}"
            for name, values in found.flags.items()
            if values != (expected := oracle.numbers(f"meta.{name}"))
        ),
    )


def _largest(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Largest difference over all tensors; a tensor that one side lacks counts as zero there."""
    lone = [{**found, **expected}[name].abs().max().item() for name in found.keys() ^ expected.keys()]
    return max([_difference(name, found[name], expected[name]) for name in found.keys() & expected.keys()] + lone)


def _difference(name: str, found: Tensor, expected: Tensor, *, relative: bool = False) -> float:
    if found.shape != expected.shape:
        raise OracleError(f"has {name} of shape {tuple(expected.shape)}, Sidestep's has {tuple(found.shape)}")
    difference = torch.nan_to_num((found - expected).abs(), nan=torch.inf).max().item()
    return difference / max(1.0, expected.abs().max().item()) if relative else difference


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the files of the command line and show what was found; 0 if all are reproduced, else 1."""
    parser = argparse.ArgumentParser(description="Reproduce oracle files of official implementations.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    files = parser.parse_args(arguments).files
    torch.set_num_threads(1)
    failed = 0
    for path in files:
        try:
            verdict = check(path)
            passed, shown = verdict.passed, str(verdict)
        except ValueError as error:  # an OracleError, or Sidestep's own word on what the file asks for
            passed, shown = False, f"FAIL {error}"
        failed += not passed
        print(f"{path.name}: {shown}", flush=True)
    print(f"{len(files) - failed} of {len(files)} files reproduced")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
