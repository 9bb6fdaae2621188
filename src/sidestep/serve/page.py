"""The page of a server: one HTML file that asks no other place for anything, and the policy that holds it to that."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@cache
def page() -> str:
    """The page's HTML."""
    return (files("sidestep.serve") / "page.html").read_text(encoding="utf-8")


@cache
def page_headers() -> dict[str, str]:
    """Headers to send it with. The policy allows the page's own script and style, which it names by their hashes."""
    hashes = {name: _hash(_content(name)) for name in ("script", "style")}
    return {
        "content-security-policy": POLICY.format_map(hashes),
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }


def _content(name: str) -> str:
    found = re.findall(f"<{name}>(.*?)</{name}>", page(), re.DOTALL)
    assert len(found) == 1, f"the page has {len(found)} elements {name}"
    return found[0]


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
