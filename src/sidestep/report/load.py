"""Results files as rows: one row per backbone, setup and contender.

A *setup* is what a step's cost depends on besides the method: the machine, batch, length, precision. Costs of two
setups are never set against each other, so each setup is a group of its own. Scores belong to a backbone and are
joined to all its groups.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sidestep.compare.records import FORMAT, Record, lines_of, read
from sidestep.disk.atomic import same_file
from sidestep.report.estimates import Estimate, estimate
from sidestep.report.mixed import canonical, differing, text_of, unusual, usual
from sidestep.report.rows import BASELINES, Group, Missing, Results, Row, Score, Source, Task, order_of
from sidestep.report.texts import legible

#: What a step's cost hangs on besides the method and the machine.
SETUP = ("model", "precision", "attention", "device", "batch", "timed_batch", "length", "image_size")


def load(paths: Sequence[Path]) -> Results:
    """The results of one file or of several; a file that is named twice counts once.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a file holds no result, or results of a newer format.
    """
    sources: list[Source] = []
    records: list[Record] = []
    for path in paths:
        if any(same_file(path, source.path) for source in sources):
            continue
        found, broken = _read(path)
        sources.append(Source(path=path, results=len(found), broken=broken))
        records += found
    kept = _without_repeats(records)
    done = [record for record in kept if record.status == "ok"]
    return Results(
        sources=tuple(sources),
        groups=tuple(_groups(done, kept)),
        missing=tuple(_missing(kept)),
        records=tuple(kept),
    )


def _read(path: Path) -> tuple[list[Record], int]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file. `sidestep compare` writes one")
    newer = _newer_format(path)
    if newer:
        raise ValueError(
            f"{path} has results of format {newer}, but this version of Sidestep reads format {FORMAT}: "
            "update it with pip install -U sidestep"
        )
    records, broken = read(path)
    if not records:
        lines = f"none of its {broken} lines can be read" if broken else "it is empty"
        raise ValueError(f"{path} holds no result: {lines}. Give a file that `sidestep compare` has written")
    return [Record(**legible(vars(record))) for record in records], broken


def _newer_format(path: Path) -> int | None:
    """The format of a line that is newer than what can be read; None if there is none."""
    for line in lines_of(path):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            continue
        given = values.get("format") if isinstance(values, dict) else None
        if isinstance(given, int) and given > FORMAT:
            return given
    return None


def _without_repeats(records: Iterable[Record]) -> list[Record]:
    """Of the lines with one key on one machine the latest, except that a result beats a failure.

    It stands where the first of them stood, so that the files' order stays.
    """
    kept: dict[tuple[str, str], Record] = {}
    for record in records:
        place = (record.key, _machine(record))
        known = kept.get(place)
        if known is None or (record.status == "ok", record.date) >= (known.status == "ok", known.date):
            kept[place] = record
    return list(kept.values())


def _machine(record: Record) -> str:
    return str(record.machine.get("name", "unknown"))


def _groups(done: Sequence[Record], everything: Sequence[Record]) -> list[Group]:
    groups = []
    for backbone in dict.fromkeys(record.settings["backbone"] for record in done):
        here = [record for record in done if record.settings["backbone"] == backbone]
        costs = [record for record in here if record.kind == "cost"]
        scores = [record for record in here if record.kind == "score"]
        trials = [record for record in here if record.kind == "trial"]
        tasks = _tasks(scores)
        lost = [record for record in everything if record.settings["backbone"] == backbone and record.status != "ok"]
        setups: dict[str, list[Record]] = {}
        for record in costs:
            setups.setdefault(canonical(_setup(record)), []).append(record)
        remarks = _remarks(list(setups.values()))
        for lines, remark in zip(list(setups.values()) or [[]], remarks or [""], strict=True):
            rows = _rows(lines, scores, trials, lost, tasks)
            if rows:
                setup = _setup(lines[0]) if lines else {}
                groups.append(Group(backbone=backbone, setup=setup, remark=remark, tasks=tasks, rows=tuple(rows)))
    return groups


def _setup(record: Record) -> dict[str, Any]:
    return {"machine": _machine(record), **{name: record.settings.get(name) for name in SETUP}}


def _remarks(setups: Sequence[Sequence[Record]]) -> list[str]:
    """What tells each setup from the others, in a few words."""
    firsts = [lines[0] for lines in setups]
    names = list(differing(firsts, SETUP))
    machines = len({_machine(record) for record in firsts}) > 1
    plain = ("model", "device", "precision", "attention")
    return [
        ", ".join(
            ([_machine(record)] if machines else [])
            + [
                text_of(record.settings.get(name)) if name in plain else f"{name} {text_of(record.settings.get(name))}"
                for name in names
                if not (machines and name == "device")
            ]
        )
        for record in firsts
    ]


def _tasks(scores: Sequence[Record]) -> tuple[Task, ...]:
    found = []
    for name in dict.fromkeys(record.settings["task"] for record in scores):
        own = [record for record in scores if record.settings["task"] == name]
        answers = {value for record in own if (value := _constant(record)) is not None}
        found.append(
            Task(
                name=name,
                metric=(own[0].measured or {}).get("metric", "score"),
                constant=answers.pop() if len(answers) == 1 else None,
                dev_rows=min((rows for record in own if (rows := _dev_rows(record))), default=None),
            )
        )
    return tuple(found)


def _constant(record: Record) -> float | None:
    """What one answer for all dev rows scores, by the line's own metric."""
    measured = record.measured or {}
    value = (measured.get("constant") or {}).get(measured.get("metric"))
    return None if value is None else float(value)


def _dev_rows(record: Record) -> int | None:
    """The rows that a score was taken on; settings may be anything."""
    rows = record.settings.get("part_rows")
    return rows if isinstance(rows, int) and not isinstance(rows, bool) and rows > 0 else None


def _constants(scores: Iterable[Record]) -> dict[tuple[str, str], float]:
    """What one answer for all scores, by task and data: a line of before takes it from a newer one of the same rows."""
    return {_rows_of(record): value for record in scores if (value := _constant(record)) is not None}


def _rows_of(record: Record) -> tuple[str, str]:
    about = [record.settings.get(name) for name in ("data", "part_rows")] + [(record.measured or {}).get("metric")]
    return record.settings["task"], canonical(about)


def _rows(
    costs: Sequence[Record],
    scores: Sequence[Record],
    trials: Sequence[Record],
    lost: Sequence[Record],
    tasks: Sequence[Task],
) -> list[Row]:
    cost_facts, score_facts = usual(costs), usual(scores)
    constants = _constants(scores)
    rows = []
    for contender in dict.fromkeys(record.settings["contender"] for record in [*costs, *scores]):
        own = [record for record in costs if record.settings["contender"] == contender]
        cost, left_out = _agreeing(own, cost_facts)
        first = cost[-1] if cost else next(record for record in scores if record.settings["contender"] == contender)
        shared = first.settings.get("score_of")
        scorer = shared or contender
        own = [record for record in scores if record.settings["contender"] == scorer]
        found = _scores(own, score_facts, constants)
        marks = (*unusual(cost[-1:], cost_facts), *left_out, *_other_config(cost[-1:], found, bool(shared)))
        rows.append(
            Row(
                contender=contender,
                method=first.settings["method"],
                ours=first.settings["method"] not in BASELINES,
                checkpoint=bool(first.settings.get("checkpoint")),
                score_of=shared,
                cost=cost[-1] if cost else None,
                cost_marks=marks,
                scores=found,
                average=_average(found, tasks),
                missing={
                    record.settings["task"]: record.status
                    for record in lost
                    if record.kind == "score" and record.settings["contender"] == scorer
                },
                trials=tuple(record for record in trials if record.settings["contender"] == scorer),
            )
        )
    return sorted(rows, key=order_of)


def _scores(
    records: Sequence[Record], expected: Mapping[str, str], constants: Mapping[tuple[str, str], float]
) -> dict[str, Score]:
    found = {}
    for task in dict.fromkeys(record.settings["task"] for record in records):
        lines, left_out = _agreeing([record for record in records if record.settings["task"] == task], expected)
        seeds = {record.settings.get("seed"): record for record in lines}
        values = [float((record.measured or {})["score"]) for record in seeds.values()]
        found[task] = Score(
            estimate=estimate(values),
            records=tuple(seeds.values()),
            marks=(*unusual(seeds.values(), expected), *left_out),
            constant=constants.get(_rows_of(lines[0])),
        )
    return found


def _agreeing(records: Sequence[Record], expected: Mapping[str, str]) -> tuple[list[Record], tuple[str, ...]]:
    """The largest set of lines with the same settings but for seed and rate, and a phrase for each one left out.

    Of equally large sets it is the one that differs least from what is expected, and then the latest.
    """
    sets: dict[str, list[Record]] = {}
    for record in records:
        settings = {name: value for name, value in record.settings.items() if name not in ("seed", "rate")}
        sets.setdefault(canonical(settings), []).append(record)
    if not sets:
        return [], ()
    chosen = max(reversed(sets.values()), key=lambda lines: (len(lines), -len(unusual(lines, expected))))
    phrases = []
    for others in sets.values():
        if others is not chosen:
            names = [name for name in {**chosen[0].settings, **others[0].settings} if name not in ("seed", "rate")]
            unlike = differing([others[0], chosen[0]], names)
            said = "; ".join(f"{name} {values[0]}, here {values[1]}" for name, values in unlike.items())
            phrases.append(f"left out: {len(others)} of the same contender with other settings ({said})")
    return chosen, tuple(phrases)


def _other_config(cost: Sequence[Record], scores: Mapping[str, Score], shared: bool) -> tuple[str, ...]:
    """A phrase if cost and scores of a contender were made with different configs."""
    runs = [score.records[0] for score in scores.values()]
    names = ("config",) if shared else ("config", "checkpoint", "noise")
    phrases = (
        f"{name} of the cost {values[0]}, of the scores {values[1]}"
        for run in runs
        for line in cost
        for name, values in differing([line, run], names).items()
    )
    return tuple(dict.fromkeys(phrases))


def _average(scores: Mapping[str, Score], tasks: Sequence[Task]) -> Estimate | None:
    """The mean over tasks of the seeds that every task has; None if a task, or every seed, is missing somewhere."""
    names = [task.name for task in tasks if task.greater]
    if not names or any(name not in scores for name in names):
        return None
    by_seed = [scores[name].by_seed for name in names]
    seeds = [seed for seed in by_seed[0] if all(seed in values for values in by_seed)]
    if not seeds:
        return None
    return estimate([sum(values[seed] for values in by_seed) / len(names) for seed in seeds])


def _missing(records: Iterable[Record]) -> list[Missing]:
    """What was refused or failed; runs of one contender that did for the same reason are one entry."""
    found: dict[tuple[str, str, str, str], dict[str, list[str]]] = {}
    for record in records:
        if record.status == "ok":
            continue
        settings = record.settings
        place = (settings["backbone"], settings["contender"], record.status, record.reason or "no reason was given")
        what = found.setdefault(place, {})
        of = f"{record.kind} on {settings['task']}" if settings.get("task") else record.kind
        what.setdefault(of, [])
        if settings.get("seed") is not None and record.kind == "score":
            what[of].append(str(settings["seed"]))
    return [
        Missing(
            backbone=backbone,
            contender=contender,
            status=status,
            reason=reason,
            what="; ".join(f"{name}, seed {' '.join(seeds)}" if seeds else name for name, seeds in what.items()),
        )
        for (backbone, contender, status, reason), what in found.items()
    ]
