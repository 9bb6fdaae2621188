"""A method of your own, which corrects the last hidden state with a low-rank sum over the blocks.

`--plugin own_method.py --method sum` finds it, and in a package the entry point "sidestep.methods".
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import sidestep as ss
from sidestep.interface.sites import Site
from sidestep.interface.taps import Tap
from sidestep.methods import SideNet, register


@dataclass(frozen=True, kw_only=True)
class SumConfig(ss.MethodConfig):
    rank: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("rank", self.rank >= 1, "at least 1")


@register("sum", SumConfig)
class Sum(SideNet):
    """Sum: a low-rank sum over the block outputs corrects the last one."""

    tokenwise = starts_as_identity = True  # it looks at one token at a time, and the output map starts at zero

    def __init__(self, config: SumConfig, sites: Sequence[Site]) -> None:
        super().__init__()
        blocks = [site for site in sites if site.kind == "block" and site.head]
        self.taps = nn.ModuleList(Tap(site.width, config.rank, form="rms") for site in blocks)
        self.out = nn.Linear(config.rank, blocks[-1].width, bias=False)
        nn.init.zeros_(self.out.weight)

    @classmethod
    def first_write(cls, config: SumConfig, sites: Sequence[Site]) -> Site:
        return next(site for site in reversed(sites) if site.kind == "block")

    def read(self, hidden: Tensor, site: Site) -> Tensor | None:
        return self.taps[site.index](hidden) if site.kind == "block" and site.head else None

    def step(self, state: Tensor | None, codes: Tensor | None, site: Site) -> Tensor | None:
        return state if codes is None else codes + (0 if state is None else state)

    def write(self, state: Tensor | None, hidden: Tensor, site: Site) -> tuple[Tensor | None, Tensor]:
        return state, hidden + self.out(state) if site.head and site.last else hidden


if __name__ == "__main__":
    backbone = BertModel(BertConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2))
    model = ss.attach(backbone, SumConfig(rank=4), head=ss.Classify(num_labels=2))
    loss = model(input_ids=torch.randint(0, 100, (4, 10)), labels=torch.tensor([0, 1, 0, 1])).loss
    print(f"loss {loss.item():.3f}, {sum(p.numel() for _, p in model.trained_parameters())} parameters are trained")
