"""tf.Example and SequenceExample, the messages that TFRecord files usually hold: encoded and parsed as protobuf does.

Sources: TensorFlow's ``example.proto`` and ``feature.proto``; protobuf's encoding guide
(protobuf.dev/programming-guides/encoding).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from operator import index
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Buffer = bytes | bytearray | memoryview


class RecordError(ValueError):
    """A file or a message is malformed; the only error that bad data causes.

    `offset` is the byte at which it shows: in the uncompressed stream for a file, in the message for a message.
    """

    def __init__(self, problem: str, offset: int | None = None):
        super().__init__(problem if offset is None else f"{problem} (at byte {offset})")
        self.problem, self.offset = problem, offset


class Feature(NamedTuple):
    """One feature: a list of values of one kind.

    `kind` is "bytes", "float", "int64", or None where no kind is set, which is neither an empty list nor an absent
    feature. `values` of a decoded feature are a list of bytes, a float32 array, an int64 array, or () for no kind.
    """

    kind: str | None
    values: Any


# --- The wire format


def encode_varint(value: int) -> bytes:
    """Varint of an integer in [-2⁶³, 2⁶⁴): 7 bits a byte, lowest first, the top bit says that another byte follows.

    A negative number stands for its two's complement of 64 bits and therefore takes 10 bytes.
    """
    value = index(value)  # of numpy's integers, which would overflow, a plain one
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


def split_fields(data: bytes, at: int, end: int, clip: bool = False) -> Iterator[tuple[int, int, int, int]]:
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


# --- Example and SequenceExample

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
    spans = ((start, stop) for tag, _, start, stop in split_fields(data, 0, len(data)) if tag == 0x0A)
    return _decode_map(data, spans, _decode_feature)


def decode_sequence_example(data: Buffer) -> tuple[dict[str, Feature], dict[str, list[Feature]]]:
    """Parse a SequenceExample: its context, and its lists of one feature for each step. See `decode_example`."""
    data = bytes(data)
    spans = {0x0A: [], 0x12: []}
    for tag, _, start, stop in split_fields(data, 0, len(data)):
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
        for tag, _, *entry in split_fields(data, begin, end):
            if tag != 0x0A:
                continue
            key, values = "", []
            for tag, _, start, stop in split_fields(data, *entry):
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
        for tag, _, start, stop in split_fields(data, *span)
        if tag == 0x0A
    ]


def _decode_feature(data: bytes, spans: list[tuple[int, int]]) -> Feature:
    kind, pieces = None, []
    for at, end in spans:
        for tag, _, begin, stop in split_fields(data, at, end):
            if tag in _KINDS:
                if kind != _KINDS[tag]:
                    kind, pieces = _KINDS[tag], []
                pieces += [
                    _piece(kind, data, *value)
                    for tag, _, *value in split_fields(data, begin, stop)
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
    if len(varints) < 64:  # few: quicker one by one
        values, value, shift = [], 0, 0
        for byte in varints:
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                values.append(value & 0xFFFFFFFFFFFFFFFF)
                value = shift = 0
        return np.array(values, np.uint64).view(np.int64)
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
