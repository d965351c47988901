"""Draw a result with a function of ``lightning_invariance.plots``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def drawn(function: str, *args: Any) -> Figure:
    """Call a function of ``lightning_invariance.plots``, which is found by name: plots know results, not the reverse.

    Args:
        function: its name, such as ``"heatmap"`` or ``"comparison.draw_comparison"``.
        args: its arguments.
    """
    module, _, name = f"lightning_invariance.plots.{function}".rpartition(".")
    figure: Figure = getattr(import_module(module), name)(*args)
    return figure
