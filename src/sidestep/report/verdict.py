"""The answer in words: which contender to take, and what is lost with less memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sidestep.report.chance import ONE_ANSWER
from sidestep.report.choice import AVERAGE, MEMORY, Choice, Standing, choices, memory_of
from sidestep.report.estimates import Estimate
from sidestep.report.rows import Group, Task
from sidestep.report.tables import MIB, score_text, significant

#: So many contenders are named where there are no scores, those that need least.
NAMED = 3


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What results say of a group's contenders.

    Attributes:
        group: of rows.
        about: a task's name or `AVERAGE`; "" where there are no scores.
        headline: the answer.
        remarks: what a reader has to know besides, a sentence or two each.
        choice: that it is drawn from; None where there are no scores.
    """

    group: Group
    about: str
    headline: str
    remarks: tuple[str, ...] = ()
    choice: Choice | None = None


def verdicts(group: Group) -> list[Verdict]:
    """The answer by each score of a group, the average first; of costs alone one that says so."""
    found = [
        Verdict(
            group=group,
            about=choice.about,
            headline=_headline(choice),
            remarks=tuple(_remarks(choice)),
            choice=choice,
        )
        for choice in choices(group)
    ]
    return found or [Verdict(group=group, about="", headline=_of_costs(group))]


def _headline(choice: Choice) -> str:
    best, pick, where = choice.best, choice.pick, _where(choice)
    if best.chance and choice.constant is not None:
        answer = score_text(Estimate(mean=choice.constant, half=None, count=1), _task(choice))
        return f"Take none by these scores: {where}, no contender can be told from {ONE_ANSWER} rows ({answer})."
    if len(choice.standings) == 1:
        return f"Nothing to choose: {best.row.contender} alone has a score {where}: {_at(choice, best)}."
    if _noise_unknown(choice):
        return (
            f"{best.row.contender} has the best score {where}: {_at(choice, best)}. "
            "Noise is unknown, as no two contenders share two seeds or have two seeds each."
            if best.score.count > 1
            else f"{best.row.contender} has the best score {where}: {_at(choice, best)}. "
            "Noise is unknown with one seed, so nothing cheaper can be called as good."
        )
    if pick is None:
        return f"{_names(choice.within)} {_have(choice.within)} the best score {where} within noise: {_at(choice, best)}."
    named = f"Take {pick.row.contender}: {where}, {_at(choice, pick)}"
    if pick is best:
        least = "Nothing compared needs less." if not choice.cheaper else "Nothing that needs less is within noise."
        return f"{named}, is the best score. {least}"
    said = f"{named}, is within noise of the best and needs the least {MEMORY[choice.memory][0]} of all that are."
    return f"{said} The best is {best.row.contender} with {_at(choice, best)}, ahead by {_ahead(choice, pick)}."


def _remarks(choice: Choice) -> list[str]:
    return []
