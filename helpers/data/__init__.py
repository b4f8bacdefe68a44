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


def load_flights() -> dict[str, NDArray]:
    """Read all 336,776 flights that left New York's airports in 2013, one array for each column.

    Returns
    -------
    dict of ndarray, shape (336776,) each
        month, day, hour of the scheduled departure (int64); distance in miles and arr_delay, the delay on arrival in
        minutes, NaN where the flight did not arrive (float64); carrier, origin, dest and tailnum as text, '' where
        the plane is not known.
    """
    with np.load(_HERE / "flights.npz") as stored:
        flights = {name: stored[name].astype(np.int64) for name in ("month", "day", "hour")}
        flights |= {name: stored[name].astype(float) for name in ("distance", "arr_delay")}
        flights["arr_delay"][flights["arr_delay"] == -32768] = np.nan
        flights |= {name: stored[f"{name}_names"][stored[name]] for name in ("carrier", "origin", "dest", "tailnum")}
    return flights
