"""Size and speed of the sparse codec: bytes of positions over their bound, positions decoded a second on one core.

    python benchmarks/sparse_codec.py                     # synthetic supports of a million nonzeros, and small models
    python benchmarks/sparse_codec.py FILE.safetensors..  # diffs that hold what sidestep.sparse.codec.encode returned
    python benchmarks/sparse_codec.py table               # the table alone

Sizes include names, shapes and checksum. Decoding is all of `decode`, checksum and checks included, in the fastest of
five runs by processor time. Beside it is the time in which numpy copies as many int64 positions.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from sidestep.sparse.codec import POSITIONS, SparseTensor, decode, encode, position_bound
from study import Results

RESULTS = Results(Path(__file__).parent / "results" / "sparse_codec.jsonl")
DENSITIES = (1e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 5e-2, 0.2, 1.0)
NONZEROS, TENSORS, WIDTH = 1_000_000, 20, 768
SMALL_MODEL = 22_713_216  # parameters of the text encoder of the studies
Positions = NDArray[np.int64]


# --- supports of one tensor of (rows, WIDTH) ------------------------------------------------------------------


def uniform(random: np.random.Generator, numel: int, density: float) -> Positions:
    """Each entry with the same chance."""
    expected = int(numel * density)
    gaps = random.geometric(density, expected + 10 * int(expected**0.5) + 10)
    found = np.cumsum(gaps) - 1
    return found[found < numel]


def rows(random: np.random.Generator, numel: int, density: float) -> Positions:
    """Whole rows, as in an embedding of which few words occur."""
    touched = uniform(random, numel // WIDTH, density)
    return (touched[:, None] * WIDTH + np.arange(WIDTH)).reshape(-1)


def columns(random: np.random.Generator, numel: int, density: float) -> Positions:
    """The same columns in every row, each entry of them with a chance of one half (of one at density 1)."""
    chance = 1.0 if density == 1 else 0.5
    chosen = np.sort(random.choice(WIDTH, max(1, round(WIDTH * density / chance)), replace=False))
    found = (np.arange(numel // WIDTH)[:, None] * WIDTH + chosen).reshape(-1)
    return found[random.random(len(found)) < chance]


def patches(random: np.random.Generator, numel: int, density: float) -> Positions:
    """A density that changes every 4,096 entries by a lognormal factor of two."""
    local = np.minimum(1.0, density * random.lognormal(-0.24, 0.69, -(-numel // 4096)))
    count = random.binomial(4096, local)
    found = np.repeat(np.arange(len(local)) * 4096, count) + random.integers(0, 4096, int(count.sum()))
    return np.unique(found[found < numel])


def borders(random: np.random.Generator, numel: int, density: float) -> Positions:
    """Gaps of two kinds next to the borders of token classes, in a random mix of the wanted mean."""
    edges = np.array([0, 159, 200, 20_639, 86_000])
    mean = 1 / density - 1
    above = int(np.searchsorted(edges, mean))
    low, high = edges[max(0, above - 1)], edges[min(above, len(edges) - 1)]
    share = 0.0 if high == low else (mean - low) / (high - low)
    expected = int(numel * density)
    gaps = np.where(random.random(expected) < share, high, low) + random.integers(0, 2, expected)
    found = np.cumsum(gaps + 1) - 1
    return found[found < numel]


SUPPORTS: dict[str, Callable[[np.random.Generator, int, float], Positions]] = {
    "uniform": uniform,
    "patches": patches,
    "rows": rows,
    "columns": columns,
    "borders": borders,
}


def model(support: str, density: float, entries: int, tensors: int) -> dict[str, SparseTensor]:
    """Matrices of one size, and a bias for each. No dense tensor is made."""
    random = np.random.default_rng(0)
    height = max(1, entries // tensors // WIDTH)
    made: dict[str, SparseTensor] = {}
    for index in range(tensors):
        for kind, shape, draw in (
            ("weight", (height, WIDTH), SUPPORTS[support]),
            ("bias", (WIDTH,), uniform),
        ):
            found = torch.from_numpy(draw(random, shape[0] * (WIDTH if len(shape) == 2 else 1), density))
            name = f"encoder.layer.{index}.output.dense.{kind}"
            made[name] = SparseTensor(shape=shape, positions=found, values=torch.zeros(len(found)))
    return made


# --- measuring ---------------------------------------------------------------------------------------------


def measured(tensors: dict[str, SparseTensor]) -> dict[str, Any]:
    """Bytes and seconds of one diff with its values in bfloat16."""
    start = time.process_time()
    stored = encode(tensors, torch.bfloat16)
    encoding = time.process_time() - start
    nonzeros = sum(len(tensor.positions) for tensor in tensors.values())
    joined = np.zeros(nonzeros, np.int64)
    target = np.empty_like(joined)
    decoding, copying = (fastest(run) for run in (lambda: decode(stored), lambda: np.copyto(target, joined)))
    return {
        "nonzeros": nonzeros,
        "entries": sum(tensor.numel for tensor in tensors.values()),
        "position_bytes": len(stored[POSITIONS]),
        "bound_bytes": round(sum(position_bound(t.numel, len(t.positions)) for t in tensors.values())),
        "decode_ms": round(1e3 * decoding, 3),
        "copy_ms": round(1e3 * copying, 3),
        "encode_ms": round(1e3 * encoding, 1),
    }


def fastest(run: Callable[[], Any], repeats: int = 5) -> float:
    """Processor seconds of the fastest run."""
    found = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return min(found)


def synthetic() -> None:
    for support in SUPPORTS:
        for density in DENSITIES:
            RESULTS.once(
                lambda s=support, d=density: measured(model(s, d, int(NONZEROS / d), TENSORS)),
                support=support,
                density=density,
                model="a million nonzeros",
            )
    for density in (1e-3, 2.5e-3, 5e-3, 1e-2):
        RESULTS.once(
            lambda d=density: measured(model("uniform", d, SMALL_MODEL, 50)),
            support="uniform",
            density=density,
            model="22.7M entries, 100 tensors",
        )


def real(path: Path) -> None:
    """A diff from a file, by the checksum of its positions."""
    stored: dict[str, Tensor] = load_file(path)
    tensors = decode(stored)
    density = sum(len(t.positions) for t in tensors.values()) / sum(t.numel for t in tensors.values())
    digest = hashlib.sha256(stored[POSITIONS].numpy().data).hexdigest()[:16]
    RESULTS.once(
        lambda: measured(tensors), support=path.stem, density=float(f"{density:.3g}"), model="a file", sha256=digest
    )


def table() -> Iterator[str]:
    yield "| support | model | density | nonzeros | bits a position | over the bound | M positions/s | decode / copy |"
    yield "|---|---|---|---|---|---|---|---|"
    for line in RESULTS.lines:
        over = f"{line['position_bytes'] / line['bound_bytes']:.3f}" if line["bound_bytes"] else "bound is 0"
        cells = (
            line["support"],
            line["model"],
            f"{100 * line['density']:g} %",
            f"{line['nonzeros']:,}",
            f"{8 * line['position_bytes'] / line['nonzeros']:.2f}",
            over,
            f"{line['nonzeros'] / line['decode_ms'] / 1e3:.0f}",
            f"{line['decode_ms'] / line['copy_ms']:.1f}",
        )
        yield f"| {' | '.join(cells)} |"


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    if not arguments:
        synthetic()
    elif arguments != ["table"]:
        for path in arguments:
            real(Path(path))
    print("\n".join(table()))


if __name__ == "__main__":
    main(sys.argv[1:])
