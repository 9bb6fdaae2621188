"""Linear maps that are solved: ridge regression and logistic regression on vectors of rows, to convergence.

Vectors are standardised by the training rows. Where there are fewer rows than channels, the map is sought in the span
of the rows, which holds the best one exactly. With more of both than `LARGEST`, it is sought in the span of so many
rows. Then a share of the vectors' variance is lost, which is told. Several processes sum over their shares of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, log_softmax
from torch import Tensor

from sidestep import ranks
from sidestep.data import DataError
from sidestep.measure.memory import format_bytes

LARGEST = 8192
"""Channels, or rows, beyond which the span of so many rows has to do."""
CHUNK = 4096
"""Rows at a time."""
RIDGES = tuple(10.0**power for power in np.arange(-5, 2.5, 0.5))
"""Penalties of a regression."""
PENALTIES = tuple(10.0**power for power in np.arange(1, -5, -1.0))
"""Penalties of a logistic regression, each of which starts from the map of the one before."""
WORSE = 1
"""Penalties behind the best that are tried before no smaller one is."""
HELD_OUT = 0.2
HELD = 2**26
"""Values of coordinates that are held, 512 MiB. More are held in float32, up to a third of the free memory."""
MOST_TRIED = 2**14
"""Rows on which a penalty is chosen, at most."""
LBFGS = {"maxiter": 1000, "maxfun": 2000, "maxcor": 20, "ftol": 1e-10, "gtol": 1e-6}
"""When a logistic regression has converged, as scipy's L-BFGS-B takes it."""
RANK = 1e-10
"""Directions of less variance than this share of the largest are rounding."""

Problem = Literal["single", "multi", "regress"]
Values = NDArray[np.float64]
Rows = NDArray[np.int64]
Vectors = Callable[[int, int], Tensor]
"""Gives (rows, channels) of the rows from one number to another, in float32."""


@dataclass(frozen=True, kw_only=True)
class Solution:
    """A map of vectors as they are.

    Attributes:
        weight: (outputs, channels).
        bias: (outputs,).
        penalty: that was chosen.
        lost: share of the variance of the vectors that the map could not read.
        loss: mean of the training rows.
    """

    weight: Tensor
    bias: Tensor
    penalty: float
    lost: float
    loss: float


@dataclass(frozen=True)
class Basis:
    """Coordinates in which a map is sought.

    Attributes:
        mean, scale: (channels,) of the training rows.
        directions: (channels, coordinates), orthonormal. None: the channels themselves.
        lost: share of the variance outside of them.
        own: (rows, coordinates) of the training rows, where they came out with the directions.
    """

    mean: Tensor
    scale: Tensor
    directions: Tensor | None
    lost: float = 0.0
    own: Tensor | None = None

    @property
    def width(self) -> int:
        """Coordinates of a row."""
        return len(self.mean) if self.directions is None else self.directions.shape[1]

    def rows(self, vectors: Vectors, start: int, end: int) -> Tensor:
        """The coordinates of training rows from one number to another."""
        return self.of(vectors(start, end)) if self.own is None else self.own[start:end]

    def of(self, vectors: Tensor) -> Tensor:
        """(rows, coordinates) in float64."""
        standard = (vectors.double() - self.mean) / self.scale
        return standard if self.directions is None else standard @ self.directions

    def unfolded(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The map of coordinates (coordinates, outputs) as one of the vectors as they are."""
        full = weight if self.directions is None else self.directions @ weight
        full = full / self.scale[:, None]
        return full.T.float().contiguous(), (bias - self.mean @ full).float()


def solve(
    vectors: Vectors,
    targets: Tensor,
    problem: Problem,
    *,
    outputs: int,
    penalty: float | None = None,
    balanced: bool = False,
    weights: Tensor | None = None,
    seed: int = 0,
) -> Solution:
    """The linear map of vectors that fits targets best.

    Args:
        vectors: of the rows.
        targets: (rows,) of classes, or (rows, outputs).
        problem: "regress" is ridge regression, "single" multinomial logistic regression, "multi" one logistic
            regression for each class.
        outputs: of the map.
        penalty: weight of the map's squared norm, per row. None: a regression takes the one with the least error of
            rows that are left out, each in turn. Else it is chosen on a fifth of the rows.
        balanced: whether each class counts the same.
        weights: (rows,) how much each row counts in the loss of classes. None: all the same.
        seed: of the draw of that fifth, and of the rows whose span is taken.

    Raises:
        DataError: if values are not finite, or the same for all rows. If a class has fewer than two rows, or memory is
            too small for a Gram matrix.
    """
    targets = targets.cpu()
    _check(targets, problem, outputs)
    basis = _basis(vectors, len(targets), seed)
    weights = torch.ones(len(targets), dtype=torch.float64) if weights is None else weights.double()
    if balanced:
        weights = weights * _weights(targets, problem, outputs)
    if problem == "regress":
        weight, bias, chosen, loss = _ridge(vectors, basis, targets.double().view(len(targets), -1), penalty)
    else:
        rows = _Logistic(vectors, basis, targets.numpy(), problem, outputs, weights.numpy())
        chosen = penalty if penalty is not None else _chosen(rows, seed)
        *_, (flat, height, loss) = rows.path(np.arange(len(targets)), [chosen])
        weight, bias = torch.from_numpy(flat), torch.from_numpy(height)
    full, shift = basis.unfolded(weight, bias)
    return Solution(weight=full, bias=shift, penalty=chosen, lost=basis.lost, loss=loss)


def _check(targets: Tensor, problem: Problem, outputs: int) -> None:
    if problem == "regress" and not bool(torch.isfinite(targets).all()):
        raise DataError("targets are not all finite numbers: a readout cannot be solved for them")
    if problem == "single":
        counts = torch.bincount(targets.long(), minlength=outputs)
        few = [index for index, count in enumerate(counts.tolist()) if count < 2]
        if few:
            raise DataError(
                f"{len(few)} of {outputs} classes have fewer than two training rows (the first is number {few[0]}): a "
                "readout is chosen on held-out rows of each. Give more rows, or leave these classes out"
            )


def _check_room(side: int, further: int = 0) -> None:
    """Refuse a Gram matrix for which there is no memory. It is held with its eigenvectors and their workspace.

    Args:
        side: rows of the matrix.
        further: bytes that are held beside it.
    """
    needed, free = 4 * 8 * side**2 + further, psutil.virtual_memory().available
    if needed > free:
        raise DataError(
            f"a readout with a Gram matrix of {side} x {side} needs {format_bytes(needed)}, and {format_bytes(free)} "
            "of memory are free. Read fewer levels (--set levels=4), or give fewer training rows"
        )


def _chunks(rows: int) -> Iterator[tuple[int, int]]:
    """Where chunks of this process's share of the rows begin and end."""
    low, high = _own(rows)
    for start in range(low, high, CHUNK):
        yield start, min(start + CHUNK, high)


def _own(rows: int) -> tuple[int, int]:
    """Where this process's share of so many rows begins and ends."""
    return rows * ranks.rank() // ranks.count(), rows * (ranks.rank() + 1) // ranks.count()


def _sum(parts: Iterable[Tensor]) -> Tensor:
    """The sum of tensors over the chunks of all processes, each of which has some."""
    total: Any = 0.0
    for part in parts:
        total = total + part
    return ranks.total(total)


def _basis(vectors: Vectors, rows: int, seed: int) -> Basis:
    mean = _sum(vectors(start, end).double().sum(0) for start, end in _chunks(rows)) / rows
    if not bool(torch.isfinite(mean).all()):
        raise DataError(
            "the backbone's states are not all finite numbers, so nothing can be solved: load it in float32 "
            "(--dtype float32)"
        )
    square = _sum((vectors(start, end).double() - mean).square().sum(0) for start, end in _chunks(rows))
    variance = square / rows
    # a channel that is constant says nothing, and is left as it is
    varies = variance > 1e-12 * (mean.square() + 1)
    if not bool(varies.any()):
        raise DataError(
            f"the backbone gives the same states for all {rows} training rows, so there is nothing to solve. Look "
            "whether the column is the right one, and whether its texts or images differ"
        )
    scale = torch.where(varies, variance, torch.ones_like(variance)).sqrt()
    plain = Basis(mean, scale, None)
    channels = len(mean)
    if channels <= min(rows, LARGEST):
        return plain
    count = min(rows, LARGEST)
    _check_room(count, 8 * channels * count)
    drawn = np.sort(np.random.default_rng(seed).permutation(rows)[:count])
    span = torch.cat([plain.of(vectors(int(row), int(row) + 1)).float() for row in drawn])
    values, rotation = torch.linalg.eigh((span @ span.T).double())
    kept = values > RANK * values[-1]
    directions = (span.T.double() @ rotation[:, kept]) / values[kept].sqrt()
    if count == rows:  # all rows are in their own span
        return Basis(mean, scale, directions, own=rotation[:, kept] * values[kept].sqrt())
    inside = float(_sum((plain.of(vectors(start, end)) @ directions).square().sum() for start, end in _chunks(rows)))
    whole = float(square.div(scale.square()).sum())
    return Basis(mean, scale, directions, max(1 - inside / whole, 0.0) if whole else 0.0)


def _weights(targets: Tensor, problem: Problem, outputs: int) -> Tensor:
    if problem != "single":
        raise DataError('class_weights="balanced" is for one class a row: leave it out')
    counts = torch.bincount(targets.long(), minlength=outputs).double()
    return (len(targets) / (outputs * counts))[targets.long()]


# --- ridge ------------------------------------------------------------------------------------------------------------


def _ridge(
    vectors: Vectors, basis: Basis, targets: Tensor, penalty: float | None
) -> tuple[Tensor, Tensor, float, float]:
    rows = len(targets)
    mean = targets.mean(0)
    if basis.own is None:
        _check_room(basis.width)
    gram: Any = 0.0
    moment: Any = 0.0
    for start, end in _chunks(rows):
        part = basis.rows(vectors, start, end)
        gram, moment = gram + part.T @ part, moment + part.T @ (targets[start:end] - mean)
    gram, moment = ranks.total(gram), ranks.total(moment)
    values, rotation = torch.linalg.eigh(gram)
    values, moment = values.clamp(min=0), rotation.T @ moment
    tried = RIDGES if penalty is None else (penalty,)
    errors, residuals = torch.zeros(2, len(tried), dtype=torch.float64)
    for start, end in _chunks(rows):
        part = basis.rows(vectors, start, end) @ rotation
        for number, one in enumerate(tried):
            shrunk = 1 / (values + rows * one)
            rest = targets[start:end] - mean - part @ (shrunk[:, None] * moment)
            # of each row's own target in its prediction, the mean's share included
            own = (part.square() @ shrunk + 1 / rows).clamp(max=1 - 1e-9)
            errors[number] += (rest / (1 - own)[:, None]).square().sum()
            residuals[number] += rest.square().sum()
    best = int(ranks.total(errors).argmin())
    weight = rotation @ ((1 / (values + rows * tried[best]))[:, None] * moment)
    return weight, mean, float(tried[best]), float(ranks.total(residuals)[best]) / targets.numel()


# --- logistic regression ----------------------------------------------------------------------------------------------


Chunks = Callable[[], Iterator[tuple[Values, Rows]]]
"""Gives coordinates in chunks, with the numbers of their rows."""


@dataclass
class _Logistic:
    """Logistic regression on coordinates. In numpy: a call of torch costs more than these products of few rows."""

    vectors: Vectors
    basis: Basis
    targets: NDArray[Any]
    problem: Problem
    outputs: int
    weights: Values

    def coordinates(self, rows: Rows) -> Chunks:
        """Gives the coordinates of this process's share of ascending rows in chunks, with their numbers.

        They are held where they are few enough, and made again for each pass where not.
        """
        rows = rows[slice(*_own(len(rows)))]
        width = self.basis.width
        many = self.basis.directions is None and len(rows) * width > HELD

        def made() -> Iterator[tuple[Values, Rows]]:
            for start in range(0, len(rows), CHUNK):
                part = rows[start : start + CHUNK]
                first = int(part[0])
                own = self.basis.rows(self.vectors, first, int(part[-1]) + 1)
                yield own.numpy()[part - first], part

        if many and 4 * len(rows) * width > psutil.virtual_memory().available / 3:
            return made
        held: list[tuple[Any, Rows]] = [(own.astype(np.float32) if many else own, part) for own, part in made()]
        return lambda: iter(held)

    def path(self, rows: Rows, penalties: Sequence[float]) -> Iterator[tuple[Values, Values, float]]:
        """Weights, biases and mean loss for each of falling penalties. Each starts from those before."""
        chunks = self.coordinates(rows)
        point = np.zeros((self.basis.width + 1) * self.outputs)
        for penalty in penalties:

            def loss(flat: Values, penalty: float = penalty) -> tuple[float, Values]:
                return self._loss(chunks(), len(rows), flat, penalty)

            found = minimize(loss, point, method="L-BFGS-B", jac=True, options=LBFGS)
            point = found.x
            weight, bias = self._parts(point)
            yield weight, bias, float(found.fun) - 0.5 * penalty * float(np.square(weight).sum())

    def score(self, chunks: Chunks, count: int, weight: Values, bias: Values) -> float:
        """The mean loss of rows."""
        found = sum(float(self._losses(_product(x, weight) + bias, part)[0].sum()) for x, part in chunks())
        return float(ranks.total(torch.tensor(found, dtype=torch.float64))) / count

    def _loss(
        self, chunks: Iterator[tuple[Values, Rows]], count: int, flat: Values, penalty: float
    ) -> tuple[float, Values]:
        weight, bias = self._parts(flat)
        found = np.zeros(1 + len(flat))
        of_weight, of_bias = self._parts(found[1:])
        for x, part in chunks:
            losses, slopes = self._losses(_product(x, weight) + bias, part)
            found[0] += losses.sum()
            of_weight += _product(x.T, slopes)
            of_bias += slopes.sum(0)
        ranks.total(torch.from_numpy(found))
        found /= count
        found[0] += 0.5 * penalty * float(np.square(weight).sum())
        of_weight += penalty * weight
        return float(found[0]), found[1:]

    def _losses(self, logits: Values, rows: Rows) -> tuple[Values, Values]:
        """The loss of each row, and its gradient by the row's logits."""
        targets, weights = self.targets[rows], self.weights[rows]
        if self.problem == "single":
            shares = log_softmax(logits, axis=1)
            own = np.arange(len(rows)), targets
            losses, slopes = -shares[own], np.exp(shares)
            slopes[own] -= 1
        else:
            losses = (np.logaddexp(0, logits) - targets * logits).mean(1)
            slopes = (expit(logits) - targets) / self.outputs
        return losses * weights, slopes * weights[:, None]

    def _parts(self, flat: Values) -> tuple[Values, Values]:
        both = flat.reshape(-1, self.outputs)
        return both[:-1], both[-1]


def _product(left: Values, right: Values) -> Values:
    """The product in the precision of the left, which may be held in float32."""
    return (left @ right.astype(left.dtype, copy=False)).astype(np.float64, copy=False)


def _chosen(rows: _Logistic, seed: int) -> float:
    """The penalty with the least loss on a fifth of the rows, of which each class has its share."""
    order = np.random.default_rng(seed).permutation(len(rows.targets))[:MOST_TRIED]
    if rows.problem == "single":
        classes = rows.targets[order]
        # so many rows of each class to either side, at least one of them
        place = np.empty(len(order), dtype=np.int64)
        for name in np.unique(classes):
            of_class = np.flatnonzero(classes == name)
            place[of_class] = np.arange(len(of_class)) >= max(round(HELD_OUT * len(of_class)), 1)
        held, kept = np.sort(order[place == 0]), np.sort(order[place == 1])
    else:
        count = max(round(HELD_OUT * len(order)), 1)
        held, kept = np.sort(order[:count]), np.sort(order[count:])
    apart = rows.coordinates(held)
    losses: list[float] = []
    for weight, bias, _ in rows.path(kept, PENALTIES):
        losses.append(rows.score(apart, len(held), weight, bias))
        if len(losses) - int(np.argmin(losses)) > WORSE:  # smaller ones fit the kept rows more closely still
            break
    return float(PENALTIES[int(np.argmin(losses))])
