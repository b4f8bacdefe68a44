"""A reader in a real browser. Two test files share it, so that two processes can work on the notebooks."""

from __future__ import annotations

import os

import pytest
from collection import ROOT

from helpers.authoring.lab import BrowserMissing, Lab, require_browser

PICTURES = ROOT / "pictures"

try:
    require_browser()
    missing = ""
except BrowserMissing as error:
    missing = str(error)

needs_browser = pytest.mark.skipif(bool(missing) and os.environ.get("REQUIRE_BROWSER") != "1", reason=missing)


def open_run_and_move(lab: Lab, path):
    """Do in a real browser what a reader does with one notebook, and look at what must not happen."""
    with lab.open(path.name) as notebook:
        stored = notebook.page.locator(".jp-OutputArea-output img:not(.widget-image)")
        assert stored.count() >= 2, "the stored pictures are shown before anything runs"
        assert notebook.page.locator(".jp-OutputArea-output", has_text="Error displaying widget").count() == 0
        assert notebook.run_all() == []
        explorers = notebook.explorers()
        assert explorers
        for number, explorer in enumerate(explorers):
            sliders = explorer.locator(".noUi-handle").count()
            for control in range(sliders):
                # End first: most sliders start nearer to their low end, and at an end they cannot move there.
                moved = [notebook.press(explorer, key, control=control) for key in ("End", "Home")]
                assert any(moved), f"slider {control} of widget {number} does not move the picture"
            assert explorer.get_by_role("alert").count() == 0, explorer.inner_text()

        handle = explorers[0].locator(".noUi-handle").first
        before, box = notebook.picture_of(explorers[0]), handle.bounding_box()
        handle.hover()
        notebook.page.mouse.down()
        notebook.page.mouse.move(box["x"] + 60, box["y"] + 5, steps=4)
        notebook.page.mouse.up()
        assert notebook.another_picture(explorers[0], before), "dragging with the mouse does nothing"
        notebook.settle()

        assert notebook.page.locator("mjx-merror").count() == 0, "a formula is broken"
        assert notebook.page.locator("mjx-container").count() > 2, "formulas are not typeset"
        assert notebook.console_errors == []
        assert notebook.failed_requests == []
        assert notebook.foreign_requests == []
        pages = notebook.save_pages(PICTURES / path.stem / "run")
        assert len(pages) >= 2 and all(page.stat().st_size > 10_000 for page in pages)
