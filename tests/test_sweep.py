"""The sweep's own verdicts: each is given to a method that earns it, and its results and tables are what they say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import every_type
from sidestep.interface import registry
from sidestep.interface.sites import Site
from sidestep.methods import SideNet, register
from sweep.catalogue import catalogue
from sweep.checks import Outcome, outcome
from sweep.records import Results, in_child
from sweep.subject import Subject
from sweep.table import PAGE, reason, verdicts, with_section
from toys import ToyConfig


class Adds(SideNet):
    """Adds what it makes of the last block's output to that output."""

    starts_as_identity = True
    tokenwise = True

    def __init__(self, config: ToyConfig, sites: Sequence[Site]) -> None:
        super().__init__()
        self.site = next(site for site in reversed(sites) if site.kind == "block")
        self.map = nn.Linear(self.site.width, self.site.width)
        nn.init.zeros_(self.map.weight)
        nn.init.zeros_(self.map.bias)

    @classmethod
    def first_write(cls, config: ToyConfig, sites: Sequence[Site]) -> Site | None:
        return next(site for site in reversed(sites) if site.kind == "block")

    def write(self, state: Any, hidden: Tensor, site: Site) -> tuple[Any, Tensor]:
        last = site.kind == "block" and site.last
        return state, hidden + self.made(hidden, site) if last else hidden

    def made(self, hidden: Tensor, site: Site) -> Tensor:
        """What is added."""
        made: Tensor = self.map(hidden)
        return made


class LooksAhead(Adds):
    """Every token gets the mean of all."""

    def made(self, hidden: Tensor, site: Site) -> Tensor:
        return self.map(hidden).mean(1, keepdim=True).expand_as(hidden)


class Constant(Adds):
    """Another state than the model's from the start."""

    def made(self, hidden: Tensor, site: Site) -> Tensor:
        return self.map(hidden) + torch.linspace(0, 1, hidden.shape[-1])


class Idle(Adds):
    """Its weights change nothing."""

    def made(self, hidden: Tensor, site: Site) -> Tensor:
        return 0 * self.map(hidden)


class Refuses(Adds):
    """It says why it cannot."""

    @classmethod
    def check(cls, config: ToyConfig, sites: Sequence[Site]) -> None:
        raise ValueError("it is a toy")


class Breaks(Adds):
    """It has a fault."""

    def made(self, hidden: Tensor, site: Site) -> Tensor:
        raise RuntimeError("a fault")


@pytest.fixture(scope="module")
def llama() -> Subject:
    return Subject(catalogue()["llama"])


def tried(monkeypatch: pytest.MonkeyPatch, subject: Subject, method: type[SideNet], *, own: bool) -> Outcome:
    """A method under the name "toy", which is forgotten after the test."""
    monkeypatch.setattr(registry, "_REGISTRY", {n: m for n, m in registry._REGISTRY.items() if n != "toy"})
    register("toy", ToyConfig)(method)
    return outcome(subject, subject.uses[own], "toy")


@pytest.mark.parametrize(
    ("method", "verdict", "why"),
    [
        (Adds, "works", ""),
        (LooksAhead, "wrong", "padding right: the outputs move"),
        (Idle, "wrong", "no gradient reaches the method's own parameters"),
        (Refuses, "refused", "toy does not work on LlamaForCausalLM: it is a toy"),
        (Breaks, "fails", "RuntimeError: a fault"),
    ],
)
def test_a_method_gets_the_verdict_that_it_earns(
    monkeypatch: pytest.MonkeyPatch, llama: Subject, method: type[SideNet], verdict: str, why: str
) -> None:
    found = tried(monkeypatch, llama, method, own=True)
    assert found.verdict == verdict
    assert why in found.why
    if verdict == "works":
        assert found.laws == dict.fromkeys(llama.uses[True].laws, "kept")
        assert len(found.laws) == 4
    assert llama.is_as_before()


def test_a_head_that_reads_another_state_is_wrong(monkeypatch: pytest.MonkeyPatch, llama: Subject) -> None:
    assert tried(monkeypatch, llama, Adds, own=False).verdict == "works"
    found = tried(monkeypatch, llama, Constant, own=False)
    assert (found.verdict, found.stage) == ("wrong", "head")


def test_a_backbone_that_is_not_as_before_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject(catalogue()["llama"])
    weight = subject.model.lm_head.weight

    class Scribbles(Adds):
        def made(self, hidden: Tensor, site: Site) -> Tensor:
            with torch.no_grad():
                weight.add_(1e-3)
            return super().made(hidden, site)

    found = tried(monkeypatch, subject, Scribbles, own=False)
    assert (found.verdict, found.stage) == ("wrong", "detach")


def test_results_are_resumed_and_redone(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    kinds = [catalogue()["bert"]]
    for methods in (["probe"], ["probe", "read"]):
        every_type.sweep(Results(file), kinds, methods, redo=False)
    lines = file.read_text().splitlines()
    assert len(lines) == 2
    assert '"probe"' not in lines[1]
    every_type.sweep(Results(file), kinds, ["read"], redo=True)
    results = Results(file)
    # what the verdicts are depends on this process: torch refuses backward in a fork of one that had threads for it
    assert verdicts(results.records["bert"]).keys() == {"probe", "read"}
    assert results.missing("bert", ["read", "lora"]) == ["lora"]


def test_a_child_that_dies_leaves_its_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sweep.records.ALL", 0.01)
    record = in_child(catalogue()["bert"], ["read"])
    assert record["unbuildable"] == "the process ended with status 9"
    assert record["methods"] == {}


def test_unknown_types_and_groups_are_errors() -> None:
    assert [kind.name for kind in every_type.chosen("vlm,causal", "llama,bert")] == ["llama"]
    with pytest.raises(ValueError, match="unknown: poems"):
        list(every_type.chosen("poems", None))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "GitModel has several towers of blocks (encoder.layers, decoder.layers): attach to one of them (for "
            "example model.vision_model)",
            "several towers of blocks",
        ),
        (
            "XModel cannot be folded over: for 4 rows its block layers.0 takes or gives a tensor of shape (4, 9). "
            "Sidestep needs blocks that run once each",
            "for n rows its block ... takes or gives a tensor of shape (n, n)",
        ),
        ("lst does not work on SwinModel: this backbone is hierarchical", "this backbone is hierarchical"),
    ],
)
def test_a_reason_is_without_names_and_numbers(message: str, expected: str) -> None:
    assert reason(message) == expected


def test_the_page_has_the_section_of_the_results() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_section(page, Results(every_type.RESULTS).records) == page
