"""One look for all figures, pictures with a text for those who cannot see them, and PNG encoding."""

from __future__ import annotations

import base64
import io
import re
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import Collection, PathCollection
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.text import Text
from PIL import Image

# Okabe & Ito's palette, told apart with every common colour blindness. Yellow is left out: unreadable on white.
COLORS = {
    "blue": "#0072B2",
    "orange": "#D55E00",
    "green": "#009E73",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "amber": "#E69F00",
    "black": "#000000",
}
GREY = "#767676"  # for frames, guides and remarks: 4.5:1 on white

# Colour never carries a meaning alone: each one has its own line style.
_CYCLE = cycler(color=list(COLORS.values())) + cycler(linestyle=["-", "--", "-.", ":", "-", "--", "-."])


def set_style(*, lecture: bool = False) -> None:
    """Give every figure of this kernel the collection's look.

    Parameters
    ----------
    lecture
        True for a hall: larger letters and thicker lines. Run the notebook again after changing it.
    """
    size = 14 if lecture else 11
    mpl.rcParams.update(mpl.rcParamsDefault)
    mpl.rcParams.update(
        {
            "figure.figsize": (8.0, 3.4),
            "figure.dpi": 125 if lecture else 100,
            "figure.facecolor": "white",  # opaque: readable on a dark page too
            "figure.constrained_layout.use": True,
            "savefig.facecolor": "white",
            "font.size": size,
            "axes.titlesize": size + 1,
            "axes.titlelocation": "left",
            "axes.prop_cycle": _CYCLE,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.formatter.use_mathtext": True,
            "grid.color": "#E4E4E4",
            "grid.linewidth": 0.8,
            "legend.frameon": False,
            "lines.linewidth": 2.6 if lecture else 1.8,
            "image.cmap": "viridis",
        }
    )


def show(figure: Figure, alt: str) -> None:
    """Display `figure` as a PNG whose alternative text is `alt` followed by a description of what is drawn.

    Parameters
    ----------
    figure
        Any matplotlib figure. It is closed, so it is shown once.
    alt
        What a reader who cannot see the picture should take from it, in a sentence or two.

    Raises
    ------
    ValueError
        `alt` is hardly a description, or something is drawn at a value that is not finite.
    """
    if len(alt.split()) < 4:
        raise ValueError(f"alt={alt!r} does not describe the figure: say in a sentence what is to be seen")
    require_finite(figure.axes)
    plt.close(figure)
    text = f"{alt} {describe(figure)}"
    # The text is an output like any other: nbval compares it, and with it the range of every curve.
    bundle = {"image/png": base64.b64encode(encode_png(render(figure))).decode(), "text/plain": text}
    display(bundle, raw=True, metadata={"image/png": {"alt": text}})


def describe(figure: Figure) -> str:
    """Put into words what `figure` draws: for each panel its title, its axes and the range of each labelled curve."""
    panels = [axes for axes in figure.axes if axes.axison and axes.get_label() != "<colorbar>"]
    return " ".join(
        (f"Panel {i}: " if len(panels) > 1 else "") + _describe_axes(axes) for i, axes in enumerate(panels, 1)
    )


def _describe_axes(axes: Axes) -> str:
    title = axes.get_title("left") or axes.get_title("center")
    parts = [plain(title)] if title else []
    for name, label in (("horizontal", axes.get_xlabel()), ("vertical", axes.get_ylabel())):
        if label:
            parts.append(f"{name} axis {plain(label)}")
    curves = [line for line in axes.lines if not line.get_label().startswith("_")]
    for line in curves:
        y = np.ma.compressed(np.ma.masked_invalid(np.ma.asarray(_coordinates(line, 1), float)))
        if y.size:
            ends = f"ends at {y[-1]:.2g} and lies between {y.min():.2g} and {y.max():.2g}"
            parts.append(f"curve “{plain(line.get_label())}” {ends}")
    parts += [f"{len(c.patches)} bars" for c in axes.containers if isinstance(c, BarContainer)]
    parts += [f"{len(c.get_offsets())} points" for c in axes.collections if isinstance(c, PathCollection)]
    return "; ".join(parts) + "."


_TEX = {r"\alpha": "α", r"\beta": "β", r"\sigma": "σ", r"\eta": "η", r"\bar": "mean ", r"\sqrt": "√", r"\cdot": "·",
        r"\Delta": "Δ", r"\sum": "Σ", r"\to": "→", r"\infty": "∞", r"\log": "log ", r"\,": " ", r"\mathrm": "",
        r"\leq": "≤", r"\le": "≤", r"\geq": "≥", r"\ge": "≥", r"\ast": "*", r"\times": "×", r"\mid": "|"}  # fmt: skip


def plain(text: str) -> str:
    """Turn a label with mathtext into words that a screen reader can say."""
    for command, character in _TEX.items():
        text = re.sub(re.escape(command) + (r"(?![a-zA-Z])" if command[-1].isalpha() else ""), character, text)
    return re.sub(r"[${}\\]", "", text).replace("\n", " ")


def render(figure: Figure) -> np.ndarray:
    """Draw `figure` and return its pixels, shape (height, width, 3), dtype uint8."""
    canvas = figure.canvas if isinstance(figure.canvas, FigureCanvasAgg) else FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def encode_png(pixels: np.ndarray, *, compress_level: int = 9) -> bytes:
    """Encode pixels of shape (height, width, 3) as PNG; level 1 is fastest, 9 is smallest."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", compress_level=compress_level)
    return buffer.getvalue()


def require_finite(artists: list[Any]) -> None:
    """Raise ValueError when one of the `artists` was given a value that is not finite.

    A curve with NaN has a silent gap and one with infinity a silent spike: both look like data. A gap that is
    meant is declared with ``np.ma.fix_invalid``. (``masked_invalid`` does not do: matplotlib masks so by itself.)
    Not found: what matplotlib leaves out before it draws, as in ``fill_between``, ``contour`` and ``quiver``.
    """
    for artist in artists:
        if isinstance(artist, Axes):
            require_finite(artist.get_children())
        for values in _drawn_values(artist):
            if not np.isfinite(values).all():
                label = str(artist.get_label() or "")
                name = f"“{label}”" if label and not label.startswith("_") else f"a {type(artist).__name__}"
                raise ValueError(
                    f"the picture would hold a value that is not finite, in {name}; "
                    "if a gap is meant, pass np.ma.fix_invalid(values)"
                )


def _coordinates(line: Line2D, which: int) -> np.ndarray:
    """Return what the line was given, with its mask, or for categories and dates the numbers they became."""
    given = line.get_data(orig=True)[which]
    return given if np.ma.asarray(given).dtype.kind in "biuf" else line.get_data(orig=False)[which]


def _drawn_values(artist: Any) -> list[np.ndarray]:
    values = []
    if isinstance(artist, Line2D):
        values += (_coordinates(artist, which) for which in (0, 1))
    elif isinstance(artist, Text):
        values.append(artist.get_unitless_position())
    elif isinstance(artist, PathCollection):
        values.append(artist.get_offsets())
    elif isinstance(artist, Collection):  # filled areas, bundles of lines
        values += [path.vertices for path in artist.get_paths()]
    elif isinstance(artist, Rectangle):  # bars
        values.append([artist.get_x(), artist.get_y(), artist.get_width(), artist.get_height()])
    elif isinstance(artist, Patch):
        values.append(artist.get_path().vertices)
    if isinstance(artist, ScalarMappable) and artist.get_array() is not None:
        values.append(artist.get_array())
    return [np.asarray(np.ma.getdata(value), float) for value in values]
