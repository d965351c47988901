"""Helpers for error messages and warnings."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from typing import Any

#: Name of this package.
PACKAGE = __name__.partition(".")[0]

#: As many names as a message holds.
FEW = 6

#: As many characters as a message holds of what a thing looks like.
FEW_CHARACTERS = 80


def some(names: Iterable[str]) -> str:
    """The first names of many: ``a, b, c, d, e, f, …``."""
    known = list(names)
    return ", ".join(known[:FEW]) + (", …" if len(known) > FEW else "")


def number_of(count: int, noun: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def instead_of(name: str, known: Iterable[str], there: str = "There are") -> str:
    """Hint for an unknown name: similar names, or else some of the known ones."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"Did you mean {', '.join(map(repr, near))}?" if near else f"{there} {some(names)}."


def given(value: Any) -> str:
    """Describe a value that was given: ``'a'``, ``Tensor of shape (8, 3)``, ``[1, 2, 3, …``."""
    if isinstance(shape := getattr(value, "shape", None), tuple):
        return f"{type(value).__name__} of shape {tuple(shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= FEW_CHARACTERS else text[:FEW_CHARACTERS] + "…"


def check_int(argument: str, value: Any, least: int = 1) -> int:
    """Return an int of at least ``least``; a ValueError for anything else."""
    if not isinstance(value, int) or value < least:
        raise ValueError(f"Expected argument `{argument}` to be an int of at least {least}, but got {value!r}.")
    return value


def level_of_user() -> int:
    """The ``stacklevel`` with which a warning of the caller names the first line outside of the package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == PACKAGE:
        frame, level = frame.f_back, level + 1
    return level
