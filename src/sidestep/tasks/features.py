"""Whether a run's frozen part is stored, where, and what becomes of it when that fails."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil

from sidestep import ranks
from sidestep.disk.feature_options import FeatureOptions, Where
from sidestep.disk.features import DiskFull, FeatureError, FeatureStore, OverLimit, has_features
from sidestep.kinds.features import Features, Forecast
from sidestep.kinds.task_data import TaskData
from sidestep.measure.memory import format_bytes
from sidestep.messages import about
from sidestep.model.attach import Attached
from sidestep.model.features import FeaturesRefused, check_storable

ROOM = 0.25
"""Share of the free memory that `auto` takes."""
LEAST = 20.0
"""Seconds of live passes below which `auto` does not care."""
GAIN = 0.8
"""`auto` stores features if a run is expected to take less than this share of the time without them."""

Tell = Callable[[str], object]
_log = logging.getLogger("sidestep")


class FeatureWarning(UserWarning):
    """Features are not used, though they were asked for. The message says why."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A run's rows, whose frozen part is stored.

    Attributes:
        data: with states in each batch.
        told: for results.json. Of these "seconds" are what the frozen pass of all rows takes or took, and
            "spent_seconds" what this run has spent.
    """

    data: TaskData
    told: dict[str, Any]


def kept_features(
    model: Attached,
    data: TaskData,
    options: FeatureOptions,
    *,
    passes: float,
    batch_size: int,
    autocast: bool,
    store: FeatureStore | None = None,
    tell: Tell | None = None,
    progress: bool = False,
) -> Kept | None:
    """The rows of a run with what frozen blocks give for them, which is computed now unless it is stored already.

    Args:
        model: attached, with all that it is trained with.
        data: its rows.
        options: what was asked for.
        passes: over all rows, which would be live ones else.
        batch_size: rows of a frozen pass.
        autocast: whether the run is under autocast to bfloat16.
        store: in memory, which several runs of this process share. With one, what cannot be stored is no error. None:
            one of its own.
        tell: called with a line that says what is stored, or why nothing is.
        progress: whether a bar is shown.

    Returns:
        None where nothing is stored. Then all passes are live.

    Raises:
        ValueError: if features were asked for by "ram" or "disk", and cannot be kept.

    Warns:
        FeatureWarning: if the disk is full. The run goes on with live passes.
    """
    if options.where == "off":
        return None
    tell, begin = tell or _log.info, time.perf_counter()
    how: dict[str, Any] = {"rounded": options.precision == "bf16", "batch_size": batch_size, "autocast": autocast}
    try:
        side = check_storable(model)
        chosen = _chosen(
            options,
            passes,
            lambda at: Features.of(side, data, _store(at, options, store), **how),
            lambda: _store("ram", options, store),
        )
        if chosen is None:
            return None
        where, features = chosen
        forecast = features.forecast()
        if options.where == "auto" and (why := ranks.first(lambda: _does_not_pay(forecast, passes, options))):
            tell(f"features: none, as {why}")
            return None
        ranks.first(lambda: _check_room(forecast, where, options))
        tell(_line(features, forecast, where, options))
        before = len(features.ids) > forecast.rows
        features.fill(progress=progress)
        computed = (
            len(set(features.ids))
            if _proved_anew(features, again=before, tell=tell, progress=progress)
            else forecast.rows
        )
    except FeaturesRefused as error:
        if options.where != "auto" and store is None:
            raise ValueError(f"--features {options.where}: {error}. Leave --features out") from error
        tell(f"features: none, as {error}")
        return None
    except DiskFull as error:
        warnings.warn(f"{error}. The run goes on without stored features", FeatureWarning, stacklevel=2)
        return None
    except FeatureError as error:
        if options.where != "auto" and store is None:
            raise
        tell(f"features: none, as {error}")
        return None
    told = {
        "where": where,
        "precision": options.precision,
        "rows": len(set(features.ids)),
        "computed": computed,
        "places": len(features.route.places),
        "seconds": round(features.entry.seconds(features.ids, features.route.places), 3),
        "spent_seconds": round(time.perf_counter() - begin, 3),
    }
    return Kept(data=features.fed(), told=told)


def _store(where: Where, options: FeatureOptions, shared: FeatureStore | None) -> FeatureStore:
    if where == "ram" and shared is not None:
        return shared
    return FeatureStore(None if where == "ram" else options.place, options.limit)


def _chosen(
    options: FeatureOptions, passes: float, of: Callable[[Where], Features], memory: Callable[[], FeatureStore]
) -> tuple[Where, Features] | None:
    """Where features are kept. "auto" takes the folder if all is there already, else the memory.

    None where there is one pass, and nothing is stored: "auto" has nothing to gain.
    """
    if options.where != "auto":
        return options.where, of(options.where)
    found = of("disk") if ranks.first(lambda: has_features(options.place)) else None
    if found is not None and ranks.first(lambda: not found.lacking):
        return "disk", found
    if passes <= 1:
        return None
    return "ram", of("ram") if found is None else found.moved(memory())


def _does_not_pay(forecast: Forecast, passes: float, options: FeatureOptions) -> str | None:
    """Why a run should do without features, or None if they pay."""
    if not forecast.rows:
        return None
    live, stored = passes * forecast.seconds, forecast.seconds + passes * forecast.fetching
    if live < LEAST:
        return f"all {round(passes, 1):g} frozen passes take {about(live)}"
    if stored > GAIN * live:
        return (
            f"{round(passes, 1):g} frozen passes take {about(live)}, and one pass with as many times reading "
            f"{format_bytes(forecast.size)} takes {about(stored)}"
        )
    free = psutil.virtual_memory().available
    if forecast.size > ROOM * free or forecast.size > options.limit:
        return (
            f"they would take {format_bytes(forecast.size)}, and {format_bytes(free)} of memory are free: --features "
            "disk keeps them in a folder"
        )
    return None


def _check_room(forecast: Forecast, where: Where, options: FeatureOptions) -> None:
    """Refuse features for which there is no room, before the rows are run.

    Raises:
        OverLimit: saying what they would take.
    """
    size = f"features of {forecast.rows} rows would take {format_bytes(forecast.size)}"
    if forecast.size > options.limit:
        raise OverLimit(
            f"{size}, and the limit is {format_bytes(options.limit)}: allow more (--features-limit), round them "
            "(--features-precision bf16), or choose --features off"
        )
    free = psutil.virtual_memory().available
    if where == "ram" and forecast.size > free:
        raise OverLimit(f"{size}, and {format_bytes(free)} of memory are free: choose --features disk or off")


def _line(features: Features, forecast: Forecast, where: Where, options: FeatureOptions) -> str:
    at = "in memory" if where == "ram" else f"in {options.place}"
    if not forecast.rows:
        return f"features: all {len(features.ids)} rows are stored {at}"
    return (
        f"features: {forecast.rows} rows are computed once and kept {at}, {format_bytes(forecast.size)}, "
        f"{about(forecast.seconds)}"
    )


def _proved_anew(features: Features, *, again: bool, tell: Tell, progress: bool) -> bool:
    """Prove what is stored. What was there before and is no more true is computed again. Returns whether it was."""
    try:
        ranks.each(features.prove)
        return False
    except FeaturesRefused as error:
        if not again:
            raise
        _log.warning("stored features are out of date, and are computed again (%s)", error)
        if features.entry.folder is None:
            features.entry.drop()
        else:
            ranks.first(features.entry.drop)
        tell(f"features: {len(features.lacking)} rows are computed again")
        features.fill(progress=progress)
        ranks.each(features.prove)
        return True
