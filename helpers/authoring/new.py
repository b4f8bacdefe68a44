"""Start a topic: the three files that belong together, with the anatomy of a notebook already in place."""

from __future__ import annotations

import keyword
import re
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from helpers.authoring.build import ROOT


class NameTaken(Exception):
    """The name does not do, or its files exist already."""


_SETUP = """import numpy as np
import matplotlib.pyplot as plt
from helpers.teaching import COLORS, Exercise, check, explore, set_style, show, slider

set_style(lecture=False)  # True in a lecture hall"""

_TITLE = """# {number} · A title with a verb

**One line: what the reader will be able to do.**

*60 minutes · what you need first, with links · new here? [How to use a notebook](00_start_here.ipynb)*

**Terms.** english 中文 · …

## A concrete problem

**Predict first.** What will happen? **Goal:** something to reach. **Break it:** something to break."""

_WIDGET = """def frame_problem(ax):
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="$x$", ylabel="$y$")


def draw_problem(ax, power):
    x = np.linspace(0, 1, 100)
    ax.plot(x, x**power, label="power")
    return "✓ goal" if power < 0.3 else ""


explore(
    draw_problem, frame=frame_problem, power=slider(0.2, 5.0, 1.0, label="power"),
    stills=[{"power": 0.5}, {"power": 2.0}], goal={"power": 0.2}, alt="A power function between zero and one.",
)"""

_DERIVATION = r"""<details><summary><b>What you should have seen</b></summary>

…
</details>

## 1 · The first idea

The reason for the step, then the step:

$$\sum_{i=1}^{n}i=\frac{n(n+1)}2 \tag{1}$$"""

_CHECKERS = """check_answer = Exercise(
    "the sum up to 10", sum(range(11)), wrong={"that is the sum up to 9": 45, "halve it": 110}, hint="use (1)",
)"""

_EXERCISE = """## Exercises

**1.** What is the sum of the numbers up to 10?"""

_SOLUTION = """<details><summary><b>Solution</b></summary>

(1) with $n=10$.

```python
answer = 10 * 11 / 2
```
</details>

## All on one page

| equation | says | in code | checked against |
|---|---|---|---|
| (1) | … | … | … |

## References

- …"""

_MODULE = """\"\"\"{title}: one line that says what this module computes.

Equation numbers are those of ``notebooks/{name}.ipynb``. Sources: …
\"\"\"
"""

_TEST = """\"\"\"{title} against independent oracles.\"\"\"


def test_something():
    raise NotImplementedError("compare with brute force, a closed form, another library or a golden")
"""

_CHECK = """n = np.arange(1, 9)
check(1, "sum of the first numbers", np.cumsum(n), n * (n + 1) / 2)"""


def new(name: str, *, root: Path = ROOT) -> list[Path]:
    """Write ``notebooks/NN_topic.ipynb``, ``helpers/topic.py`` and ``tests/test_topic.py`` with something to replace.

    Parameters
    ----------
    name
        Two digits, an underscore and the topic, such as ``13_diffusion``.

    Returns
    -------
    list of Path
        The three files.

    Raises
    ------
    NameTaken
        `name` has another form, or one of the files exists; nothing is written then.
    """
    match = re.fullmatch(r"(\d\d)_([a-z][a-z0-9_]*)", name)
    if not match or keyword.iskeyword(match[2]):
        raise NameTaken(f"a topic is named like 13_diffusion, with two digits and small letters; got {name!r}")
    number, topic = match.groups()
    title = topic.replace("_", " ").capitalize()
    files = [
        root / "notebooks" / f"{name}.ipynb",
        root / "helpers" / f"{topic}.py",
        root / "tests" / f"test_{topic}.py",
    ]
    for path in (*root.glob(f"notebooks/{number}_*"), root / "helpers" / topic, *files):
        if path.exists():
            raise NameTaken(f"{path} exists already: choose another name or remove it")
    notebook = new_notebook(
        cells=[
            _markdown(_TITLE.format(number=number), "slide"),
            _code(_SETUP, "skip", tags=["setup"]),
            _code(_WIDGET, "-", folded=True),
            _markdown(_DERIVATION, "slide"),
            _code(_CHECK, "-"),
            _markdown("## 2 · What people get wrong\n\n…", "slide"),
            _code(_CHECKERS, "skip", tags=["exercise-checkers"], folded=True),
            _markdown(_EXERCISE, "slide"),
            _code("answer = ...\n\ncheck_answer(answer)", "-", tags=["exercise"]),
            _markdown(_SOLUTION, "subslide"),
        ]
    )
    texts = [
        nbformat.writes(notebook) + "\n",
        _MODULE.format(title=title, name=name),
        _TEST.format(title=title),
    ]
    for path, text in zip(files, texts, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
    return files


def _markdown(source: str, slide: str) -> nbformat.NotebookNode:
    return new_markdown_cell(source, metadata={"slideshow": {"slide_type": slide}})


def _code(source: str, slide: str, *, tags: list[str] | None = None, folded: bool = False) -> nbformat.NotebookNode:
    metadata: dict = {"slideshow": {"slide_type": slide}}
    if tags:
        metadata["tags"] = tags
    if folded:
        metadata["jupyter"] = {"source_hidden": True}
    return new_code_cell(source, metadata=metadata)
