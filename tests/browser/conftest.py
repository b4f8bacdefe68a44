"""What the two files of browser tests share."""

from __future__ import annotations

import pytest
from collection import ROOT

from helpers.authoring.lab import open_lab


@pytest.fixture(scope="module")
def lab():
    """One JupyterLab and one browser for all notebooks of a file; each notebook gets a window and a kernel anew."""
    with open_lab(ROOT / "notebooks") as lab:
        yield lab
