"""A few names of many, for messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

#: As many names as a message holds.
FEW = 6


def some(names: Iterable[str]) -> str:
    """The first names of many: ``a, b, c, d, e, f, …``."""
    known = list(names)
    return ", ".join(known[:FEW]) + (", …" if len(known) > FEW else "")


def instead_of(name: str, known: Iterable[str], there: str = "There are") -> str:
    """What to write instead of an unknown name: names like it, or else some of those there are."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"Did you mean {', '.join(map(repr, near))}?" if near else f"{there} {some(names)}."
