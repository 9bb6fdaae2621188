"""The laws of keeping: however the inputs of taps are kept, outputs are the same, and gradients as the way says."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from chosen import chosen
from test_every_method import DELTA, METHODS, REFUSED, SIDE, Law, attach, gradients, loss_of, patched
from torch import Tensor

import sidestep as ss
from sidestep.fold.forms import GROUP
from sidestep.fold.reads import tensors_of
from sidestep.interface.keep import KEEPS, ROUNDED
from sidestep.methods import SideNet
from tiny import ALL, randomize

#: Methods that have no tap, or whose codes are as wide as what they read: nothing would be saved.
AS_WIDE = {
    *((name, family) for name in ("probe", "readout") for family in ALL),
    *(("synqt", family) for family in ALL),
    *(("sherl", family) for family in ("resnet", "timm_resnet", "convnext")),
}
SUPPORTED = [(m, f) for m in SIDE for f in ALL if (m, f) not in REFUSED]
WIDE = {pair for pair in SUPPORTED if pair in AS_WIDE or METHODS[pair[0]].implementation.read is SideNet.read}
REFUSING = [*sorted((m, f) for m, f in WIDE if f == "bert"), *((m, "bert") for m in DELTA)]
PAIRS = [pair for pair in SUPPORTED if pair not in WIDE]
WAYS = [keep for keep in KEEPS if keep != "full"]

pytestmark = pytest.mark.filterwarnings("ignore:keep='offload' on the CPU")


def named(*names: str, cases: Sequence[tuple[str, ...]]) -> Callable[[Law], Any]:
    """Cases of a method, a family and more, of which `make test` runs those that `chosen` names."""

    def of(law: Law) -> Any:
        quick = chosen(cases, law.__name__)
        marks = {case: () if case in quick else pytest.mark.all_laws for case in cases}
        params = [pytest.param(*case, id="-".join(case), marks=marks[case]) for case in cases]
        return pytest.mark.parametrize(names, params)(law)

    return of


def trained(method: str, family: str, keep: Any) -> tuple[ss.SideModel, Tensor]:
    """A model in training mode without any zero start, and its loss."""
    model = attach(method, ALL[family], keep=keep)
    randomize(model)
    return model, loss_of(model.train(), ALL[family])


@named(
    "method",
    "family",
    "keep",
    cases=[(m, f, k) for m, f in PAIRS for k in WAYS if k in ("replay", "int8") or f in ("bert", "vit")],
)
def test_another_keep_gives_the_same_outputs_and_gradients(method: str, family: str, keep: str) -> None:
    model, loss = trained(method, family, "full")
    wanted = gradients(model, loss)
    model, other = trained(method, family, keep)
    found = gradients(model, other)
    assert torch.equal(other, loss)
    assert found.keys() == wanted.keys()
    ours, theirs = (torch.cat([grads[name].flatten() for name in wanted]) for grads in (found, wanted))
    if keep in ROUNDED:
        assert torch.cosine_similarity(ours, theirs, dim=0) > 0.9999
    else:
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


@named("method", "family", cases=PAIRS)
def test_a_replay_keeps_codes_and_other_ways_what_they_say(method: str, family: str) -> None:
    """To the byte: what lies between the ways is the packed form of all that was read."""
    wide: list[Tensor] = []
    model = attach(method, ALL[family], keep="replay").train()
    read = model.side.read

    def noting(hidden: Tensor, site: Any) -> Any:
        codes = read(hidden, site)
        if not torch.is_grad_enabled() and tensors_of(codes):
            wide.append(hidden)
        return codes

    kept = {}
    with patched(model.side, read=noting), ss.saved_bytes(model) as saved:
        loss_of(model, ALL[family])
    kept["replay"] = saved.total
    for keep in ("bf16", "int8"):
        model, kept[keep] = kept_by(method, family, keep)
    rows = sum(hidden.numel() // hidden.shape[-1] * math.ceil(hidden.shape[-1] / GROUP) for hidden in wide)
    size = sum(hidden.numel() for hidden in wide)
    assert wide
    assert kept["bf16"] - kept["replay"] == 2 * size
    assert kept["int8"] - kept["replay"] == size + 4 * rows


def kept_by(method: str, family: str, keep: str) -> tuple[ss.SideModel, int]:
    model = attach(method, ALL[family], keep=keep).train()
    with ss.saved_bytes(model) as saved:
        loss_of(model, ALL[family])
    return model, saved.total


@named("method", "family", cases=PAIRS)
def test_a_replay_runs_the_blocks_before_the_border_twice_and_the_others_once(method: str, family: str) -> None:
    model = attach(method, ALL[family], keep="replay").train()
    places = [place for place in model.places if place.site.kind == "block"]
    blocks, visits = {place.name: place.module for place in places}, Counter(place.name for place in places)
    ran = dict.fromkeys(blocks, 0)

    def counting(name: str) -> Any:
        def count(*_: Any) -> None:
            ran[name] += 1

        return count

    handles = [module.register_forward_pre_hook(counting(name)) for name, module in blocks.items()]
    loss_of(model, ALL[family]).backward()
    for handle in handles:
        handle.remove()
    # of a block that runs several times (ALBERT) some visits are late
    late = Counter(name for name, module in blocks.items() for one in model.late_blocks() if one is module)
    most, first = {name: 2 * visits[name] - late[name] for name in blocks}, next(iter(blocks))
    assert all(visits[name] <= ran[name] <= most[name] for name in blocks)
    assert ran[first] > visits[first]


@named("method", "family", "keep", cases=[(m, f, k) for m, f in REFUSING for k in WAYS])
def test_a_method_without_narrow_codes_is_refused_by_name(method: str, family: str, keep: Any) -> None:
    if keep == "auto":
        assert attach(method, ALL[family], keep=keep).fold.keeping.way == "full"
        return
    with pytest.raises(ValueError, match=f"does not go with keep='{keep}'"):
        attach(method, ALL[family], keep=keep)


def test_every_side_network_says_whether_it_splits() -> None:
    for method in METHODS.values():
        if issubclass(method.implementation, SideNet):
            assert isinstance(method.implementation.splits, property)
