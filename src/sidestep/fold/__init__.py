"""Driving a method along the backbone's own loop.

A `Pass` is one run of the backbone, a `Strand` what one method owns along it. `Hooks` bring the pass to a driver.
`Fold` is the live driver: the model's own loop, one method.
"""

from sidestep.fold.calls import fed, recorded
from sidestep.fold.fold import Fold
from sidestep.fold.hooks import Driver, Hooks, is_hooked
from sidestep.fold.passes import KEY_VALUES, FoldError, Pass, Reading, mean_tokens, single_token
from sidestep.fold.stored import Look, Recorder, Route, States, place_name
from sidestep.fold.strand import Strand

__all__ = [
    "KEY_VALUES",
    "Driver",
    "Fold",
    "FoldError",
    "Hooks",
    "Look",
    "Pass",
    "Reading",
    "Recorder",
    "Route",
    "States",
    "Strand",
    "fed",
    "is_hooked",
    "mean_tokens",
    "place_name",
    "recorded",
    "single_token",
]
