"""Where the names of points are written, so that they cover neither each other nor the points.

A greedy search over the places around each point. It is done here and not by Vega's label transform, which needs a
canvas and so does not work where figures are written to files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

LETTER = 6.1  # pixels of a letter at the labels' font size
LINE = 12
GAP = 8  # from a point's centre to its label
POINT = 6  # half a point's width
EDGE = 55  # how far a label may stand out beyond the plot on the right
TOO_MUCH = 0.25  # a label of which a larger share would be covered is left out


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels, from the top left."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """The area that two rectangles share."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(width, 0.0) * max(height, 0.0)


@dataclass(frozen=True)
class Place:
    """A label's offset from its point in pixels, and how it is aligned there; shown=False: no room for it."""

    dx: float
    dy: float
    align: str
    shown: bool = True


def place_labels(
    points: Sequence[tuple[float, float]], texts: Sequence[str], obstacles: Sequence[Box], width: float, height: float
) -> list[Place]:
    """A place for each text beside its point.

    Args:
        points: in pixels, from the top left.
        texts: one a point.
        obstacles: what labels should not cover besides the points and each other.
        width, height: of the plot.
    """
    taken = [Box(x - POINT, y - POINT, x + POINT, y + POINT) for x, y in points] + list(obstacles)
    places = [Place(0, 0, "left", shown=False)] * len(points)
    for index in sorted(range(len(points)), key=lambda index: -points[index][0]):
        options = [
            (_cost(box, taken, width, height), order, place, box)
            for order, (place, box) in enumerate(_options(*points[index], texts[index]))
        ]
        cost, _, place, box = min(options, key=lambda option: option[:2])
        if cost < TOO_MUCH * (box.right - box.left) * LINE:
            places[index] = place
            taken.append(box)
    return places


def _options(x: float, y: float, text: str) -> Iterator[tuple[Place, Box]]:
    """The places around a point, the best first."""
    length = LETTER * len(text)
    for dx, dy, align in (
        (GAP, 0, "left"),
        (-GAP, 0, "right"),
        (0, -GAP - 5, "center"),
        (0, GAP + 5, "center"),
        (GAP - 2, -GAP - 2, "left"),
        (GAP - 2, GAP + 2, "left"),
        (2 - GAP, -GAP - 2, "right"),
        (2 - GAP, GAP + 2, "right"),
        (GAP - 2, -2 * GAP - 4, "left"),
        (GAP - 2, 2 * GAP + 4, "left"),
    ):
        left = x + dx - {"left": 0.0, "center": length / 2, "right": length}[align]
        yield Place(dx, dy, align), Box(left, y + dy - LINE / 2, left + length, y + dy + LINE / 2)


def _cost(box: Box, taken: Sequence[Box], width: float, height: float) -> float:
    """The area of a label that is covered or lies outside."""
    inside = box.overlap(Box(0, -LINE, width + EDGE, height))
    outside = (box.right - box.left) * (box.bottom - box.top) - inside
    return 2 * outside + sum(box.overlap(other) for other in taken)
