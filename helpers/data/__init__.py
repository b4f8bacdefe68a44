"""Small real data sets that travel with the notebooks; README.md beside this file names source and licence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_HERE = Path(__file__).parent


def load_nile() -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Yearly flow of the Nile at Aswan, 1871 to 1970.

    Returns
    -------
    years : ndarray of int, shape (100,)
    flow : ndarray of float, shape (100,)
        In 10⁸ m³ a year.
    """
    table = np.loadtxt(_HERE / "nile.csv", delimiter=",", skiprows=1)
    return table[:, 0].astype(np.int64), table[:, 1]
