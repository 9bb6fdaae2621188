"""Driving a method along the backbone's own loop.

A `Pass` is one run of the backbone, a `Strand` what one method owns along it. `Hooks` bring the pass to a driver.
`Fold` is the live driver: the model's own loop, one method. `SharedFold` brings one pass to many of them.
"""

from sidestep.fold.calls import fed, recorded
from sidestep.fold.fold import Fold
from sidestep.fold.hooks import Driver, Hooks, is_hooked
from sidestep.fold.passes import KEY_VALUES, FoldError, Pass, Reading, mean_tokens, single_token
from sidestep.fold.rows import Rows
from sidestep.fold.shared import CannotShare, SharedFold
from sidestep.fold.stored import Look, Recorder, Route, States, place_name
from sidestep.fold.strand import Strand

__all__ = [
    "KEY_VALUES",
    "CannotShare",
    "Driver",
    "Fold",
    "FoldError",
    "Hooks",
    "Look",
    "Pass",
    "Reading",
    "Recorder",
    "Route",
    "Rows",
    "SharedFold",
    "States",
    "Strand",
    "fed",
    "is_hooked",
    "mean_tokens",
    "place_name",
    "recorded",
    "single_token",
]
