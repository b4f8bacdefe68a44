"""JupyterLab in a real browser, the notebooks that test_lab leaves out."""

from __future__ import annotations

import pytest
from collection import NOTEBOOKS
from reader import needs_browser, open_run_and_move

pytestmark = needs_browser


@pytest.mark.parametrize("path", NOTEBOOKS[1::2], ids=lambda path: path.stem)
def test_a_reader_can_open_run_and_move(lab, path):
    open_run_and_move(lab, path)
