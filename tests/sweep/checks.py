"""What is tried with a method on a model, and the verdict."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

import sidestep as ss
from sidestep.interface.registry import Method
from sweep.behaviour import LAWS, apart
from sweep.build import LABELS
from sweep.catalogue import Group
from sweep.inputs import Batch, call
from sweep.limits import TooLong
from sweep.methods import config_of
from sweep.subject import Subject, Use

Verdict = Literal["works", "refused", "fails", "wrong"]
CLOSE = 1e-4
"""Up to which share of its largest output an attached model counts as one that keeps a law."""
STEPS, RATE, NOISE = 2, 1e-2, 0.1
"""Training steps, their learning rate, and the noise on what is trained before the laws are tried."""
MOST_CHARACTERS = 600
"""Of a message that is kept."""


@dataclass
class Outcome:
    """What came of a method on a model.

    Attributes:
        verdict: "works". "refused": `attach` gave a reason. "fails": anything else was raised. "wrong": nothing was
            raised, but a check failed.
        why: the message.
        stage: what was done last.
        where: the last lines of Sidestep and of anybody in the traceback.
        laws: of each law that the bare model keeps, "kept", how far the attached model is from it, or the refusal.
    """

    verdict: Verdict = "works"
    why: str = ""
    stage: str = ""
    where: list[str] = field(default_factory=list)
    laws: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The fields that say something."""
        shown = asdict(self) if self.verdict != "works" else {"verdict": self.verdict, "laws": self.laws}
        return {name: value for name, value in shown.items() if value}


class Wrong(Exception):
    """A check failed, and the message says which."""


def outcome(subject: Subject, use: Use, name: str) -> Outcome:
    """Attach a method, train it, hold it to the laws that the bare model keeps, and detach it.

    The backbone has to be as before then, also where the method was refused.
    """
    torch.manual_seed(0)
    found, attached = Outcome(stage="attach"), None
    try:
        attached = ss.attach(subject.model, config_of(name), head=None if use.own else ss.Classify(num_labels=LABELS))
    except (Exception, TooLong) as error:
        _note(found, error, "refused" if _is_refusal(error) else "fails")
    try:
        if attached is not None:
            _try(attached, subject, use, found)
        if not subject.is_as_before():
            raise Wrong("the backbone is not what it was before")
    except (Exception, TooLong) as error:
        _note(found, error, "wrong" if isinstance(error, Wrong) else "fails")
    return found


def _try(attached: ss.SideModel, subject: Subject, use: Use, found: Outcome) -> None:
    try:
        found.stage = "head"
        if not use.own:
            check_head(attached, subject.kind.group, use.batch)
        found.stage = "training"
        check_training(attached, use)
        _randomise(attached)
        for law in use.laws:
            found.stage = law
            check_law(attached.eval(), use, law, subject.pad, found)
    finally:
        ss.detach(attached)
    found.stage = "detach"


def _note(found: Outcome, error: BaseException, verdict: Verdict) -> None:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if _is_ours(frame)]
    found.verdict, found.why = verdict, " ".join(str(error).split())[:MOST_CHARACTERS]
    if verdict == "fails":
        found.why = f"{type(error).__name__}: {found.why}"
        found.where = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in (*ours[-1:], *frames[-1:])]


def _is_refusal(error: BaseException) -> bool:
    """Whether Sidestep itself says that it cannot. A model's own code raises errors of value too."""
    return isinstance(error, ValueError) and _is_ours(traceback.extract_tb(error.__traceback__)[-1])


def _is_ours(frame: traceback.FrameSummary) -> bool:
    return Path(frame.filename).is_relative_to(Path(ss.__file__).parent)


# --- the checks -------------------------------------------------------------------------------------------------------


def check_head(attached: ss.SideModel, group: Group, batch: Batch) -> None:
    """Whether the head reads the model's last hidden state, or one token of it, before anything is learned.

    Raises:
        Wrong: if it reads another state.
    """
    record: Method = attached.record
    if not getattr(record.implementation, "starts_as_identity", True):
        return
    trunk: Any = attached.trunk
    with _watched(attached, trunk.get_decoder() if group == "vlm" else trunk) as seen:
        call(attached.eval(), batch)
    reading, out = seen["reading"].hidden, seen["output"]
    last = out.get("last_hidden_state") if isinstance(out, ModelOutput) else None
    if last is None or (last.ndim == 4 and reading.shape != last.shape):
        return  # the model does not say, or gives a map
    if reading.shape[1] == 1 != last.shape[1]:
        nearest = (last - reading).abs().amax(-1).argmin(1)
        last = last[torch.arange(len(last)), nearest][:, None]
    if reading.shape != last.shape or apart(last, reading) > CLOSE:
        raise Wrong(f"the head reads {tuple(reading.shape)}, not the last hidden state of {tuple(last.shape)}")


@contextmanager
def _watched(attached: ss.SideModel, reads: nn.Module) -> Iterator[dict[str, Any]]:
    """What the head is given, and what the model gives that it reads."""
    seen: dict[str, Any] = {}
    assert attached.head is not None
    handles = [
        attached.head.register_forward_pre_hook(lambda module, args: seen.update(reading=args[0])),
        reads.register_forward_hook(lambda module, args, out: seen.update(output=out)),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def check_training(attached: ss.SideModel, use: Use) -> None:
    """Whether losses and gradients of a few steps are finite, and the method's own parameters get gradients.

    Raises:
        Wrong: if not.
    """
    attached.train()
    if attached.record.solved:
        loss = attached(**use.batch, labels=use.labels).loss
        if not loss.isfinite():
            raise Wrong("the loss is not finite")
        return
    if attached.relaxes:
        dense: Any = attached.relax(rate=RATE)
        delta: Any = attached.delta
        _step(attached, dense, use)
        delta.project(dense, attached.sparse)
    attached.place_anywhere()
    optimizer = torch.optim.AdamW([parameter for _, parameter in attached.trained_parameters()], lr=RATE)
    moved = {name for _ in range(STEPS) for name in _step(attached, optimizer, use)}
    own = {name for name, _ in attached.trained_parameters() if not name.startswith("head.")}
    if not moved or (own and not own & moved):
        raise Wrong("no gradient reaches the method's own parameters")


def _step(attached: ss.SideModel, optimizer: torch.optim.Optimizer, use: Use) -> set[str]:
    """One training step. Returns the names of the parameters that got a gradient."""
    loss: Tensor = attached(**use.batch, labels=use.labels).loss
    if not loss.isfinite():
        raise Wrong("the loss is not finite")
    loss.backward()
    gradients = {name: p.grad for name, p in attached.named_parameters() if p.grad is not None}
    if not all(gradient.isfinite().all() for gradient in gradients.values()):
        raise Wrong("a gradient is not finite")
    optimizer.step()
    moved = {name for name, gradient in gradients.items() if gradient.any()}
    optimizer.zero_grad()
    return moved


@torch.no_grad()
def _randomise(attached: ss.SideModel) -> None:
    """Noise on all that is trained, so that no zero start hides an error."""
    for _, parameter in attached.trained_parameters():
        parameter.add_(NOISE * torch.randn_like(parameter))


def check_law(attached: ss.SideModel, use: Use, law: str, pad: int, found: Outcome) -> None:
    """Note whether a law that the bare model keeps is kept with the method too.

    Raises:
        Wrong: if not.
    """
    try:
        share = LAWS[law](attached, use.batch, pad)
    except ValueError as error:
        if not _is_refusal(error):
            raise
        found.laws[law] = f"refused: {error}"
        return
    found.laws[law] = "kept" if share <= CLOSE else f"{share:.1g}"
    if share > CLOSE:
        raise Wrong(f"{law}: the outputs move by {share:.1g} of their size, and the bare model's do not")
