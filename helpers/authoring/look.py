"""Open notebooks as a reader does and save pictures of the whole page, so that a person can look at them."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from helpers.authoring.lab import open_notebook


def look(path: Path, folder: Path) -> list[Path]:
    """Save the notebook at `path` as pictures in `folder`: as opened, after Run All, and each widget moved.

    Raises
    ------
    RuntimeError
        A cell failed in the browser; the pictures taken so far are there.
    """
    with open_notebook(path) as notebook:
        saved = notebook.save_pages(folder / "opened")
        errors = notebook.run_all()
        saved += notebook.save_pages(folder / "run")
        for number, explorer in enumerate(notebook.explorers(), 1):
            for key in ("Home", "End"):
                notebook.press(explorer, key, patience=1.0)  # no new picture where it stands at that end already
                notebook.page.wait_for_timeout(300)
                saved.append(folder / f"widget-{number:02d}-{key.lower()}.png")
                explorer.screenshot(path=saved[-1])
    if errors:
        raise RuntimeError(f"{path.name} failed in the browser: {errors}")
    return saved


def animate(path: Path, target: Path, *, widget: int = 1, pictures: int = 24) -> None:
    """Record the first slider of one widget as it walks up and down its range, as a GIF.

    Parameters
    ----------
    widget
        Which widget of the notebook, counted from 1.
    pictures
        How many pictures the way up has.
    """
    frames = []
    with open_notebook(path, size=(1000, 900)) as notebook:
        notebook.run_all()
        explorer = notebook.explorers()[widget - 1]
        notebook.press(explorer, "Home", patience=1.0)
        for _ in range(pictures):
            shot = Image.open(io.BytesIO(explorer.screenshot())).convert("RGB")
            frames.append(shot.quantize(48, dither=Image.Dither.NONE))
            for _ in range(4):
                notebook.press(explorer, "ArrowRight", patience=1.0)
    walk = frames + frames[-2:0:-1]
    walk[0].save(target, save_all=True, append_images=walk[1:], duration=160, loop=0, optimize=True)
