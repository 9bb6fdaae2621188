"""Where a step's memory goes, as bars."""

from __future__ import annotations

import re

import altair as alt

from sidestep.report.chart import ABOUT, Figure, Rows, about
from sidestep.report.looks import Look
from sidestep.report.rows import Group, Row
from sidestep.report.tables import MIB

BAR = 26  # pixels from a bar to the next
#: The first pattern that a module's dotted name matches says what its kept tensors are counted as.
MODULE_GROUPS: tuple[tuple[str, str], ...] = (
    (r"^side\b|(^|\.)lora_|(^|\.)ia3_", "the method"),
    (r"^head\b", "head"),
    (r"(?i)norm|(^|\.)ln_?\w*$|dropout|drop_?path", "norms, dropout"),
    (r"(?i)embed", "embeddings"),
    (r"(?i)attention|attn|\.(q|k|v|o|query|key|value)(_proj)?$", "attention"),
    (r"(?i)mlp|intermediate|ffn|feed_?forward|dense|\bfc\d?\b|act_fn|\bw[io]_?\d?$", "MLP"),
    (r"\.(\d+|\*)$", "whole blocks"),
)


def memory_parts(row: Row) -> dict[str, float]:
    """Bytes of each part of a step's memory.

    "temporaries" are what of the measured peak is neither kept for backward nor gradients nor optimizer state. The
    parts may add up to more than the peak: gradients take the place of kept tensors as backward goes on.
    """
    parts = {
        "weights": row.measured("model_bytes"),
        "gradients": row.measured("gradient_bytes"),
        "optimizer state": row.measured("optimizer_bytes"),
    }
    found = {name: float(value) for name, value in parts.items() if value}
    kept = row.measured("kept_bytes") or 0
    by_module = row.measured("kept_by_module") or {}
    for module, size in by_module.items():
        part = f"kept: {module_group(module)}"
        found[part] = found.get(part, 0.0) + size
    rest = kept - sum(by_module.values())
    if rest > 0:
        found["kept: other"] = found.get("kept: other", 0.0) + rest
    if row.peak is not None:
        over = row.peak - kept - found.get("gradients", 0) - found.get("optimizer state", 0)
        found |= {"temporaries": over} if over > 0 else {}
    return found


def module_group(module: str) -> str:
    """What the tensors that a module keeps are counted as."""
    return next((group for pattern, group in MODULE_GROUPS if re.search(pattern, module)), "other")


def memory_figure(group: Group) -> Figure | None:
    """A bar a contender, from the weights up, with the measured peak; None if no bytes were counted."""
    rows: Rows = []
    peaks: Rows = []
    for row in group.rows:
        parts = memory_parts(row)
        if row.measured("kept_bytes") is None:
            continue
        rows += [{**about(row), "part": part, "MiB": size / MIB} for part, size in parts.items()]
        if row.peak is not None:
            peaks.append({**about(row), "MiB": (row.peak + (row.measured("model_bytes") or 0)) / MIB})
    if not rows:
        return None
    present = {row["part"] for row in rows}

    def draw(look: Look) -> alt.LayerChart:
        names = [name for name in look.parts if name in present]
        legend = alt.Legend(title=None, orient="bottom", columns=4, symbolType="square") if look.legend else None
        order = list(dict.fromkeys(row["contender"] for row in rows))
        y = alt.Y("contender:N", sort=order, title=None, axis=alt.Axis(domain=False, ticks=False, labelPadding=6))
        bars = (
            alt.Chart(alt.Data(values=[{**row, "place": names.index(row["part"])} for row in rows]))
            .mark_bar(height={"band": 0.72})
            .encode(
                x=alt.X("MiB:Q", stack="zero", title="MiB", axis=alt.Axis(tickCount=5)),
                y=y,
                color=alt.Color(
                    "part:N",
                    scale=alt.Scale(domain=names, range=[look.parts[name] for name in names]),
                    legend=legend,
                ),
                order=alt.Order("place:Q"),
                tooltip=["contender:N", "part:N", alt.Tooltip("MiB:Q", format=",.4~r")],
            )
        )
        if not peaks:
            return alt.layer(bars).properties(width=look.width, height=BAR * len(order))
        ticks = (
            alt.Chart(alt.Data(values=peaks))
            .mark_tick(color=look.inks["ink"], thickness=2, height={"band": 0.95})
            .encode(x="MiB:Q", y=y, tooltip=["contender:N", alt.Tooltip("MiB:Q", title="peak, MiB", format=",.4~r")])
        )
        return alt.layer(bars, ticks).properties(width=look.width, height=BAR * len(order))

    return Figure(
        name="memory",
        kind="memory",
        group=group,
        title="Where memory goes",
        rows=rows + [{**row, "part": "measured peak, weights included"} for row in peaks],
        columns={**ABOUT, "part": "part", "MiB": "MiB"},
        draw=draw,
    )
