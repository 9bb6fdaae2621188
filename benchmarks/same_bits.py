"""Every method on every tiny family. Outputs, gradients and kept bytes are compared to the bit with another state's.

    python benchmarks/same_bits.py before.json                     # write what this state computes
    python benchmarks/same_bits.py after.json --compare before.json

Run it before and after a change that must change no number. Both runs need the same machine and versions. Methods run
with their dropout, on the backbone's own head and on Sidestep's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "laws"))

from test_every_method import METHODS, OWN_READ_OUT, config_of, placed

import sidestep as ss
from tiny import FAMILIES, LABELS, TinyFamily, logits, randomize

#: Settings beside those of the laws, which run other code.
MORE: dict[str, Any] = {
    "read rnn last post_norm": ss.ReadConfig(rank=4, cell="rnn", aggregate="last", correction="post_norm"),
    "read gru last pre_norm": ss.ReadConfig(rank=4, aggregate="last", correction="pre_norm"),
    "dtl first_read": ss.DTLConfig(rank=4, late_blocks=1, first_read=1),
    "lst dropout": ss.LSTConfig(reduction=2, heads=2, dropout=0.3),
    "sherl dropout": ss.SherlConfig(reduction=4, dropout=0.3),
    "synqt dropout": ss.SynQTConfig(queries=3, hidden=6, attention_hidden=3),
    "unipt vil": ss.UniPTConfig(variant="vil"),
}


def digest(tensors: Iterable[Tensor]) -> str:
    """A hash of tensors' bits and shapes."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(str(tuple(tensor.shape)).encode())
        found.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:24]


def measured(config: Any, method: str, family: TinyFamily, *, head: bool) -> dict[str, Any]:
    """One method on one family: what a training step and an evaluation give."""
    torch.manual_seed(3)
    own = ss.Classify(num_labels=LABELS) if head or method in OWN_READ_OUT else None
    model = placed(ss.attach(family.model(), config, head=own))
    randomize(model)
    torch.manual_seed(5)
    with ss.saved_bytes(model) as kept:
        trained = logits(model.train()(**family.inputs()))
    weights = torch.randn(trained.shape, generator=torch.Generator().manual_seed(4))
    if trained.requires_grad:  # a probe of a model whose own head stays frozen trains nothing
        (trained * weights).sum().backward()
    grads = [parameter.grad for _, parameter in model.trained_parameters() if parameter.grad is not None]
    with torch.no_grad():
        tested = logits(model.eval()(**family.inputs()))
    return {
        "train": digest([trained]),
        "eval": digest([tested]),
        "gradients": digest(grads),
        "tensors": len(grads),
        "kept": kept.total,
    }


def cases() -> Iterator[tuple[str, str, Any]]:
    """(name, method, config)."""
    for name in METHODS:
        yield name, name, config_of(name)
    for name, config in MORE.items():
        yield name, name.split()[0], config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--compare", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name, method, config in cases():
        for family, kind in FAMILIES.items():
            for head in (False, True):
                key = f"{name} / {family} / {'classify' if head else 'own head'}"
                try:
                    found[key] = measured(config, method, kind, head=head)
                except ValueError as error:  # a refusal, which has to stay one
                    found[key] = {"refused": type(error).__name__}
    asked.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    ran = sum("refused" not in one for one in found.values())
    print(f"{len(found)} pairs, {ran} run, {len(found) - ran} refused; written to {asked.output}")
    if asked.compare is None:
        return
    before = json.loads(asked.compare.read_text(encoding="utf-8"))
    other = [key for key in sorted(before.keys() | found.keys()) if before.get(key) != found.get(key)]
    for key in other:
        print(f"{key}:\n  before {before.get(key)}\n  after  {found.get(key)}")
    print(f"{len(before.keys() | found.keys()) - len(other)} equal to the bit, {len(other)} not")
    sys.exit(bool(other))


if __name__ == "__main__":
    main()
