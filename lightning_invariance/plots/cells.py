"""Images of cells, one colour each."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize
from matplotlib.image import AxesImage
from matplotlib.transforms import Affine2D, Bbox


class Cells(AxesImage):
    """An image of cells with sharp edges; matplotlib finds their colours for each pixel, and resamples in floats."""

    def make_image(self, renderer: Any, magnification: float = 1.0, unsampled: bool = False) -> Any:
        """The pixels, where their lower left corner is, and how they are yet to be transformed."""
        left, right, bottom, top = self.get_extent()
        corners = self.get_transform().transform([(left, bottom), (right, top)])
        box = Bbox(np.round(corners * magnification))
        values = self.get_array()
        if values is None or unsampled or not np.allclose(corners, self.axes.bbox.get_points()):
            return super().make_image(renderer, magnification, unsampled)  # as when a user has enlarged a part
        cells = self.to_rgba(values, bytes=True)
        places = [
            ((np.arange(pixels) + 0.5) * count / pixels).astype(int)
            for pixels, count in ((box.height, len(cells)), (box.width, cells.shape[1]))
        ]
        # The lowest row is the first.
        return cells[places[0][::-1, None], places[1]], box.x0 / magnification, box.y0 / magnification, Affine2D()


def show_cells(
    axes: Axes,
    values: npt.NDArray[Any],
    scale: Normalize,
    shades: Colormap,
    place: tuple[float, float, float, float] | None = None,
) -> None:
    """Show values as cells, the first row on top.

    Args:
        axes: where.
        values: rows × columns.
        scale: of the colours.
        shades: the colours.
        place: the left, right, lower and upper end; by default a cell for each number.
    """
    image = Cells(axes, cmap=shades, norm=scale, interpolation="nearest", origin="upper", extent=place)
    image.set_data(values)
    image.set_clip_path(axes.patch)
    image.set_extent(image.get_extent())
    axes.add_image(image)
