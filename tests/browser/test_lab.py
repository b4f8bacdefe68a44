"""JupyterLab in a real browser, every other notebook: run it, move every widget by keyboard and one by mouse."""

from __future__ import annotations

import pytest
from collection import NOTEBOOKS
from reader import missing, needs_browser, open_run_and_move

pytestmark = needs_browser


def test_a_browser_is_there():
    """Red instead of skipped where ``REQUIRE_BROWSER=1`` says that there has to be one."""
    assert not missing


@pytest.mark.parametrize("path", NOTEBOOKS[::2], ids=lambda path: path.stem)
def test_a_reader_can_open_run_and_move(lab, path):
    open_run_and_move(lab, path)
