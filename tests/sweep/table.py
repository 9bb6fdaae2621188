"""The section of docs/backbones.md that says what the sweep found, made from its results."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from sweep.behaviour import LAWS
from sweep.catalogue import GROUPS
from sweep.records import OWN, Record

PAGE = Path(__file__).parents[2] / "docs" / "backbones.md"
BEGIN = "<!-- every type: made by `python tests/every_type.py --table` -->"
END = "<!-- end of every type -->"
WORST_FIRST = ("wrong", "fails", "refused", "works")
SHOWN = ("works", "refused", "fails", "wrong")
REASONS = (
    r"cannot be folded over: (.*?)\. Sidestep needs",
    r"(several towers of blocks)",
    r"(holds no list of repeated blocks)",
    r"a \w+ head does not work on \w+: it (.*?)\. Train",
    r"does not work on \w+: (.*)",
)
"""Where the reason stands in a message."""


def write_section(records: Mapping[str, Record]) -> None:
    """Put the section into the page, between its marks."""
    PAGE.write_text(with_section(PAGE.read_text(encoding="utf-8"), records), encoding="utf-8")


def with_section(page: str, records: Mapping[str, Record]) -> str:
    """The page with the section made of these results."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{section(records)}\n{END}{rest.split(END)[1]}"


def section(records: Mapping[str, Record]) -> str:
    """Verdicts by group, laws that are kept, what works on each type, and reasons of refusals."""
    built = [record for record in records.values() if record.get("model")]
    if not built:
        return "There are no results yet.\n"
    names = sorted({method for record in built for method in verdicts(record)}, key=_order)
    parts = [
        _dates(built),
        _table(["models", "types", "method", "works", "refused", "fails", "wrong"], _by_group(built, names)),
        "What each bare model does, and how many types do it with the method attached:\n",
        _table(["law", "method", "kept", "refused", "broken"], _by_law(built, names)),
        "Which methods work on which types:\n",
        _table(["methods that work", "types"], _by_methods(built, names)),
        "What does not work, and why:\n",
        _table(["verdict", "reason", "methods", "types"], _by_reason(built)),
        _unbuilt(records.values()),
    ]
    return "\n".join(part for part in parts if part)


def verdicts(record: Record) -> dict[str, str]:
    """Of each method on a type, the worse of the verdicts with a Sidestep head and with the model's own."""
    found: dict[str, str] = {}
    for name, result in record["methods"].items():
        method = name.removesuffix(OWN)
        found[method] = min(found.get(method, "works"), result["verdict"], key=WORST_FIRST.index)
    return found


def _dates(built: list[Record]) -> str:
    last = max(built, key=lambda record: str(record["date"]))
    return (
        f"{len(built)} types could be built (transformers {last['transformers']}, timm {last['timm']}, torch "
        f"{last['torch'].partition('+')[0]}, CPU, {last['date']}).\n"
    )


def _by_group(built: list[Record], names: list[str]) -> Iterator[list[str]]:
    groups = [*((title, [r for r in built if r["group"] == group]) for group, title in GROUPS.items()), ("all", built)]
    for title, records in groups:
        for name in names:
            count = Counter(found[name] for record in records if name in (found := verdicts(record)))
            if total := count.total():
                works = f"{100 * count['works'] / total:.0f}%"
                yield [title, str(total), _title(name), works, *(str(count[verdict]) for verdict in SHOWN[1:])]


def _by_law(built: list[Record], names: list[str]) -> Iterator[list[str]]:
    for law in LAWS:
        for name in names:
            count: Counter[str] = Counter()
            for record in built:
                found = [record["methods"].get(key, {}).get("laws", {}).get(law) for key in (name, name + OWN)]
                if any(found):
                    count[
                        min((_kind(result) for result in found if result), key=("broken", "refused", "kept").index)
                    ] += 1
            if count:
                yield [law, _title(name), *(str(count[kind]) for kind in ("kept", "refused", "broken"))]


def _kind(result: str) -> str:
    return result if result == "kept" else "refused" if result.startswith("refused") else "broken"


def _by_methods(built: list[Record], names: list[str]) -> Iterator[list[str]]:
    by_methods: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for record in built:
        found = verdicts(record)
        by_methods[tuple(name for name in names if found.get(name) == "works")].append(record["type"])
    for working, types in sorted(by_methods.items(), key=lambda item: (-len(item[0]), -len(item[1]))):
        yield [", ".join(map(_title, working)) or "none", _listed(types)]


def _by_reason(built: list[Record]) -> Iterator[list[str]]:
    """Rows of types that the same methods do not work on, for the same reason."""
    of_types: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for record in built:
        for name, result in record["methods"].items():
            if (verdict := result["verdict"]) != "works":
                of_types[verdict, reason(result["why"]), record["type"]].add(name.removesuffix(OWN))
    rows: dict[tuple[str, str, tuple[str, ...]], list[str]] = defaultdict(list)
    for (verdict, why, name), found in of_types.items():
        rows[verdict, why, tuple(sorted(found, key=_order))].append(name)
    for (verdict, why, tried), names in sorted(rows.items(), key=lambda row: (SHOWN.index(row[0][0]), -len(row[1]))):
        yield [verdict, why, ", ".join(map(_title, tried)), _listed(names)]


def reason(message: str) -> str:
    """What a message says, without the names and numbers of one model."""
    why = next((match[1] for pattern in REASONS if (match := re.search(pattern, message))), message)
    why = re.sub(r"\b(?=[a-z_.\d]*\d)[a-z_]+(\.\w+)+", "...", why)  # the names of blocks
    why = re.sub(r"\b[A-Z]\w+(Model|ForConditionalGeneration|Encoder|Decoder)\b", "the model", why)
    return re.sub(r"\d+(\.\d+)?", "n", why).replace("|", "\\|")


def _unbuilt(records: Iterable[Record]) -> str:
    names = [record["type"] for record in records if "unbuildable" in record]
    if not names:
        return ""
    return f"| not built, or took none of the batches | types |\n|---:|---|\n| {len(names)} | {_listed(names)} |\n"


def _listed(names: list[str]) -> str:
    return ", ".join(sorted(names))


def _table(titles: list[str], rows: Iterable[list[str]]) -> str:
    lines = [f"| {' | '.join(line)} |\n" for line in (titles, *rows)]
    return "".join([lines[0], "|---" * len(titles), "|\n", *lines[1:]])


def _order(name: str) -> tuple[bool, str]:
    return name != "read", name


def _title(name: str) -> str:
    return f"`{name}`"
