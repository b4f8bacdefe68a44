"""Small real data sets that travel with the notebooks; README.md beside this file names source and licence."""

from __future__ import annotations

import gzip
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
    return _load_yearly("nile.csv")


def load_sunspots() -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Yearly mean number of sunspots, 1700 to 2008.

    Returns
    -------
    years : ndarray of int, shape (309,)
    sunspots : ndarray of float, shape (309,)
    """
    return _load_yearly("sunspots.csv")


def load_co2() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Monthly mean of carbon dioxide in the air at Mauna Loa, Hawaii, March 1958 to December 2001.

    Returns
    -------
    years : ndarray of float, shape (526,)
        The middle of each month, as a fraction of a year.
    ppm : ndarray of float, shape (526,)
        NaN in the five months without a measurement.
    """
    table = np.genfromtxt(_HERE / "co2.csv", delimiter=",", skip_header=1)
    return table[:, 0] + (table[:, 1] - 0.5) / 12, table[:, 2]


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


def load_cartucho() -> dict[str, NDArray]:
    """Read 686 boxes of 30 classes, such as chairs and books, in 85 photographs, and 494 detections of 36 classes.

    Returns
    -------
    dict of ndarray
        By the names that `helpers.average_precision` takes: detections are boxes (float64, shape (494, 4): x1, y1,
        x2, y2 in pixels), scores in [0, 1], classes and images (text); ground truth is true_boxes (686, 4),
        true_classes and true_images; image_ids are all 85 images, one of which has no detections. Sorted by image.
    """
    return _load_boxes("cartucho.csv")


def load_padilla() -> dict[str, NDArray]:
    """Read 15 boxes of one class in 7 images, and 24 detections: an example small enough to check by hand.

    Returns
    -------
    dict of ndarray
        As from `load_cartucho`. Three pairs of detections have equal scores: .95, .45 and .44.
    """
    return _load_boxes("padilla.csv")


def load_moby_dick() -> NDArray[np.uint8]:
    """Chapters 1 to 40 of Moby-Dick by Herman Melville (1851), as bytes of UTF-8: a long real sequence.

    Returns
    -------
    ndarray of uint8, shape (363088,)
        82 different values; ``bytes(text).decode()`` gives the text back.
    """
    return np.frombuffer(gzip.decompress((_HERE / "moby_dick.txt.gz").read_bytes()), np.uint8).copy()


def _load_yearly(name: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    years, values = np.loadtxt(_HERE / name, delimiter=",", skiprows=1, unpack=True)
    return years.astype(np.int64), values


def _load_boxes(name: str) -> dict[str, NDArray]:
    image, label, score, *corners = np.loadtxt(_HERE / name, str, delimiter=",", skiprows=1, unpack=True)
    boxes, found = np.stack(corners, axis=1).astype(float), score != ""  # ground truth has no score
    return {
        "boxes": boxes[found],
        "scores": score[found].astype(float),
        "classes": label[found],
        "images": image[found],
        "true_boxes": boxes[~found],
        "true_classes": label[~found],
        "true_images": image[~found],
        "image_ids": np.unique(image),
    }
