"""The core needs torch, transformers and little else: a model is attached, measured, planned and trained without more.

A machine that is lent for minutes has a plain image, and no time to install what only tables, commands and reports use.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import sidestep
from sidestep.versions import VERSION

ROOT = Path(__file__).parents[1]

ABSENT = """
import sys

ABSENT = {
    "accelerate", "altair", "datasets", "jinja2", "pandas", "pyarrow", "rich", "scipy", "sidestep", "sklearn",
    "tensorboard", "typer",
}


class Without:
    # a finder that does not find some packages, nor that they are installed
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        root = name.partition(".")[0]
        return None if root in ABSENT - {"sidestep"} else self.finder.find_spec(name, path, target)

    def find_distributions(self, context):
        found = getattr(self.finder, "find_distributions", lambda context: ())(context)
        return [one for one in found if one.name.lower().replace("scikit-learn", "sklearn") not in ABSENT]


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""

WORK = """
import torch
from transformers import BertConfig, BertModel

import sidestep as ss
from sidestep.measure.meters import Cost, measure
from sidestep.measure.plan import plan_for
from sidestep.model.settings import Settings
from sidestep.versions import version_of

torch.manual_seed(0)
sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
backbone = BertModel(BertConfig(**sizes, intermediate_size=32), add_pooling_layer=False)
batch = {"input_ids": torch.randint(1, 40, (4, 7)), "labels": torch.arange(4) % 2}
read, head = ss.ReadConfig(rank=4), ss.Classify(num_labels=2, pool="mean")

costs = measure(backbone, {"read": Settings(read, head, keep="replay")}, batch, repeats=1, warmup=0)
assert isinstance(costs["read"], Cost), costs

model = ss.attach(backbone, read, head=head, keep="replay").train()
assert plan_for(model, batch).peak_bytes > 0
with ss.saved_bytes(model) as kept:
    loss = model(**batch).loss
assert kept.total > 0
optimizer = torch.optim.AdamW([parameter for _, parameter in model.trained_parameters()], lr=0.1)
loss.backward()
optimizer.step()
assert model(**batch).loss < loss

assert version_of("sidestep") == ss.__version__
assert not ABSENT - {"sidestep"} & sys.modules.keys()
"""


def test_the_core_works_from_its_sources_with_torch_and_transformers_alone(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ABSENT + WORK], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_the_package_knows_the_version_under_which_it_is_built() -> None:
    built = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert built == VERSION == sidestep.__version__
