"""TFRecord files: framed, written, read, checked, dealt to workers, and explained byte by byte.

A file is a row of frames ``u64 length | u32 masked CRC of the length | data | u32 masked CRC of the data``, all little
endian. The data usually is a protobuf message, Example or SequenceExample: see `helpers.tf_example`, whose functions
can be imported from here, too. Sources: TensorFlow's ``tsl/lib/io/record_writer.cc`` and ``lib/hash/crc32c.h``;
RFC 3720, appendix B.4 (CRC-32C).
"""

from __future__ import annotations

import io
import os
import random
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
import torch
from crc32c import crc32c as fast_crc32c
from torch.utils.data import IterableDataset, get_worker_info

from helpers.tf_example import (
    Buffer,
    Feature,
    RecordError,
    decode_example,
    decode_sequence_example,
    decode_varint,
    encode_example,
    encode_sequence_example,
    encode_varint,
    split_fields,
)

__all__ = [
    "Feature",
    "RecordDataset",
    "RecordError",
    "Span",
    "crc32c",
    "decode_example",
    "decode_sequence_example",
    "decode_varint",
    "encode_example",
    "encode_sequence_example",
    "encode_varint",
    "explain",
    "frame",
    "interleaved",
    "masked_crc32c",
    "read_records",
    "shuffled",
    "write_records",
]

# What zlib calls the two wrappers of a deflate stream.
_WRAPPERS = {"GZIP": 31, "ZLIB": 15}
# Nothing is asked for in pieces larger than this, so that a wrong length cannot reserve memory that no data will fill.
_PIECE = 1 << 20


# --- Checksums


def _crc_table() -> list[int]:
    table = []
    for remainder in range(256):
        for _ in range(8):  # one bit of the byte: divide by the polynomial where the bit that leaves is 1
            remainder = remainder >> 1 ^ (0x82F63B78 if remainder & 1 else 0)
        table.append(remainder)
    return table


_CRC_TABLE = _crc_table()


def crc32c(data: Buffer) -> int:
    """CRC-32C of `data`, one byte at a time by a table of 256 remainders; to be read rather than used.

    The remainder of a polynomial division over GF(2) by Castagnoli's polynomial, bits reflected (0x82F63B78), with all
    bits flipped before and after. ``crc32c(b"123456789") == 0xE3069283``.
    """
    remainder = 0xFFFFFFFF
    for byte in bytes(data):
        remainder = remainder >> 8 ^ _CRC_TABLE[(remainder ^ byte) & 0xFF]
    return remainder ^ 0xFFFFFFFF


def masked_crc32c(data: Buffer) -> int:
    """CRC-32C as frames store it: rotated right by 15 bits, plus 0xa282ead8 modulo 2³².

    The mask is there because a CRC over data that end in their own CRC is the same for all data.
    """
    crc = fast_crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


# --- Frames


def frame(record: Buffer) -> bytes:
    """Bytes of one record in a file: length, CRC of the length, data, CRC of the data; 16 more than the data."""
    length = struct.pack("<Q", memoryview(record).nbytes)
    length_crc, data_crc = (struct.pack("<I", masked_crc32c(part)) for part in (length, record))
    return b"%b%b%b%b" % (length, length_crc, record, data_crc)


def write_records(
    target: str | os.PathLike | BinaryIO, records: Iterable[Buffer], compression: str | None = None
) -> int:
    """Write `records` one after the other; equal records give equal bytes.

    Parameters
    ----------
    target
        A path, which is overwritten, or a binary file object, which stays open.
    records
        Any iterable; one record at a time is in memory.
    compression
        None, "GZIP" or "ZLIB": the whole stream of frames is compressed, as by TensorFlow.

    Returns
    -------
    int
        The number of records.
    """
    _check_compression(compression)
    with ExitStack() as stack:
        file = target if hasattr(target, "write") else stack.enter_context(open(target, "wb"))
        deflate = zlib.compressobj(wbits=_WRAPPERS[compression]) if compression else None
        count = 0
        for record in records:
            framed = frame(record)
            file.write(deflate.compress(framed) if deflate else framed)
            count += 1
        if deflate:
            file.write(deflate.flush())
    return count


def read_records(
    source: str | os.PathLike | BinaryIO, compression: str | None = None, verify: bool = True
) -> Iterator[bytes]:
    """Iterate over the records of a file; no more than one record and 1 MiB are in memory.

    Parameters
    ----------
    source
        A path, opened when the first record is asked for and closed at the end, on an error, or with the iterator; or
        a binary file object, read from where it stands, which stays open.
    compression
        None, "GZIP" or "ZLIB"; files do not say which one they are.
    verify
        False leaves out both CRCs, to see what they are good for. Lengths are then believed, but still not trusted
        with memory.

    Yields
    ------
    bytes
        The data of one record.

    Raises
    ------
    RecordError
        A CRC is wrong, the file ends inside a record, or the compressed stream is damaged. All whole records before
        the place have been delivered, except those that a damaged compressed stream took with it.
    ValueError
        `compression` is none of the three; like all errors, when the first record is asked for.
    """
    _check_compression(compression)
    with ExitStack() as stack:
        file = source if hasattr(source, "read") else stack.enter_context(open(source, "rb", buffering=1 << 17))
        if compression:
            file = stack.enter_context(io.BufferedReader(_Inflated(file, _WRAPPERS[compression]), 1 << 17))
        offset = 0
        try:
            while header := _read(file, 12):
                if len(header) < 12:
                    raise RecordError(f"truncated: {len(header)} of 12 bytes before the data", offset)
                length, length_crc = struct.unpack("<QI", header)
                if verify and masked_crc32c(header[:8]) != length_crc:
                    raise RecordError("corrupt length, or no TFRecord file: the CRC of the length is wrong", offset)
                record, footer = _read(file, length), _read(file, 4)
                if len(footer) < 4:
                    there = len(record) + len(footer)
                    raise RecordError(f"truncated: {there} of {length + 4} bytes after the length", offset)
                if verify and masked_crc32c(record) != int.from_bytes(footer, "little"):
                    raise RecordError("corrupt data: the CRC of the data is wrong", offset + 12)
                yield record
                offset += 16 + length
        except (zlib.error, EOFError) as error:
            raise RecordError(f"damaged {compression} stream: {error}", offset) from error


def _check_compression(compression: str | None) -> None:
    if compression is not None and compression not in _WRAPPERS:
        raise ValueError(f'compression must be None, "GZIP" or "ZLIB", got {compression!r}')


def _read(file: BinaryIO, count: int) -> bytes:
    """Up to `count` bytes, fewer only at the end of the file; memory grows with what is there, not with `count`."""
    data = file.read(count if count < _PIECE else _PIECE)
    if len(data) == count:
        return data
    pieces = [data]
    while pieces[-1] and (count := count - len(pieces[-1])):
        pieces.append(file.read(min(count, _PIECE)))
    return b"".join(pieces)


class _Inflated(io.RawIOBase):
    """What a compressed file holds: one stream, or several one after the other as the gzip format allows."""

    def __init__(self, file: BinaryIO, wrapper: int):
        self._file, self._wrapper, self._inflate, self._rest = file, wrapper, None, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while True:
            packed = self._rest or self._file.read(1 << 16)
            if self._inflate is None or self._inflate.eof:
                if not packed:
                    return 0
                self._inflate = zlib.decompressobj(self._wrapper)
            data = self._inflate.decompress(packed, len(buffer))
            self._rest = self._inflate.unconsumed_tail or self._inflate.unused_data
            if data:
                buffer[: len(data)] = data
                return len(data)
            if not packed and not self._inflate.eof:
                raise EOFError("it ends too early")


# --- Shuffled, and dealt to workers

Item = TypeVar("Item")


def shuffled(items: Iterable[Item], buffer_size: int, seed: int) -> Iterator[Item]:
    """Shuffle a stream as well as a buffer of `buffer_size` items can: what comes next is drawn from the buffer.

    No item comes more than ``buffer_size - 1`` places before its turn; how late it comes has no limit. A buffer that
    holds all items shuffles perfectly. Eqs. (16) and (17) of 04_tfrecord; the method of tf.data's ``Dataset.shuffle``.

    Raises
    ------
    ValueError
        When iterated, if `buffer_size` is less than 1.
    """
    if buffer_size < 1:
        raise ValueError(f"buffer_size must be at least 1, got {buffer_size}")
    generator, buffer = random.Random(seed), []
    for item in items:
        if len(buffer) < buffer_size:
            buffer.append(item)
            continue
        at = generator.randrange(buffer_size)
        yield buffer[at]
        buffer[at] = item
    generator.shuffle(buffer)
    yield from buffer


def interleaved(sources: Iterable[Iterable[Item]], in_turn: int) -> Iterator[Item]:
    """Take one item from each of `in_turn` sources in turn; where one has no more, the next that waits takes its place.

    Raises
    ------
    ValueError
        When iterated, if `in_turn` is less than 1.
    """
    if in_turn < 1:
        raise ValueError(f"in_turn must be at least 1, got {in_turn}")
    waiting = map(iter, sources)
    turns = deque(islice(waiting, in_turn))
    while turns:
        source = turns.popleft()
        for item in source:
            yield item
            turns.append(source)
            break
        else:
            turns.extendleft(islice(waiting, 1))


class RecordDataset(IterableDataset):
    """Records of several files for torch's ``DataLoader``, each exactly once, however many workers it has.

    Worker k of n reads files k, k + n, k + 2n, … alone, so have at least as many files as workers; with a
    ``batch_size``, each batch comes from the files of one worker, and each worker ends with a batch of its own that
    may be smaller. Processes on other machines are not known here: deal the files among them yourself.

    Orders are drawn from torch's global generator when an epoch begins: other ones each time, and the same again after
    the same ``torch.manual_seed`` (unless the loader has ``persistent_workers``, which go on drawing).

    Parameters
    ----------
    files
        Paths of the files.
    decode
        What to make of a record; must be importable where workers are started by spawning. Nothing if not given.
    compression
        None, "GZIP" or "ZLIB".
    shuffle_buffer
        Files in random order, and records through a buffer of this size for each worker; 0 keeps the order.
    in_turn
        How many files are read in turn, one record from each.

    Raises
    ------
    RecordError
        While iterating: names the file in which data are malformed, and the record that cannot be decoded. (From a
        worker process torch passes on the text alone, without `offset`.)
    ValueError
        There are no files, or another argument cannot be.
    """

    def __init__(
        self,
        files: Iterable[str | os.PathLike],
        decode: Callable[[bytes], Any] | None = None,
        compression: str | None = None,
        shuffle_buffer: int = 0,
        in_turn: int = 1,
    ):
        if isinstance(files, (str, bytes, os.PathLike)):
            raise ValueError(f"files must be a list of paths, got {files!r}")
        self.files = [os.fspath(path) for path in files]
        if not self.files:
            raise ValueError("files must be a list of at least one path, got none")
        if shuffle_buffer < 0 or in_turn < 1:
            raise ValueError(f"shuffle_buffer must be at least 0 and in_turn 1, got {shuffle_buffer} and {in_turn}")
        _check_compression(compression)
        self.decode, self.compression = decode, compression
        self.shuffle_buffer, self.in_turn = shuffle_buffer, in_turn

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        mine = self.files[worker.id :: worker.num_workers] if worker else list(self.files)
        if not self.shuffle_buffer:
            return map(self._decoded, interleaved(map(self._records, mine), self.in_turn))
        generator = random.Random(int(torch.randint(1 << 62, ())))
        generator.shuffle(mine)
        records = interleaved(map(self._records, mine), self.in_turn)
        return map(self._decoded, shuffled(records, self.shuffle_buffer, generator.getrandbits(62)))

    def _records(self, path: str) -> Iterator[tuple[bytes, str, int]]:
        try:
            for number, record in enumerate(read_records(path, self.compression)):
                yield record, path, number
        except RecordError as error:
            raise RecordError(f"{path}: {error.problem}", error.offset) from error

    def _decoded(self, located: tuple[bytes, str, int]) -> Any:
        record, path, number = located
        try:
            return self.decode(record) if self.decode else record
        except RecordError as error:
            raise RecordError(f"{path}, record {number}: {error.problem}", error.offset) from error


# --- Every byte explained


class Span(NamedTuple):
    """What the bytes [start, stop) are.

    `label` is one of "record length", "length CRC", "data CRC", "tag", "length", "key", "bytes", "float", "int64",
    "unknown" (a field that protobuf skips), "malformed" and "unread" (bytes that a reader cannot reach). `meaning` says
    it in words, `depth` is how many frames and fields it lies in, and `ok` is False where a reader would stop.
    """

    start: int
    stop: int
    label: str
    meaning: str
    depth: int
    ok: bool = True


# Fields by number: name and type as in the .proto files. Types that have a line of their own are messages.
_SCHEMA = {
    "Example": {1: ("features", "Features")},
    "SequenceExample": {1: ("context", "Features"), 2: ("feature_lists", "FeatureLists")},
    "Features": {1: ("feature", "FeatureEntry")},
    "FeatureEntry": {1: ("key", "key"), 2: ("value", "Feature")},
    "FeatureLists": {1: ("feature_list", "FeatureListEntry")},
    "FeatureListEntry": {1: ("key", "key"), 2: ("value", "FeatureList")},
    "FeatureList": {1: ("feature", "Feature")},
    "Feature": {1: ("bytes_list", "BytesList"), 2: ("float_list", "FloatList"), 3: ("int64_list", "Int64List")},
    "BytesList": {1: ("value", "bytes")},
    "FloatList": {1: ("value", "float")},
    "Int64List": {1: ("value", "int64")},
}
_WIRE = ("varint", "8 bytes", "length-delimited", "group", "end of group", "4 bytes")


def explain(data: Buffer, message: str | None = "Example", framed: bool = True) -> list[Span]:
    """Say of every byte what it is, also where the data are corrupt.

    Parameters
    ----------
    data
        Bytes of a file, uncompressed, or of one message.
    message
        What the records hold: "Example", "SequenceExample", or None for bytes of no known meaning.
    framed
        False if `data` is one message without a frame.

    Returns
    -------
    list of Span
        They touch each other and cover the data from the first byte to the last.
    """
    data, spans, at = bytes(data), [], 0
    if not framed:
        _explain_message(spans, data, 0, len(data), message, 0)
        return spans
    while at < len(data):
        if len(data) - at < 12:
            spans.append(Span(at, len(data), "malformed", "truncated: a length and its CRC take 12 bytes", 0, False))
            break
        length = int.from_bytes(data[at : at + 8], "little")
        spans.append(Span(at, at + 8, "record length", f"{length} bytes of data follow the CRC", 0))
        ok = _explain_crc(spans, data, at, at + 8, "length CRC")
        start, at = at + 12, at + 16 + length
        if not ok:
            if start < len(data):
                spans.append(Span(start, len(data), "unread", "the length is not known, so a reader stops", 0, False))
            break
        _explain_message(spans, data, start, min(at - 4, len(data)), message, 1)
        if at <= len(data):
            _explain_crc(spans, data, start, at - 4, "data CRC")
        elif at - 4 < len(data):
            spans.append(Span(at - 4, len(data), "malformed", "truncated: a CRC takes 4 bytes", 0, False))
    return spans


def _explain_crc(spans: list[Span], data: bytes, start: int, stop: int, label: str) -> bool:
    stored, computed = int.from_bytes(data[stop : stop + 4], "little"), masked_crc32c(data[start:stop])
    ok = stored == computed
    verdict = "as computed" if ok else f"but the bytes give {computed:#010x}"
    spans.append(
        Span(stop, stop + 4, label, f"masked CRC-32C of the {stop - start} bytes: {stored:#010x}, {verdict}", 0, ok)
    )
    return ok


def _explain_message(spans: list[Span], data: bytes, at: int, end: int, message: str | None, depth: int) -> None:
    if message is None and at < end:
        spans.append(Span(at, end, "bytes", repr(data[at:end]), depth))
        return
    try:
        for tag, begin, start, stop in split_fields(data, at, end, clip=True):
            name, kind = _SCHEMA[message].get(tag >> 3, ("unknown", None))
            if tag & 7 not in {"float": (2, 5), "int64": (2, 0)}.get(kind, (2,)):
                name, kind = "unknown", None
            tag_end = decode_varint(data, begin)[1]
            wire = f"wire type {tag & 7} ({_WIRE[tag & 7]})"
            spans.append(Span(begin, tag_end, "tag", f"field {tag >> 3} of {message} ({name}), {wire}", depth))
            if tag & 7 == 2:
                size, there = decode_varint(data, tag_end)[0], stop - start
                meaning = f"{size} bytes follow" + f", but only {there} are there" * (size != there)
                spans.append(Span(tag_end, start, "length", meaning, depth, size == there))
            if kind in _SCHEMA:
                _explain_message(spans, data, start, stop, kind, depth + 1)
            else:
                _explain_values(spans, data, start, stop, kind, depth + 1)
            at = stop
    except RecordError as error:
        spans.append(Span(at, end, "malformed", str(error), depth, False))


def _explain_values(spans: list[Span], data: bytes, at: int, end: int, kind: str | None, depth: int) -> None:
    try:
        while at < end:
            stop = end
            if kind == "float":
                stop, meaning = at + 4, "{}".format(*np.frombuffer(data[at : at + 4].ljust(4), "<f4"))
            elif kind == "int64":
                value, stop = decode_varint(data, at)
                meaning = str(value - (value >> 63 << 64))
            else:
                meaning = repr(data[at:end].decode() if kind == "key" else data[at:end])
            if stop > end:
                raise RecordError("value goes on past the end of its field", at)
            spans.append(Span(at, stop, kind or "unknown", meaning, depth))
            at = stop
    except ValueError as error:
        spans.append(Span(at, end, "malformed", str(error), depth, False))
