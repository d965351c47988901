"""The size of texts, and a renderer that draws them fast."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.font_manager import FontProperties, findfont
from PIL import ImageFont

#: The height of a line of text, as a multiple of the size of its font.
LINE = 1.35

#: The sizes of fonts, in points: of most texts, of notes and of titles.
MEDIUM, SMALL, TITLE = 10.0, 8.33, 12.0

#: Pixels at which widths are measured, and how much wider the hinted letters of small sizes can be.
MEASURED, HINTING = 100, 1.06

#: Signs of Latin, Greek and Cyrillic letters, and those of punctuation, arrows and mathematics.
SIMPLE = (range(0x20, 0x530), range(0x2010, 0x2300))


@lru_cache(maxsize=64)
def _font(path: str, pixels: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, pixels, layout_engine=ImageFont.Layout.BASIC)


def inches_of(texts: Iterable[str], points: float = MEDIUM) -> float:
    """The width of the longest line of some texts, in inches."""
    font = _font(findfont(FontProperties()), MEASURED)
    lines = (line for text in texts for line in text.splitlines())
    return max(map(font.getlength, lines), default=0.0) / MEASURED * HINTING * points / 72


def fitting(text: str, inches: float, points: float = MEDIUM) -> float:
    """The size in points at which a text is not wider than this, and not larger than ``points``."""
    return min(points, points * inches / max(inches_of([text], points), 1e-6))


class QuickRenderer(RendererAgg):
    """Agg, with texts drawn by Pillow, a string at a time; matplotlib (3.11) draws each letter by itself.

    This takes a tenth of the time, and labels are most of what a picture of many layers consists of. Other texts than
    horizontal and vertical ones, formulas and scripts whose letters need more than to be put side by side are drawn by
    matplotlib.
    """

    def __init__(self, width: float, height: float, dpi: float) -> None:
        super().__init__(width, height, dpi)  # type: ignore[no-untyped-call]
        self._fonts: dict[FontProperties, ImageFont.FreeTypeFont] = {}

    def draw_text(
        self,
        gc: Any,
        x: float,
        y: float,
        s: str,
        prop: FontProperties,
        angle: float,
        ismath: Any = False,
        mtext: Any = None,
    ) -> None:
        """Draw a text whose baseline begins at ``x, y``, in pixels from the upper left corner."""
        if ismath or angle not in (0, 90) or not _is_simple(s):
            super().draw_text(gc, x, y, s, prop, angle, ismath, mtext)  # type: ignore[no-untyped-call]
            return
        mask, (left, top) = self._font_of(prop).getmask2(s, "L", anchor="ls")
        width, height = mask.size
        if not width * height:
            return
        letters = np.empty((height, width, 4), np.uint8)
        letters[..., :3] = [round(255 * value) for value in gc.get_rgb()[:3]]
        letters[..., 3] = np.array(mask, np.uint8).reshape(height, width)
        bottom = -top - height  # upwards from the baseline
        if angle == 90:
            letters, left, bottom = np.rot90(letters), top, left
        # Agg takes the lowest row first.
        place = round(x) + left, round(self.height - y) + bottom
        self.draw_image(gc, *place, np.ascontiguousarray(letters[::-1]))

    def get_text_width_height_descent(self, s: str, prop: FontProperties, ismath: Any) -> tuple[float, float, float]:
        """The size of a text in pixels, and how far it reaches below its baseline."""
        if ismath or not _is_simple(s):
            return super().get_text_width_height_descent(s, prop, ismath)  # type: ignore[no-any-return, no-untyped-call]
        font = self._font_of(prop)
        _, top, right, bottom = font.getbbox(s, anchor="ls")
        return right, bottom - top, bottom

    def _font_of(self, prop: FontProperties) -> ImageFont.FreeTypeFont:
        if prop not in self._fonts:
            self._fonts[prop] = _font(findfont(prop), max(1, round(prop.get_size_in_points() * self.dpi / 72)))
        return self._fonts[prop]


def _is_simple(text: str) -> bool:
    return text.isascii() or all(any(ord(sign) in part for part in SIMPLE) for sign in text)
