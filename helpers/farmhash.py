"""FarmHash's Fingerprint64, vectorised: how TensorFlow turns texts into numbers that never change.

Source: G. Pike's FarmHash, `farmhashna`, and TensorFlow's `fingerprint.h`. All arithmetic is modulo 2⁶⁴.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_K0, _K1, _K2 = (np.uint64(k) for k in (0xC3A5C85C97CB3127, 0xB492B66FBE98F273, 0x9AE16A3B2F90404F))
_CAT = np.uint64(0xC6A4A7935BD1E995)


def fingerprint64(texts: Sequence[str | bytes] | NDArray) -> NDArray[np.uint64]:
    """FarmHash Fingerprint64 of each text (UTF-8), as TensorFlow computes it.

    Parameters
    ----------
    texts
        Strings or bytes of any length, shape (n,).

    Returns
    -------
    ndarray of uint64, shape (n,)
        Texts of one length are hashed together, so no Python code runs per text.
    """
    characters, lengths, starts = _bytes_of(texts)
    result = np.empty(len(lengths), np.uint64)
    for length in np.unique(lengths).tolist():
        which = np.flatnonzero(lengths == length)
        result[which] = _farmhash(characters[starts[which, None] + np.arange(length)], length)
    return result


def _bytes_of(texts: Sequence[str | bytes] | NDArray) -> tuple[NDArray[np.uint8], NDArray, NDArray]:
    """All bytes of all texts in a row, with the length and the start of each text."""
    if isinstance(texts, np.ndarray) and texts.dtype.kind == "U" and texts.nbytes:
        codes = np.ascontiguousarray(texts).view(np.uint32).reshape(len(texts), -1)
        if codes.max() < 128:  # ASCII: a character is a byte
            width = codes.shape[1]
            lengths = np.where(codes.any(axis=1), width - (codes[:, ::-1] != 0).argmax(axis=1), 0)
            return codes.astype(np.uint8).ravel(), lengths, np.arange(len(texts)) * width
    encoded = [text.encode() if isinstance(text, str) else bytes(text) for text in texts]
    lengths = np.fromiter(map(len, encoded), int, len(encoded))
    return np.frombuffer(b"".join(encoded), np.uint8), lengths, np.cumsum(lengths) - lengths


def _rotate(v: NDArray, by: int) -> NDArray:
    return (v >> np.uint64(by)) | (v << np.uint64(64 - by))


def _shift_mix(v: NDArray) -> NDArray:
    return v ^ (v >> np.uint64(47))


def _hash16(u: NDArray, v: NDArray, mul: Any) -> NDArray:
    return _shift_mix((v ^ _shift_mix((u ^ v) * mul)) * mul) * mul


def _farmhash(s: NDArray[np.uint8], length: int) -> NDArray[np.uint64]:
    """Hash rows of equal length. The names are those of farmhashna."""
    s = np.ascontiguousarray(s)
    n, mul = len(s), np.uint64((int(_K2) + 2 * length) % 2**64)

    def fetch(at: int, kind: str = "<u8") -> NDArray[np.uint64]:
        size = np.dtype(kind).itemsize
        return np.ascontiguousarray(s[:, at : at + size]).view(kind)[:, 0].astype(np.uint64)

    if length == 0:
        return np.full(n, _K2)
    if length < 4:
        a, b, c = (s[:, at].astype(np.uint64) for at in (0, length >> 1, length - 1))
        return _shift_mix((a + (b << np.uint64(8))) * _K2 ^ (np.uint64(length) + (c << np.uint64(2))) * _K0) * _K2
    if length < 8:
        return _hash16(np.uint64(length) + (fetch(0, "<u4") << np.uint64(3)), fetch(length - 4, "<u4"), mul)
    if length <= 16:
        a, b = fetch(0) + _K2, fetch(length - 8)
        return _hash16(_rotate(b, 37) * mul + a, (_rotate(a, 25) + b) * mul, mul)
    if length <= 64:
        first = _K1 if length <= 32 else _K2
        a, b, c, d = fetch(0) * first, fetch(8), fetch(length - 8) * mul, fetch(length - 16) * _K2
        y = _rotate(a + b, 43) + _rotate(c, 30) + d
        z = _hash16(y, a + _rotate(b + _K2, 18) + c, mul)
        if length <= 32:
            return z
        e, f = fetch(16) * mul, fetch(24)
        g, h = (y + fetch(length - 32)) * mul, (z + fetch(length - 24)) * mul
        return _hash16(_rotate(e + f, 43) + _rotate(g, 30) + h, e + _rotate(f + a, 18) + g, mul)

    def weak(at: int, a: NDArray, b: NDArray) -> tuple[NDArray, NDArray]:
        a = a + fetch(at)
        b = _rotate(b + a + fetch(at + 24), 21)
        c = a
        a = a + fetch(at + 8) + fetch(at + 16)
        return a + fetch(at + 24), b + _rotate(a, 44) + c

    def mix(at: int, mul: Any, nine: Any) -> None:
        nonlocal x, y, z, v, w
        x = _rotate(x + y + v[0] + fetch(at + 8), 37) * mul
        y = _rotate(y + v[1] + fetch(at + 48), 42) * mul
        x = x ^ w[1] * nine
        y = y + v[0] * nine + fetch(at + 40)
        z = _rotate(z + w[0], 33) * mul
        v = weak(at, v[1] * mul, x + w[0])
        w = weak(at + 32, z + w[1], y + fetch(at + 16))
        z, x = x, z

    y = np.full(n, (81 * int(_K1) + 113) % 2**64, np.uint64)
    z = _shift_mix(y * _K2 + np.uint64(113)) * _K2
    v = w = (np.zeros(n, np.uint64), np.zeros(n, np.uint64))
    x = np.full(n, 81, np.uint64) * _K2 + fetch(0)
    blocks, rest = divmod(length - 1, 64)
    for block in range(blocks):
        mix(64 * block, _K1, np.uint64(1))
    mul = _K1 + ((z & np.uint64(0xFF)) << np.uint64(1))
    w = (w[0] + np.uint64(rest), w[1])
    v = (v[0] + w[0], v[1])
    w = (w[0] + v[0], w[1])
    mix(length - 64, mul, np.uint64(9))
    return _hash16(_hash16(v[0], w[0], mul) + _shift_mix(y) * _K0 + z, _hash16(v[1], w[1], mul) + x, mul)


def fingerprint_cat64(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Fold one fingerprint into another, elementwise: the step with which crosses are hashed."""
    result = first ^ _CAT
    result = (result ^ (_shift_mix(second * _CAT) * _CAT)) * _CAT
    return _shift_mix(_shift_mix(result) * _CAT)
