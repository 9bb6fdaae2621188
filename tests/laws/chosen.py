"""Which cases of a law `make test` runs: each method on a third of its families, and another third for each law."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from zlib import crc32

from tiny import FAMILIES

Case = tuple[str, ...]
"""A method, a family, and what else varies."""

QUICK = ("read", "side_attention")
"""Methods of which `make test` runs one on each of the further families."""


def chosen(cases: Sequence[Case], law: str) -> set[Case]:
    """Those of a law's cases that `make test` runs. `make laws-all` runs all.

    Of the main families every method has a third, and every family some method. Of the further ones each is read by one
    of `QUICK`. Which ones depends on the law's name, so that over all laws nearly every pair is run.
    """
    turn, found = crc32(law.encode()), set[Case]()
    main = [case for case in cases if case[1] in FAMILIES]
    groups = defaultdict[Case, list[Case]](list)
    for case in main:
        groups[case[:1] + case[2:]].append(case)
    for number, group in enumerate(groups.values()):
        found.update(group[(turn + number) % min(3, len(group)) :: 3])
    for number, family in enumerate(dict.fromkeys(case[1] for case in cases)):
        if not any(case[1] == family for case in found):
            own = [case for case in cases if case[1] == family and (family in FAMILIES or case[0] in QUICK)]
            found.update(own[(turn + number) % len(own) :][:1] if own else ())
    return found
