"""A figure that is quick to draw again, and the tiles of which stored pictures are made.

How it is quick. The figure is created once. What `frame` draws (axes, labels, guides) becomes a background
bitmap; each step restores the bitmap, throws the previous step's artists away, calls `draw` and paints only
what `draw` added. A step costs about 15–25 ms instead of the 130 ms of ``interact`` with ``plt.show``. When
`draw` changes the axes themselves (limits, ticks, labels) the background is painted anew: slower, still right.
Changing what `frame` drew does not work, and is found when the widget is driven.
"""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rcParams
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from helpers.teaching.figures import render, require_finite

Draw = Callable[..., str | None]

# What `draw` may change of a panel: put back before each step, and baked into the background.
_SETTINGS = ("xscale", "yscale", "xlabel", "ylabel", "facecolor", "aspect")
_MATH = re.compile(r"\$[^$]*\$")  # must not be broken into lines


class Scene:
    """A figure whose changing part can be drawn again quickly."""

    def __init__(
        self,
        draw: Draw,
        frame: Callable[..., None] | None,
        panels: tuple[int, int],
        size: tuple[float, float],
        places: Sequence[Bbox] = (),
    ) -> None:
        self._draw = draw
        self.figure = Figure(figsize=size, layout="constrained")  # unknown to pyplot: never shown twice, never leaks
        self._canvas = FigureCanvasAgg(self.figure)
        self._axes = self.figure.subplots(*panels)
        if frame is not None:
            frame(self._axes)
        self._all_axes = list(self.figure.axes)
        require_finite(list(self._artists()))
        self._fixed = {id(artist) for artist in self._artists()}
        self._resting = [_AxesState(axes) for axes in self._all_axes]
        self._background: Any = None
        self._background_look: Any = None
        if places:
            self.figure.set_layout_engine("none")
            for axes, place in zip(self._all_axes, places, strict=True):
                axes.set_position(place)

    @property
    def places(self) -> list[Bbox]:
        """Where the axes stand on the figure, once the layout is solved."""
        return [axes.get_position(original=True) for axes in self._all_axes]

    def step(self, values: Mapping[str, Any]) -> tuple[np.ndarray, str]:
        """Draw the picture at `values`. Returns pixels of shape (height, width, 3) and the caption."""
        self._clear()
        caption = self._draw(self._axes, **values) or ""
        if not isinstance(caption, str):
            raise TypeError(f"draw returned a {type(caption).__name__}; it may return a line of text or nothing")
        if re.search(r"(?<![\w-])[-+]?(nan|inf)(?![\w-])", caption):
            raise ValueError(f"the text below the picture holds a value that is not finite: {caption}")
        if self.figure.axes != self._all_axes:
            raise ValueError("draw adds axes (a colorbar, a twin); make them in frame, once")
        moving = [artist for artist in self._artists() if id(artist) not in self._fixed]
        require_finite(moving)
        for axes in self._all_axes:  # titles change often, and what is drawn must not cover the frame's lines
            moving += [axes.title, axes._left_title, axes._right_title, *axes.spines.values()]
        look = [_look(axes) for axes in self._all_axes]
        if self._background is None or look != self._background_look:
            self._paint_background(moving)
            self._background_look = look
        self._canvas.restore_region(self._background)
        for artist in sorted(moving, key=lambda artist: artist.get_zorder()):
            self.figure.draw_artist(artist)
        return np.asarray(self._canvas.buffer_rgba())[..., :3].copy(), caption

    def _paint_background(self, moving: Sequence[Artist]) -> None:
        engine = self.figure.get_layout_engine()
        if engine is not None and self._background is None:  # solve the layout once, with everything in place
            engine.execute(self.figure)
            self.figure.set_layout_engine("none")
        for artist in moving:
            artist.set_animated(True)
        self._canvas.draw()
        self._background = self._canvas.copy_from_bbox(self.figure.bbox)

    def _artists(self) -> Iterator[Artist]:
        figure = self.figure
        on_figure = (figure.texts, figure.lines, figure.patches, figure.artists, figure.images, figure.legends)
        yield from itertools.chain(*on_figure, *(axes.get_children() for axes in self._all_axes))

    def _clear(self) -> None:
        for artist in list(self._artists()):
            if id(artist) not in self._fixed:
                artist.remove()
        for axes, state in zip(self._all_axes, self._resting, strict=True):
            state.restore(axes)


class _AxesState:
    """What `frame` left of one panel, apart from its artists, so that no step builds on the step before."""

    def __init__(self, axes: Axes) -> None:
        self._limits = axes.dataLim.frozen()
        self._ignore_limits = axes.ignore_existing_data_limits
        self._titles = {side: axes.get_title(side) for side in ("left", "center", "right")}
        self._containers = len(axes.containers)
        self._settings = {name: getattr(axes, f"get_{name}")() for name in _SETTINGS}
        self._view = (*axes.get_xlim(), *axes.get_ylim(), axes.get_autoscalex_on(), axes.get_autoscaley_on())
        # Tick locators and formatters belong to the scale: keep the objects, as setting a scale replaces them.
        self._ticks = [
            (kind, getattr(axis, f"get_{level}_{kind}")(), level, name)
            for name, axis in (("xaxis", axes.xaxis), ("yaxis", axes.yaxis))
            for level in ("major", "minor")
            for kind in ("locator", "formatter")
        ]

    def restore(self, axes: Axes) -> None:
        """Put `axes` back into this state."""
        changed = {k: v for k, v in self._settings.items() if getattr(axes, f"get_{k}")() != v}
        for scale in ("xscale", "yscale"):  # first: it resets the limits and the ticks
            if scale in changed:
                getattr(axes, f"set_{scale}")(changed.pop(scale))
        if changed:
            axes.set(**changed)
        for kind, ticks, level, name in self._ticks:
            axis = getattr(axes, name)
            if getattr(axis, f"get_{level}_{kind}")() is not ticks:
                getattr(axis, f"set_{level}_{kind}")(ticks)
        left, right, bottom, top, autoscale_x, autoscale_y = self._view
        axes.set_xlim(left, right, auto=autoscale_x)
        axes.set_ylim(bottom, top, auto=autoscale_y)
        axes.dataLim.set(self._limits)
        axes.ignore_existing_data_limits = self._ignore_limits
        del axes.containers[self._containers :]
        axes.set_prop_cycle(None)  # else the first curve would change its colour from step to step
        for side, title in self._titles.items():
            axes.set_title(title, loc=side)


def _look(axes: Axes) -> tuple:
    """Everything about the axes that is baked into the background and that `draw` might change."""
    ticks = [
        (
            *axis.get_ticklocs(),
            None,
            *axis.get_ticklocs(minor=True),
            axis.get_major_formatter(),
            axis.get_minor_formatter(),
        )
        for axis in (axes.xaxis, axes.yaxis)
    ]
    settings = [getattr(axes, f"get_{name}")() for name in _SETTINGS]
    return *axes.get_xlim(), *axes.get_ylim(), *settings, axes.get_visible(), axes.axison, *ticks


def with_text(pixels: np.ndarray, heading: str, caption: str) -> np.ndarray:
    """Put `heading` above and `caption` below a picture."""
    width = pixels.shape[1]
    size, dpi = rcParams["font.size"], rcParams["figure.dpi"]
    strips = [pixels]
    for text, weight in ((heading, "bold"), (caption, "normal")):
        if text:
            lines = textwrap.wrap(_MATH.sub(lambda m: m[0].replace(" ", "\0"), text), int(128 * width / dpi / size))
            strip = Figure(figsize=(width / dpi, 0.06 + 0.018 * size * len(lines)))
            strip.text(0.01, 0.5, "\n".join(lines).replace("\0", " "), va="center", weight=weight)
            strips.insert(0 if weight == "bold" else len(strips), _fit(render(strip), width))
    return np.concatenate(strips)


def _fit(pixels: np.ndarray, width: int) -> np.ndarray:
    """Crop or pad with white on the right to exactly `width` columns."""
    fitted = np.full((pixels.shape[0], width, 3), 255, np.uint8)
    fitted[:, : pixels.shape[1]] = pixels[:, :width]
    return fitted


def tile(tiles: Sequence[np.ndarray], across: int) -> np.ndarray:
    """Arrange pictures in rows of `across`."""
    height = max(tile.shape[0] for tile in tiles)
    even = [np.pad(t, ((0, height - t.shape[0]), (0, 0), (0, 0)), constant_values=255) for t in tiles]
    blank = np.full_like(even[0], 255)
    even += [blank] * (-len(even) % across)
    return np.concatenate([np.concatenate(even[i : i + across], axis=1) for i in range(0, len(even), across)])
