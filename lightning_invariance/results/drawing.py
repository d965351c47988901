"""Draw a result with a function of ``lightning_invariance.plots``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def drawn(module: str, function: str, *args: Any) -> Figure:
    """Call a function of a module of ``lightning_invariance.plots``, found by name: pictures know results."""
    figure: Figure = getattr(import_module(f"lightning_invariance.plots.{module}"), function)(*args)
    return figure
