"""The grid of rows and columns in which the tokens of an image stand, where a hidden state has no such axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

from torch import Tensor, nn

Grid = tuple[int, int]
TokenGrid = Callable[[nn.Module, Mapping[str, Any], Mapping[str, Any], Tensor], Grid | None]
"""Rows and columns of the tokens, from the model, the pass's inputs, a block's arguments and its hidden state."""

MOST_PREFIX = 8
"""Of the tokens that may stand before a grid (class and register tokens)."""


def sides(inputs: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a pass's images, or None for sounds and texts."""
    given = next(iter(inputs[name] for name in ("pixel_values", "x", "inputs") if name in inputs), None)
    return (given.shape[-2], given.shape[-1]) if isinstance(given, Tensor) and given.ndim in (4, 5) else None


def patch_grid(model: Any, inputs: Mapping[str, Any], call: Mapping[str, Any], hidden: Tensor) -> Grid:
    """Image size over patch size: plain vision Transformers."""
    image = inputs["pixel_values"] if "pixel_values" in inputs else inputs["x"]
    rows, columns = image.shape[-2:]
    patch = model.config.patch_size if hasattr(model, "config") else model.patch_embed.patch_size
    down, right = (patch, patch) if isinstance(patch, int) else patch
    return rows // down, columns // right


def told_grid(model: Any, inputs: Mapping[str, Any], call: Mapping[str, Any], hidden: Tensor) -> Grid | None:
    """The grid that the model hands to its blocks, if it does (Swin, SegFormer). Text has none."""
    told = call.get("input_dimensions") or call.get("feat_size") or (call.get("height"), call.get("width"))
    rows, columns = told
    return (rows, columns) if isinstance(rows, int) and isinstance(columns, int) else None


def fits(grid: Grid | None, tokens: int) -> TypeGuard[Grid]:
    """Whether a grid is that of so many tokens, with few before it. A block may be told the grid of its input alone."""
    return grid is not None and 0 <= tokens - grid[0] * grid[1] <= MOST_PREFIX


def counted_grid(image: tuple[int, int], tokens: int) -> Grid:
    """The grid of so many tokens whose shape is nearest to the image's. Sides of an image are divided by one stride."""
    return min(_grids(tokens), key=lambda grid: _unlike(image, grid))


def counted_prefix(image: tuple[int, int], tokens: int) -> int:
    """How many tokens stand before the grid: the smallest number that leaves a grid most like the image."""
    counts = range(min(MOST_PREFIX + 1, tokens))
    return min(counts, key=lambda count: round(_unlike(image, counted_grid(image, tokens - count)), 6))


def _grids(tokens: int) -> list[Grid]:
    return [(rows, tokens // rows) for rows in range(1, tokens + 1) if tokens % rows == 0]


def _unlike(image: tuple[int, int], grid: Grid) -> float:
    """By which factor a grid is longer than the image, or wider, as a logarithm."""
    return abs(math.log(image[0] * grid[1] / (image[1] * grid[0])))
