"""Draw the idea of Sidestep as docs/idea.svg: `python docs/drawing.py`. Needs the standard library alone."""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 840, 488
TITLE = "A frozen Transformer with a small side network beside it"
DESCRIPTION = (
    "Left: a frozen Transformer with five blocks from embeddings at the bottom to the final norm at the top. "
    "A tap leads from the output of each block to a step of a narrow side network on the right. "
    "The side network writes its correction into the frozen model's last hidden state. "
    "This first write is the border. Nothing inside the blocks below it is kept for a backward pass. "
    "Above the border are the final norm and a head, which gives the answer. "
    "The backward pass goes from the head into the side network alone, never into the frozen blocks."
)
# Colours are classes, so that a dark page only changes this sheet. Without such a page's wish the light ones hold.
STYLE = """
text { font: 15px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", Arial, sans-serif; fill: #1f2328; }
.small { font-size: 13px; fill: #59636e; }
.strong { font-weight: 600; }
.frozen { fill: #e7eaee; stroke: #818b98; stroke-width: 1.5; }
.tuned { fill: #d9ead9; stroke: #1a7f37; stroke-width: 2; }
.forward { stroke: #59636e; stroke-width: 2; fill: none; }
.side { stroke: #1a7f37; stroke-width: 2; fill: none; }
.back { stroke: #b35900; stroke-width: 2; fill: none; stroke-dasharray: 6 4; }
.border { stroke: #0969da; stroke-width: 2; stroke-dasharray: 2 4; }
.head-forward { fill: #59636e; } .head-side { fill: #1a7f37; } .head-back { fill: #b35900; }
.border-text { fill: #0969da; } .back-text { fill: #b35900; } .side-text { fill: #1a7f37; }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc; }
  .small { fill: #b1bac4; }
  .frozen { fill: #2a313c; stroke: #9198a1; }
  .tuned { fill: #12361d; stroke: #3fb950; }
  .forward { stroke: #b1bac4; }
  .side { stroke: #3fb950; }
  .back { stroke: #f0a04b; }
  .border { stroke: #58a6ff; }
  .head-forward { fill: #b1bac4; } .head-side { fill: #3fb950; } .head-back { fill: #f0a04b; }
  .border-text { fill: #58a6ff; } .back-text { fill: #f0a04b; } .side-text { fill: #3fb950; }
}
"""


def box(kind: str, x: float, y: float, width: float, height: float, label: str) -> str:
    """A box with its label in the middle; x and y are its upper left corner."""
    return (
        f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>'
        f'<text x="{x + width / 2}" y="{y + height / 2 + 5}" text-anchor="middle">{escape(label)}</text>'
    )


def arrow(kind: str, *points: tuple[float, float]) -> str:
    """A line through the points with a head at the last one."""
    line = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline class="{kind}" points="{line}" marker-end="url(#{kind})"/>'


def note(x: float, y: float, label: str, kind: str = "small", anchor: str = "start") -> str:
    """One line of text."""
    return f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(label)}</text>'


def head(kind: str) -> str:
    """The arrow head of a kind of line."""
    return (
        f'<marker id="{kind}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" '
        f'markerUnits="userSpaceOnUse" orient="auto"><path class="head-{kind}" d="M0,0 L10,5 L0,10 z"/></marker>'
    )


def drawing() -> str:
    """The whole picture as SVG."""
    left, wide, tall = 250, 190, 38  # the frozen stack
    side, narrow = 560, 110  # the side network
    middle, column = left + wide / 2, side + narrow / 2
    rows = [400 - 58 * i for i in range(5)]  # the upper edges of the blocks, from the first one on
    border, norm, answer = 142, 74, 14
    parts = [note(middle, 472, "text or image", "small", "middle"), arrow("forward", (middle, 457), (middle, 440))]
    for i, y in enumerate(rows):
        parts += [box("frozen", left, y, wide, tall, f"block {i + 1}")]
        centre = y + tall / 2
        parts += [arrow("side", (left + wide, centre), (side, centre))]
        parts += [box("tuned", side, y, narrow, tall, f"step {i + 1}")]
        if i + 1 < len(rows):
            parts += [arrow("forward", (middle, y), (middle, y - 20)), arrow("side", (column, y), (column, y - 20))]
            parts += [arrow("back", (column + 25, y - 20), (column + 25, y))]
    top = rows[-1]
    # the first write
    parts += [
        f'<circle class="tuned" cx="{middle}" cy="{border}" r="11"/>',
        f'<path class="side" d="M{middle - 6},{border} h12 M{middle},{border - 6} v12"/>',
        arrow("forward", (middle, top), (middle, border + 11)),
        arrow("side", (column, top), (column, border), (middle + 11, border)),
        arrow("back", (middle + 24, border - 10), (column + 25, border - 10), (column + 25, top)),
        f'<line class="border" x1="20" y1="{border}" x2="{middle - 11}" y2="{border}"/>',
        arrow("forward", (middle, border - 11), (middle, norm + 36)),
        box("frozen", left, norm, wide, 36, "final norm"),
        arrow("forward", (middle, norm), (middle, answer + 36)),
        box("tuned", left, answer, wide, 36, "head"),
        arrow("forward", (left + wide, answer + 12), (side, answer + 12)),
        note(side + 8, answer + 23, "answer and loss", "small"),
        arrow("back", (side, answer + 28), (left + wide, answer + 28)),
        arrow("back", (middle + 24, norm + 36), (middle + 24, border - 10)),
        arrow("back", (middle + 24, answer + 36), (middle + 24, norm)),
    ]
    # what the parts are called
    parts += [
        note(20, border - 12, "border = first write", "border-text strong"),
        note(20, border + 40, "Below the border:", "strong"),
        note(20, border + 62, "the frozen stack runs forward.", "small"),
        note(20, border + 82, "Nothing inside its blocks", "small"),
        note(20, border + 102, "is kept for a backward pass.", "small"),
        note(20, border + 132, "A tap keeps its block's output.", "small"),
        note(left + wide + 60, 392, "taps", "side-text strong", "middle"),
        note(side + narrow + 20, 250, "side network", "side-text strong"),
        note(side + narrow + 20, 272, "narrow, trained", "small"),
        note(side + narrow + 20, border + 5, "backward pass", "back-text strong"),
        note(20, 472, "grey: frozen, never trained", "small"),
        note(side - 60, 472, "green: trained, stored in the task folder", "small"),
    ]
    markers = "".join(head(kind) for kind in ("forward", "side", "back"))
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" aria-labelledby="idea-title idea-description">',
        f'<title id="idea-title">{escape(TITLE)}</title>',
        f'<desc id="idea-description">{escape(DESCRIPTION)}</desc>',
        f"<style>{STYLE}</style>",
        f"<defs>{markers}</defs>",
        *parts,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("idea.svg").write_text(drawing(), encoding="utf-8")
