"""`explore`: a picture that is drawn again whenever the reader moves a control.

How it is tested. With the environment variable ``DRIVE_WIDGETS=1`` every widget, when it is built, moves each
of its controls to the ends, the middle and every option, and each pair of controls to its corners, and raises
at the first setting that fails. So a notebook test fails at the cell of a broken widget.
"""

from __future__ import annotations

import base64
import builtins
import difflib
import html
import inspect
import itertools
import os
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets
import numpy as np
from IPython import get_ipython
from matplotlib.figure import Figure

from helpers.teaching.figures import describe, encode_png, plain
from helpers.teaching.scenes import Draw, Scene, tile, with_text

Control = ipywidgets.ValueWidget

#: Every widget of this kernel that is still alive, by the order in which they were built; the benchmark asks.
EXPLORERS: weakref.WeakValueDictionary[int, Explorer] = weakref.WeakValueDictionary()
_numbers = itertools.count()

_CONTROL_LAYOUT = {"width": "330px"}
_NATURAL_SIZE = {"max_width": "100%", "align_self": "flex-start"}  # stretched pixels would be blurred
_CONTROL_STYLE = {"description_width": "initial"}


class ExploreError(Exception):
    """A widget was put together wrongly, or its `draw` fails at some setting."""


def slider(
    low: float,
    high: float,
    value: float | None = None,
    *,
    step: float | None = None,
    label: str = "",
    log: bool = False,
) -> Control:
    """Build a slider.

    Parameters
    ----------
    low, high
        The ends. Two integers (and an integer `step`) make an integer slider.
    value
        Where it starts; the middle if not given.
    step
        Distance of two positions; 1 for integers, a hundredth of the range otherwise. Of the exponent if `log`.
    label
        What the reader sees, with its unit if it has one; the name of the argument if not given.
    log
        True for positions that are evenly spaced in the logarithm.
    """
    if not low < high:
        raise ValueError(f"slider: the low end {low} must lie below the high end {high}")
    if log and low <= 0:
        raise ValueError(f"slider: a logarithmic slider needs positive ends, got {low}")
    if value is not None and not low <= value <= high:
        raise ValueError(f"slider: the start {value} lies outside {low} … {high}")
    common = {"description": label, "layout": _CONTROL_LAYOUT, "style": _CONTROL_STYLE, "continuous_update": True}
    if log:
        low10, high10 = np.log10(low), np.log10(high)
        return ipywidgets.FloatLogSlider(
            value if value is not None else 10 ** ((low10 + high10) / 2),
            min=low10,
            max=high10,
            step=step or (high10 - low10) / 100,
            readout_format=".3g",
            **common,
        )
    if all(isinstance(number, int) for number in (low, high, value or 0, step or 1)):
        start = value if value is not None else (low + high) // 2
        return ipywidgets.IntSlider(start, min=low, max=high, step=step or 1, **common)
    step = step or (high - low) / 100
    decimals = max(0, int(np.ceil(-np.log10(step) - 1e-9)))
    return ipywidgets.FloatSlider(
        value if value is not None else (low + high) / 2,
        min=low,
        max=high,
        step=step,
        readout_format=f".{decimals}f",
        **common,
    )


def choice(
    options: Sequence[Any] | Mapping[str, Any], value: Any = None, *, label: str = "", ordered: bool = False
) -> Control:
    """Build a menu of `options`, or a slider over them.

    Parameters
    ----------
    options
        The values, or a mapping from what the reader sees to the value that `draw` is given.
    value
        Where it starts; the first option if not given.
    label
        What the reader sees; the name of the argument if not given.
    ordered
        True for a slider: the options have an order.
    """
    pairs = list(options.items()) if isinstance(options, Mapping) else [(str(o), o) for o in options]
    build = ipywidgets.SelectionSlider if ordered else ipywidgets.Dropdown
    return build(
        options=pairs,
        value=value if value in [v for _, v in pairs] else pairs[0][1],
        description=label,
        layout=_CONTROL_LAYOUT,
        style=_CONTROL_STYLE,
    )


def switch(value: bool = False, *, label: str = "") -> Control:
    """Build a check box."""
    return ipywidgets.Checkbox(value, description=label, indent=False, layout=_CONTROL_LAYOUT)


def explore(
    draw: Draw,
    *,
    alt: str,
    frame: Callable[..., None] | None = None,
    panels: tuple[int, int] = (1, 1),
    size: tuple[float, float] = (8.0, 3.4),
    stills: Sequence[Mapping[str, Any]] = (),
    across: int = 1,
    goal: Mapping[str, Any] | None = None,
    **controls: Control,
) -> Explorer:
    """Show a picture with a control for every argument of `draw`.

    Parameters
    ----------
    draw
        ``draw(axes, **values)`` draws what changes, with ordinary matplotlib calls, and may return a line of
        text (``$…$`` allowed) that is shown below the picture.
    alt
        What there is to see, in a sentence, for readers who cannot see it.
    frame
        ``frame(axes)`` draws once what never changes: limits, labels, guides. Fixed limits make steps fast.
    panels
        Rows and columns of axes. With one panel `axes` is that panel, otherwise an array of them.
    size
        Width and height of the picture in inches, at 100 dots each.
    stills
        Settings whose pictures are stored in the notebook, for those who read it without a kernel.
        Controls that a setting does not name keep their start. Without any, the start itself is stored.
    across
        How many stills stand side by side.
    goal
        A setting that reaches the goal set in the text. There, and not at the start, the line of text has to
        contain ``✓ goal``; tests see to it, so that no reader looks for a goal that is not there.
    **controls
        ``slider``, ``choice`` or ``switch``, one for each argument of `draw` after the first.

    Raises
    ------
    ExploreError
        A control and an argument do not fit together, or `draw` fails.
    """
    _require_matching_arguments(draw, controls)
    # Later cells may use the same names for other things; this widget must not notice.
    draw, frame = freeze_globals(draw), freeze_globals(frame)
    for setting in (*stills, goal or {}):
        if unknown := set(setting) - set(controls):
            raise ExploreError(
                f"stills and goal must name controls, and {unknown.pop()!r} is none of {', '.join(controls)}"
            )
    explorer = Explorer(draw, alt, frame, panels, size, [dict(s) for s in stills], across, controls)
    if os.environ.get("DRIVE_WIDGETS") == "1":
        explorer.drive()
        if goal is not None:
            explorer.require_goal(goal)
    return explorer


def freeze_globals(function: Any, _done: dict[int, Any] | None = None) -> Any:
    """Copy a function so that it keeps seeing the global variables as they are now, and so do the functions it calls.

    Only plain functions of the same module (the notebook) are copied; anything else, such as a method or a
    function wrapped by ``lru_cache``, is returned as it is and goes on seeing later values.
    """
    if not isinstance(function, types.FunctionType):
        return function
    done = {} if _done is None else _done
    if id(function) in done:
        return done[id(function)]
    seen: dict[str, Any] = {"__builtins__": builtins, "__name__": function.__module__}
    frozen = types.FunctionType(function.__code__, seen, function.__name__, function.__defaults__, function.__closure__)
    frozen.__kwdefaults__ = function.__kwdefaults__
    done[id(function)] = frozen
    for name in _global_names(function.__code__) & function.__globals__.keys():
        value = function.__globals__[name]
        ours = isinstance(value, types.FunctionType) and value.__globals__ is function.__globals__
        seen[name] = freeze_globals(value, done) if ours else value
    return frozen


def _global_names(code: types.CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*map(_global_names, inner))


def _require_matching_arguments(draw: Draw, controls: Mapping[str, Control]) -> None:
    name = getattr(draw, "__name__", "draw")
    parameters = list(inspect.signature(draw).parameters.values())
    for parameter in parameters[1:]:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ExploreError(
                f"{name}() has an argument {str(parameter)!r} that cannot be named: give it a plain name"
            )
    if not parameters:
        raise ExploreError(f"{name}() must take the axes to draw on as its first argument")
    arguments = [p.name for p in parameters[1:]]
    reserved = set(inspect.signature(explore).parameters) & set(arguments)
    if reserved:
        raise ExploreError(f"{name}() calls an argument {reserved.pop()!r}, a word of explore() itself: rename it")
    for control in controls:
        if control not in arguments:
            near = difflib.get_close_matches(control, arguments, n=1)
            advice = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(arguments) or 'none'}"
            raise ExploreError(f"{name}() has no argument {control!r} for a control: {advice}")
        if not isinstance(controls[control], ipywidgets.ValueWidget):
            raise ExploreError(f"the control {control!r} must be a slider, choice or switch, not {controls[control]!r}")
    for parameter in parameters[1:]:
        if parameter.name not in controls and parameter.default is inspect.Parameter.empty:
            raise ExploreError(f"{name}() needs {parameter.name!r}: add a control, {parameter.name}=slider(…)")
    if not controls:
        raise ExploreError(f"{name}() has nothing to move: add a control, or use a plain figure and show()")


class Explorer(ipywidgets.VBox):
    """Controls, picture and caption; build it with `explore`."""

    def __init__(
        self,
        draw: Draw,
        alt: str,
        frame: Callable[..., None] | None,
        panels: tuple[int, int],
        size: tuple[float, float],
        stills: Sequence[Mapping[str, Any]],
        across: int,
        controls: Mapping[str, Control],
    ) -> None:
        if len(alt.split()) < 4:
            raise ExploreError(f"alt={alt!r} does not describe the picture: say in a sentence what is to be seen")
        self._new_scene = lambda width=1.0, places=(): Scene(draw, frame, panels, (size[0] * width, size[1]), places)
        self._scene = self._new_scene()
        self.name = getattr(draw, "__name__", "draw")
        self._alt, self._stills, self._across = alt, stills, across
        self.controls = dict(controls)
        self.error: Exception | None = None
        for name, control in self.controls.items():
            control.description = control.description or name
        self._pixels, caption = self._step(self.values)
        self._picture = ipywidgets.Image(
            format="png", value=encode_png(self._pixels, compress_level=1), layout=_NATURAL_SIZE
        )
        self._caption = ipywidgets.HTMLMath(_html(caption))
        self._complaint = ipywidgets.HTML(layout={"display": "none"})
        row = ipywidgets.Box(list(self.controls.values()), layout={"flex_flow": "row wrap"})
        # An Image widget has no alternative text, so a screen reader finds it as a text that is off the screen.
        spoken = ipywidgets.HTML(f'<span style="position:absolute;left:-9999px">{html.escape(alt)}</span>')
        super().__init__([row, self._complaint, self._picture, spoken, self._caption])
        for control in self.controls.values():
            control.observe(self._moved, "value")
        self._run = _present_run()
        for number, old in list(EXPLORERS.items()):  # from an earlier run of this cell: its output is gone
            if self._run and old._run and old._run[0] == self._run[0] and old._run != self._run:
                EXPLORERS.pop(number).free()
        EXPLORERS[next(_numbers)] = self

    @property
    def values(self) -> dict[str, Any]:
        """The present setting of every control."""
        return {name: control.value for name, control in self.controls.items()}

    @property
    def figure(self) -> Figure:
        """The figure that is drawn on."""
        return self._scene.figure

    @property
    def caption(self) -> str:
        """The line of text below the picture."""
        return self._caption.value

    @property
    def pixels(self) -> np.ndarray:
        """The picture, shape (height, width, 3), dtype uint8."""
        return self._pixels

    def redraw_in_full(self) -> np.ndarray:
        """Render the present setting from nothing on a new figure: what a step must equal."""
        return self._step(self.values, self._new_scene(places=self._scene.places))[0]

    def require_unchanged(self) -> None:
        """Raise ExploreError when the present setting no longer gives the present picture."""
        pixels = self._pixels
        if not np.array_equal(self._step(self.values)[0], pixels):
            raise ExploreError(
                f"{self.name}() draws another picture than when it was built: a later cell changed its data"
            )

    def _step(self, values: Mapping[str, Any], scene: Scene | None = None) -> tuple[np.ndarray, str]:
        try:
            return (scene or self._scene).step(values)
        except Exception as error:
            setting = ", ".join(f"{name}={_short(value)}" for name, value in values.items())
            raise ExploreError(f"{self.name}({setting}) fails: {type(error).__name__}: {error}") from error

    def _moved(self, _change: Any) -> None:
        try:
            self._pixels, caption = self._step(self.values)
        except ExploreError as error:  # say it above the last good picture, dimmed
            self.error = error
            self._complaint.value = (
                f'<div role="alert" style="color:#B00020;white-space:pre-wrap">{html.escape(str(error))}. '
                "The picture below is the last one that worked.</div>"
            )
            self._complaint.layout.display = ""
            dimmed = (self._pixels // 4 + 180).astype(np.uint8)
            self._picture.value = encode_png(dimmed, compress_level=1)
            return
        self._picture.value = encode_png(self._pixels, compress_level=1)
        self._caption.value = _html(caption)
        if self.error is not None:
            self.error = None
            self._complaint.value, self._complaint.layout.display = "", "none"

    def free(self) -> None:
        """Close the widget and let its figure go: ipywidgets and the kernel's ``Out`` would keep them for ever."""
        for part in (*self.controls.values(), *self.children, self):
            part.close()
        del self._scene, self._new_scene, self._pixels

    def drive(self, *, quick: bool = False) -> int:
        """Move every control over its range and every pair to its corners; return the number of settings.

        Parameters
        ----------
        quick
            True leaves out the corners, and the comparisons with pictures drawn from nothing: for a second time.

        Raises
        ------
        ExploreError
            At the first setting at which `draw` fails.
        """
        start, count = self.values, 0
        # The last probe of each control comes first, so that a comparison with a full redraw costs one per control.
        settings = [{name: _probes(control)[-1]} for name, control in self.controls.items()]
        settings += [{name: value} for name, control in self.controls.items() for value in _probes(control)[:-1]]
        if not quick:
            for (a, first), (b, second) in itertools.combinations(self.controls.items(), 2):
                settings += [{a: x, b: y} for x in _ends(first) for y in _ends(second)]
        for setting in settings:
            for name, value in {**start, **setting}.items():
                self.controls[name].value = value
                if self.error is not None:
                    raise self.error
            count += 1
            compared = not quick and count <= len(self.controls)
            if compared and not np.array_equal(self._pixels, self.redraw_in_full()):
                raise ExploreError(
                    f"{self.name}() at {self.values} does not look as if drawn from nothing: "
                    "draw may only add to the axes; what it changes of them or of the frame's drawing stays"
                )
        for name, value in start.items():
            self.controls[name].value = value
        return count

    def require_goal(self, setting: Mapping[str, Any]) -> None:
        """Raise ExploreError unless ``✓ goal`` is said at `setting` and not at the present one."""
        for values, reached in ((self.values, False), ({**self.values, **setting}, True)):
            caption = self._step(values)[1]
            if ("✓ goal" in caption) != reached:
                raise ExploreError(
                    f"{self.name}(): the goal is {'not ' if reached else ''}reached at {values}: {caption}"
                )
        self._step(self.values)

    def _still(self) -> tuple[np.ndarray, str]:
        """Compose the picture for readers without a kernel, and its text."""
        tiles, texts = [], []
        scene = self._scene if self._across == 1 else self._new_scene(1 / self._across)
        for setting in self._stills or [{}]:
            pixels, caption = self._step({**self.values, **setting}, scene)
            heading = ", ".join(f"{self.controls[n].description} = {_short(v)}" for n, v in setting.items())
            tiles.append(with_text(pixels, heading, caption))
            texts.append(". ".join(part for part in (heading, describe(scene.figure), plain(caption)) if part))
        return tile(tiles, self._across), " ".join([self._alt, *texts])

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict, dict]:
        data = super()._repr_mimebundle_(**kwargs)
        pixels, text = self._still()
        data["image/png"] = base64.b64encode(encode_png(pixels)).decode()
        data["text/plain"] = text
        return data, {"image/png": {"alt": text}}


def _present_run() -> tuple[str, int] | None:
    """Return the cell that is being run and a number that differs from run to run; None outside of JupyterLab."""
    shell = get_ipython()
    parent = shell.get_parent() if hasattr(shell, "get_parent") else {}
    cell = parent.get("metadata", {}).get("cellId")
    return (cell, shell.execution_count) if cell else None


def _probes(control: Control) -> list[Any]:
    """Both ends and the middle, or every option."""
    if isinstance(control, ipywidgets.FloatLogSlider):
        return [control.base**exponent for exponent in (control.min, (control.min + control.max) / 2, control.max)]
    if isinstance(control, ipywidgets.IntSlider):
        return [control.min, (control.min + control.max) // 2, control.max]
    if isinstance(control, ipywidgets.FloatSlider):
        return [control.min, (control.min + control.max) / 2, control.max]
    if isinstance(control, ipywidgets.Checkbox):
        return [False, True]
    if hasattr(control, "options"):
        return [value for _, value in control.options]
    raise ExploreError(f"do not know how to drive a {type(control).__name__}")


def _ends(control: Control) -> tuple[Any, Any]:
    probes = _probes(control)
    return probes[0], probes[-1]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _html(caption: str) -> str:
    return f'<div style="font-size:1.05em;min-height:1.5em" aria-live="polite">{html.escape(caption)}</div>'
