"""The answer in words: which contender to take, and what is lost with less memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sidestep.report.chance import ONE_ANSWER
from sidestep.report.choice import AVERAGE, MEMORY, Choice, Standing, choices, memory_of
from sidestep.report.estimates import Estimate
from sidestep.report.rows import Group, Task
from sidestep.report.tables import MIB, NOTHING, score_text, significant

#: So many contenders are named where there are no scores, those that need least.
NAMED = 3
#: Heads of the lines of `by_task`.
BY_TASK = ("task", "metric", "dev rows", ONE_ANSWER, "best", "take", "its memory", "best ahead by")
#: How the answer is found, for the reader.
RULE = (
    "How this is chosen: the best has the highest mean score (of errors the lowest). Another is within noise of it if "
    "the 95 % interval of their difference reaches zero. Differences are taken at the same task and seed where two "
    "seeds are shared, else between the means. The interval is Student's t, with the tasks' variances pooled "
    "(Welch, Satterthwaite). With one seed noise is unknown. Of those within noise the one with the least memory is "
    "taken. It is never one that a cheaper contender matches in score, nor one at chance while the best is not."
)


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


def first_verdicts(group: Group) -> list[Verdict]:
    """The answer by the average; where there is no average, that by each task."""
    found = verdicts(group)
    return found[:1] if found[0].about == AVERAGE else found


def by_task(found: Sequence[Verdict]) -> list[tuple[str, ...]]:
    """Each task's answer in a line of texts under `BY_TASK`; none where there is one task alone."""
    alone = [verdict.choice for verdict in found if verdict.choice and verdict.about != AVERAGE]
    return [_in_a_line(choice) for choice in alone] if len(alone) > 1 else []


def _in_a_line(choice: Choice) -> tuple[str, ...]:
    task, best, pick = choice.tasks[0], choice.best, choice.pick
    unknown = all(one.behind is None for one in choice.standings[1:])
    take = "none: all at chance" if best.chance else "noise unknown" if unknown else "" if pick else "memory unknown"
    behind = _points(choice, pick) if pick is not None and pick.behind is not None and not take else NOTHING
    return (
        task.name,
        task.metric,
        str(task.dev_rows or NOTHING),
        _constant(choice) if choice.constant is not None else NOTHING,
        f"{best.row.contender} {_score(choice, best)}",
        take or (f"{pick.row.contender} {_score(choice, pick)}" if pick else NOTHING),
        NOTHING if take or pick is None else _size(pick.memory or 0.0),
        behind,
    )


def _headline(choice: Choice) -> str:
    best, pick, where = choice.best, choice.pick, _where(choice)
    if best.chance:
        return f"Take none {where}: no score can be told from {ONE_ANSWER} rows ({_constant(choice)})."
    if len(choice.standings) == 1:
        return (
            f"Only {best.row.contender} has a score {where}: {_at(choice, best)}. There is nothing to compare it with."
        )
    if all(one.behind is None for one in choice.standings[1:]):
        why = "With one seed" if best.score.count == 1 else "With one seed of all others"
        return (
            f"{best.row.contender} scores best {where}: {_at(choice, best)}. "
            f"{why} noise is unknown, so nothing cheaper can be called as good."
        )
    if pick is None:
        good = _names(choice.within[1:])
        return (
            f"{best.row.contender} scores best {where}: {_at(choice, best)}. "
            + (f"As good within noise: {good}. " if good else "")
            + f"{'Their' if good else 'Its'} memory was not measured, so the cheapest is unknown."
        )
    if pick is best:
        least = "No contender within noise of it needs less." if choice.cheaper else "No contender needs less."
        return f"Take {pick.row.contender}: it scores best {where}, {_at(choice, pick)}. {least}"
    ahead = f", {_points(choice, pick)} ahead" if pick.behind is not None else ""
    return (
        f"Take {pick.row.contender}: {where} it scores {_at(choice, pick)}, the least within noise of the best. "
        f"{best.row.contender} scores {_at(choice, best)}{ahead}."
    )


def _remarks(choice: Choice) -> Iterator[str]:
    pick = choice.pick
    if pick is not None and not choice.best.chance and choice.cheaper:
        yield f"With less memory: {listed([_cheaper(choice, one) for one in choice.cheaper])}."
    others = [one for one in choice.within if one is not pick and one is not choice.best]
    if pick is not None and not choice.best.chance and others:
        yield f"Within noise of the best too: {_names(others)}."
    if chance := [one for one in choice.standings if one.chance]:
        yield f"At chance or below: {_names(chance)}."
    unknown = [one for one in choice.standings[1:] if one.behind is None]
    if 0 < len(unknown) < len(choice.standings) - 1:
        yield f"Noise is unknown, for want of seeds: {_names(unknown)}."
    if pick is not None and (unmeasured := [one for one in choice.standings if one.memory is None]):
        yield f"Without a memory figure, and so never the cheapest: {_names(unmeasured)}."
    if choice.left_out:
        reasons = dict.fromkeys(choice.left_out.values())
        of = {why: listed([name for name, own in choice.left_out.items() if own == why]) for why in reasons}
        yield f"Not compared: {'. '.join(f'{names} ({why})' for why, names in of.items())}."
    if choice.constant is None:
        yield f"What {ONE_ANSWER} rows scores is not in these results, so scores at chance are not marked."
    elif not choice.best.chance:
        yield f"{ONE_ANSWER.capitalize()} rows scores {_constant(choice)}."
    if unlike := [one for one in choice.standings if _marks(choice, one)]:
        yield f"Made with other settings or versions than the rest, or some seeds left out: {_names(unlike)}."
    if len(metrics := dict.fromkeys(task.metric for task in choice.tasks)) > 1:
        yield f"The average goes over different metrics: {', '.join(metrics)}."


def _marks(choice: Choice, one: Standing) -> bool:
    """Whether a contender's cost or scores differ from the others' in more than the method."""
    return bool(one.row.cost_marks) or any(one.row.scores[task.name].marks for task in choice.tasks)


def _of_costs(group: Group) -> str:
    said, value = MEMORY[memory_of(group)]
    known = {row.contender: size for row in group.rows if (size := value(row)) is not None}
    least = [f"{name} {_size(known[name])}" for name in sorted(known, key=lambda name: known[name])[:NAMED]]
    costs = f"Least {said}: {listed(least)}." if least else "No memory was measured either."
    return f"There are no scores here, so these results cannot say which contender is good enough. {costs}"


def _where(choice: Choice) -> str:
    many = choice.about == AVERAGE and len(choice.tasks) > 1
    return f"on average over {len(choice.tasks)} tasks" if many else f"on {choice.tasks[0].name}"


def _task(choice: Choice) -> Task | None:
    """The task whose unit scores are shown in; None for the average."""
    return choice.tasks[0] if len(choice.tasks) == 1 else None


def _at(choice: Choice, one: Standing) -> str:
    """A score and what it costs."""
    if one.memory is None:
        return f"{_score(choice, one)} (memory not measured)"
    return f"{_score(choice, one)} with {_size(one.memory)} of {MEMORY[choice.memory][0]}"


def _score(choice: Choice, one: Standing) -> str:
    return score_text(one.score, _task(choice))


def _points(choice: Choice, one: Standing) -> str:
    """How far the best is ahead."""
    assert one.behind is not None
    task = _task(choice)
    return score_text(one.behind, task) + (" points" if task is None or task.greater else "")


def _cheaper(choice: Choice, one: Standing) -> str:
    behind = f"{_points(choice, one)} behind the best" if one.behind is not None else _score(choice, one)
    chance = f", {one.chance}" if one.chance else ""
    return f"{one.row.contender} ({_size(one.memory or 0.0)}{chance}) {behind}"


def _constant(choice: Choice) -> str:
    return score_text(Estimate(mean=choice.constant or 0.0, half=None, count=1), _task(choice))


def _size(size: float) -> str:
    return f"{significant(size / MIB)} MiB"


def _names(standings: Sequence[Standing]) -> str:
    return listed([one.row.contender for one in standings])


def listed(texts: Sequence[str]) -> str:
    """Texts in a row; with semicolons where one has a comma of its own."""
    return ("; " if any("," in text for text in texts) else ", ").join(texts)
