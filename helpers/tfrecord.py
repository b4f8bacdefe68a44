"""TFRecord files and the tf.Example messages in them: written, read, checked, and explained byte by byte.

A file is a row of frames ``u64 length | u32 masked CRC of the length | data | u32 masked CRC of the data``, all little
endian. The data usually is a protobuf message, Example or SequenceExample. Sources: TensorFlow's
``tsl/lib/io/record_writer.cc``, ``lib/hash/crc32c.h``, ``example.proto`` and ``feature.proto``; protobuf's encoding
guide (protobuf.dev/programming-guides/encoding); RFC 3720, appendix B.4 (CRC-32C).
"""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from crc32c import crc32c as fast_crc32c
from numpy.typing import NDArray

Buffer = bytes | bytearray | memoryview

# What zlib calls the two wrappers of a deflate stream.
_WRAPPERS = {"GZIP": 31, "ZLIB": 15}
# Nothing is asked for in pieces larger than this, so that a wrong length cannot reserve memory that no data will fill.
_PIECE = 1 << 20


class RecordError(ValueError):
    """A file or a message is malformed; the only error that bad data causes.

    `offset` is the byte at which it shows: in the uncompressed stream for a file, in the message for a message.
    """

    def __init__(self, problem: str, offset: int | None = None):
        super().__init__(problem if offset is None else f"{problem} (at byte {offset})")
        self.offset = offset


class Feature(NamedTuple):
    """One feature: a list of values of one kind.

    `kind` is "bytes", "float", "int64", or None where no kind is set, which is neither an empty list nor an absent
    feature. `values` of a decoded feature are a list of bytes, a float32 array, an int64 array, or () for no kind.
    """

    kind: str | None
    values: Any


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
        `compression` is none of the three.
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


# --- Messages: the wire format


def encode_varint(value: int) -> bytes:
    """Varint of an integer in [-2⁶³, 2⁶⁴): 7 bits a byte, lowest first, the top bit says that another byte follows.

    A negative number stands for its two's complement of 64 bits and therefore takes 10 bytes.
    """
    if not -(1 << 63) <= value < 1 << 64:
        raise ValueError(f"a varint holds 64 bits, got {value}")
    value &= (1 << 64) - 1
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


def decode_varint(data: Buffer, start: int = 0, longest: int = 10) -> tuple[int, int]:
    """Varint that begins at byte `start`: its value in [0, 2⁶⁴), and where the next byte is.

    Raises
    ------
    RecordError
        The data end inside the varint, or it has more than `longest` bytes.
    """
    value, at = 0, start
    try:
        for shift in range(0, 7 * longest, 7):
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFFFFFFFFFFFFFF, at
    except IndexError:
        raise RecordError("truncated varint", start) from None
    raise RecordError(f"varint of more than {longest} bytes", start)


def _fields(data: bytes, at: int, end: int, clip: bool = False) -> Iterator[tuple[int, int, int, int]]:
    """Cut the message data[at:end] into fields: tag, and where the field starts, its value starts, and it stops.

    The tag is field number << 3 | wire type. Groups, which no message here has, come out whole, for readers to skip.
    With `clip`, a value that goes on past the end of the message ends there, so that what there is can be explained.
    """
    groups: list[tuple[int, int, int]] = []  # the open ones, outermost first
    while at < end:
        begin = at
        try:
            tag = data[at]
            at += 1
            if tag > 0x7F:
                tag, at = decode_varint(data, begin, 5)
            start, wire = at, tag & 7
            if wire == 2:  # length-delimited
                size = data[at]
                at += 1
                shift = 7
                while size >> shift:  # decode_varint in place, as it is most of the work
                    if shift > 28:
                        raise RecordError("length of more than 5 bytes", begin)
                    size += (data[at] - 1) << shift  # -1 takes away the bit that said that a byte follows
                    at += 1
                    shift += 7
                start = at
                at += size
            elif wire == 0:
                at = decode_varint(data, at)[1]
            elif wire == 5:
                at += 4
            elif wire == 1:
                at += 8
            elif wire == 3:
                groups.append((tag, begin, at))
            elif wire == 4 and groups and groups[-1][0] == tag - 1:
                tag, begin, start = groups.pop()
            else:
                raise RecordError(f"tag {tag:#x} with no group to end or unknown wire type {wire}", begin)
        except IndexError:
            raise RecordError("truncated field", begin) from None
        if clip and wire == 2 and start <= end:
            at = min(at, end)
        if at > end:
            raise RecordError("field goes on past the end of its message", begin)
        if not 8 <= tag < 1 << 32:
            raise RecordError(f"field number {tag >> 3} is outside 1 … 2²⁹-1", begin)
        if not groups:
            yield tag, begin, start, at
        elif len(groups) > 100:
            raise RecordError("more than 100 groups inside each other", begin)
    if groups:
        raise RecordError("group without end", groups[0][1])


# --- Messages: Example and SequenceExample

# In Feature, the tag of the list names the kind. In each of the lists, field 1 holds the values.
_KINDS = {0x0A: "bytes", 0x12: "float", 0x1A: "int64"}
_TAGS = {kind: tag for tag, kind in _KINDS.items()}
_UNPACKED = {"float": 0x0D, "int64": 0x08}
_TEXT = (bytes, bytearray, memoryview, str)
_DTYPES = {"f": "float", "i": "int64", "u": "int64", "b": "int64"}
_TEN_MORE = re.compile(rb"[\x80-\xff]{10}")


def decode_example(data: Buffer) -> dict[str, Feature]:
    """Parse an Example as protobuf does.

    Lists may be packed or not, and in several pieces; unknown fields are skipped; of a key given twice the last entry
    counts, of several kinds in one feature the last one, and pieces of one kind are joined.

    Raises
    ------
    RecordError
        The data are no such message.
    """
    data = bytes(data)
    spans = ((start, stop) for tag, _, start, stop in _fields(data, 0, len(data)) if tag == 0x0A)
    return _decode_map(data, spans, _decode_feature)


def decode_sequence_example(data: Buffer) -> tuple[dict[str, Feature], dict[str, list[Feature]]]:
    """Parse a SequenceExample: its context, and its lists of one feature for each step. See `decode_example`."""
    data = bytes(data)
    spans = {0x0A: [], 0x12: []}
    for tag, _, start, stop in _fields(data, 0, len(data)):
        if tag in spans:
            spans[tag].append((start, stop))
    return _decode_map(data, spans[0x0A], _decode_feature), _decode_map(data, spans[0x12], _decode_feature_list)


# Protobuf merges a message that comes in several pieces, and the fields of the merged message are those of the pieces
# one after the other. So each of the following takes the pieces as several (start, stop).


def _decode_map(data: bytes, spans: Iterable[tuple[int, int]], decode: Callable[..., Any]) -> dict[str, Any]:
    entries = {}
    for begin, end in spans:
        if decode is _decode_feature:
            begin = _take_usual_entries(entries, data, begin, end)
            if begin == end:
                continue
        for tag, _, *entry in _fields(data, begin, end):
            if tag != 0x0A:
                continue
            key, values = "", []
            for tag, _, start, stop in _fields(data, *entry):
                if tag == 0x0A:
                    try:
                        key = data[start:stop].decode()
                    except UnicodeDecodeError as error:
                        raise RecordError("key that is not UTF-8", start + error.start) from None
                elif tag == 0x12:
                    values.append((start, stop))
            entries[key] = decode(data, values)
    return entries


def _take_usual_entries(entries: dict[str, Feature], data: bytes, at: int, end: int) -> int:
    """Decode entries as all writers write them: a key and a feature, in it one list, in it one field.

    This is here for speed alone. It stops before the first other entry, malformed ones too, and returns where that is.
    """
    try:
        while at < end and data[at] == 0x0A:
            size, start, shift = data[at + 1], at + 2, 7
            while size >> shift and shift < 35:  # decode_varint in place
                size += (data[start] - 1) << shift
                start, shift = start + 1, shift + 7
            stop = start + size
            key = start + 2
            value = key + data[start + 1]
            if data[start] != 0x0A or value - key > 0x7F or stop > end:
                break
            width, kinds = _usual_heads(stop - value)
            kind = kinds[data[value : value + width]]
            entries[data[key:value].decode()] = _feature(kind, [_piece(kind, data, value + width, stop)])
            at = stop
    except (LookupError, ValueError):
        pass
    return at


@lru_cache(maxsize=1024)
def _usual_heads(size: int) -> tuple[int, dict[bytes, str]]:
    """Say what precedes the values of a usual entry, `size` bytes after its key: how many bytes, and of what kind."""
    lengths = []
    for _ in range(3):  # feature, list, field: each one the last thing in the one around it
        fitting = [size - 1 - width for width in range(1, 6) if len(encode_varint(max(size - 1 - width, 0))) == width]
        if not fitting or fitting[0] < 0:
            return 0, {}
        size = fitting[0]
        lengths.append(encode_varint(size))
    heads = {b"\x12%b%c%b\x0a%b" % (lengths[0], tag, *lengths[1:]): kind for tag, kind in _KINDS.items()}
    return len(next(iter(heads))), heads


def _decode_feature_list(data: bytes, spans: list[tuple[int, int]]) -> list[Feature]:
    return [
        _decode_feature(data, [(start, stop)])
        for span in spans
        for tag, _, start, stop in _fields(data, *span)
        if tag == 0x0A
    ]


def _decode_feature(data: bytes, spans: list[tuple[int, int]]) -> Feature:
    kind, pieces = None, []
    for at, end in spans:
        for tag, _, begin, stop in _fields(data, at, end):
            if tag in _KINDS:
                if kind != _KINDS[tag]:
                    kind, pieces = _KINDS[tag], []
                pieces += [
                    _piece(kind, data, *value)
                    for tag, _, *value in _fields(data, begin, stop)
                    if tag == 0x0A or tag == _UNPACKED.get(kind)
                ]
    return _feature(kind, pieces)


def _feature(kind: str | None, pieces: list[bytes]) -> Feature:
    if kind == "float":
        return Feature(kind, np.frombuffer(b"".join(pieces), "<f4").astype(np.float32))
    if kind == "int64":
        return Feature(kind, _int64s(b"".join(pieces)))
    return Feature(kind, pieces if kind else ())


def _piece(kind: str, data: bytes, start: int, stop: int) -> bytes:
    """Cut out one value, or some packed ones after looking whether they are whole."""
    if kind == "float" and (stop - start) % 4:
        raise RecordError(f"packed floats in {stop - start} bytes, which is no multiple of 4", start)
    if kind == "int64" and stop > start:
        if data[stop - 1] > 0x7F:
            raise RecordError("truncated varint at the end of packed integers", stop - 1)
        if stop - start > 10 and (found := _TEN_MORE.search(data, start, stop)):
            raise RecordError("varint of more than 10 bytes", found.start())
    return data[start:stop]


def _int64s(varints: bytes) -> NDArray[np.int64]:
    """Decode whole varints, all of them at once: the k-th bytes of all varints that have as many, for each k."""
    codes = np.frombuffer(varints, np.uint8)
    if varints.isascii():  # all of one byte
        return codes.astype(np.int64)
    last = np.flatnonzero(codes < 0x80)
    first = np.append(0, last[:-1] + 1)
    values = np.zeros(len(last), np.uint64)
    for k in range(int((last - first).max()) + 1):
        longer = first + k <= last
        values[longer] |= (codes[first[longer] + k] & np.uint64(0x7F)) << np.uint64(7 * k)
    return values.view(np.int64)


def encode_example(features: Mapping[str, Any]) -> bytes:
    """Serialize an Example, packed and in the order of `features`, as TensorFlow does but for the order.

    Parameters
    ----------
    features
        Each a `Feature`, or what tells its kind: a number, str or bytes, a list of them, or an array or tensor, whose
        shape is lost. Text is encoded in UTF-8, floats are rounded to float32, bools are integers. No values at all
        need a `Feature`, as in ``Feature("float", [])``.

    Raises
    ------
    ValueError
        A feature has values of several kinds, or none, or a number that its kind cannot hold.
    """
    return _field(0x0A, _encode_map(features, _encode_feature))


def encode_sequence_example(context: Mapping[str, Any], feature_lists: Mapping[str, Iterable[Any]]) -> bytes:
    """Serialize a SequenceExample; a feature list holds one feature for each step. See `encode_example`."""
    lists = _encode_map(feature_lists, lambda steps: b"".join(_field(0x0A, _encode_feature(step)) for step in steps))
    return _field(0x0A, _encode_map(context, _encode_feature)) + _field(0x12, lists)


def _field(tag: int, value: bytes) -> bytes:
    return b"%c%b%b" % (tag, encode_varint(len(value)), value)


def _encode_map(entries: Mapping[str, Any], encode: Callable[[Any], bytes]) -> bytes:
    encoded = []
    for key, value in entries.items():
        try:
            encoded.append(_field(0x0A, _field(0x0A, key.encode()) + _field(0x12, encode(value))))
        except ValueError as error:
            raise ValueError(f"feature {key!r}: {error}") from error
    return b"".join(encoded)


def _encode_feature(feature: Any) -> bytes:
    kind, values = feature if isinstance(feature, Feature) else _with_kind(feature)
    if kind is None and (values is None or not len(values)):
        return b""
    if kind == "bytes":
        if isinstance(values, _TEXT) or not all(isinstance(value, _TEXT) for value in values):
            raise ValueError("values of kind bytes are a list of bytes or str")
        texts = (value.encode() if isinstance(value, str) else bytes(value) for value in values)
        return _field(_TAGS[kind], b"".join(_field(0x0A, text) for text in texts))
    array = np.asarray(values).ravel()
    if kind == "float" and array.dtype.kind in "fiub":
        with np.errstate(over="ignore"):
            rounded = array.astype("<f4")
        if (np.isfinite(rounded) != np.isfinite(array)).any():
            raise ValueError("a number is too large for float32")
        packed = rounded.tobytes()
    elif kind == "int64":
        integers = array.tolist()
        if not all(isinstance(integer, int) and -(1 << 63) <= integer < 1 << 63 for integer in integers):
            raise ValueError("a list of int64 can hold integers in [-2⁶³, 2⁶³) only")
        packed = b"".join(map(encode_varint, integers))
    else:
        raise ValueError(f"kind {kind!r} cannot hold {values!r}")
    return _field(_TAGS[kind], _field(0x0A, packed) if packed else b"")


def _with_kind(values: Any) -> Feature:
    if hasattr(values, "__array__") and (kind := _DTYPES.get(np.asarray(values).dtype.kind)):
        return Feature(kind, values)
    values = [values] if isinstance(values, _TEXT) or not isinstance(values, Iterable) else list(values)
    # Lists are not left to numpy, which makes text of [1, "a"] and floats of [-1, 2**63].
    for kind, types in (("bytes", _TEXT), ("int64", (int, np.integer, np.bool_)), ("float", (int, float, np.number))):
        if values and all(isinstance(value, types) for value in values):
            return Feature(kind, values)
    raise ValueError(f"no kind holds {values!r}; no values at all need a Feature(kind, [])")


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
        for tag, begin, start, stop in _fields(data, at, end, clip=True):
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
