"""TFRecord files and messages against TensorFlow's bytes, protobuf, the crc32c and tfrecord packages, and accidents."""

from __future__ import annotations

import gc
import gzip
import io
import json
import pickle
import random
import tracemalloc
import zlib
from collections import Counter
from pathlib import Path

import crc32c as crc32c_package
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import helpers.tfrecord as module
from helpers.tfrecord import (
    Feature,
    RecordDataset,
    RecordError,
    crc32c,
    decode_example,
    decode_sequence_example,
    decode_varint,
    encode_example,
    encode_sequence_example,
    encode_varint,
    explain,
    frame,
    interleaved,
    masked_crc32c,
    read_records,
    shuffled,
    write_records,
)

DATA = Path(__file__).parent / "data" / "tfrecord"  # made by TensorFlow 2.21.0
EXAMPLES = json.loads((DATA / "examples.json").read_text(encoding="utf-8"))
FILES = json.loads((DATA / "files.json").read_text(encoding="utf-8"))
GOOD = EXAMPLES["serialized_by_tf"] | EXAMPLES["hand_made_wire"]
MESSAGES = {name: bytes.fromhex(golden["hex"]) for name, golden in GOOD.items()}
SEQUENCE = json.loads((DATA / "sequence_example.json").read_text(encoding="utf-8"))
ONE_RECORD = (DATA / "one_record.tfrecord").read_bytes()


def plain(features):
    """Features as plain Python values that can be compared; floats by their shortest text, which tells -0.0 and nan."""
    return {key: plain_feature(feature) for key, feature in features.items()}


def plain_feature(feature):
    if feature.kind in ("float", "int64"):
        assert feature.values.dtype == {"float": np.float32, "int64": np.int64}[feature.kind]
        assert feature.values.flags.writeable and feature.values.flags.aligned  # torch.from_numpy warns otherwise
    return feature.kind, [repr(float(v)) if feature.kind == "float" else v for v in feature.values]


def golden_feature(content):
    if content["kind"] is None:
        return None, []
    kind = content["kind"].removesuffix("_list")
    if kind == "bytes":
        return kind, [bytes.fromhex(text) for text in content["value_hex"]]
    if kind == "float":
        return kind, [repr(float(np.frombuffer(bytes.fromhex(bits), "<f4")[0])) for bits in content["bits"]]
    return kind, [int(text) for text in content["value"]]


@pytest.fixture(scope="module")
def protobuf():
    """Message classes that protobuf builds from a descriptor with the content of TensorFlow's .proto files."""
    descriptor_pb2 = pytest.importorskip("google.protobuf.descriptor_pb2")
    from google.protobuf import descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="oracle.proto", package="oracle", syntax="proto3")
    types = descriptor_pb2.FieldDescriptorProto

    def message(name, *fields, into=None):
        new = (into or file.message_type).add() if into is None else into.add()
        new.name = name
        for number, (field, kind, repeated) in enumerate(fields, 1):
            field = new.field.add(name=field, number=number, label=3 if repeated else 1)
            if isinstance(kind, str):
                field.type, field.type_name = types.TYPE_MESSAGE, f".oracle.{kind}"
            else:
                field.type = kind
        return new

    message("BytesList", ("value", types.TYPE_BYTES, True))
    message("FloatList", ("value", types.TYPE_FLOAT, True))
    message("Int64List", ("value", types.TYPE_INT64, True))
    names = ("bytes", "float", "int64")
    feature = message("Feature", *((f"{name}_list", f"{name.capitalize()}List", False) for name in names))
    feature.oneof_decl.add(name="kind")
    for field in feature.field:
        field.oneof_index = 0
    message("FeatureList", ("feature", "Feature", True))
    for outer, field, value in (("Features", "feature", "Feature"), ("FeatureLists", "feature_list", "FeatureList")):
        entry = f"{'Feature' if outer == 'Features' else 'FeatureList'}Entry"
        holder = message(outer, (field, f"{outer}.{entry}", True))
        nested = message(entry, ("key", types.TYPE_STRING, False), ("value", value, False), into=holder.nested_type)
        nested.options.map_entry = True
    message("Example", ("features", "Features", False))
    message("SequenceExample", ("context", "Features", False), ("feature_lists", "FeatureLists", False))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"oracle.{name}"))
        for name in ("Example", "SequenceExample", "Feature")
    }


def by_protobuf(feature):
    which = feature.WhichOneof("kind")
    if which is None:
        return None, []
    values = getattr(feature, which).value
    return which.removesuffix("_list"), [repr(v) if which == "float_list" else v for v in values]


def example_by_protobuf(protobuf, data):
    """Its content, or None where protobuf refuses it."""
    from google.protobuf.message import DecodeError

    try:
        message = protobuf["Example"].FromString(data)
    except DecodeError:
        return None
    return {key: by_protobuf(feature) for key, feature in message.features.feature.items()}


def sequence_by_protobuf(protobuf, data):
    from google.protobuf.message import DecodeError

    try:
        message = protobuf["SequenceExample"].FromString(data)
    except DecodeError:
        return None
    return (
        {key: by_protobuf(feature) for key, feature in message.context.feature.items()},
        {
            key: [by_protobuf(feature) for feature in steps.feature]
            for key, steps in message.feature_lists.feature_list.items()
        },
    )


def plain_sequence(sequence):
    context, lists = sequence
    return plain(context), {key: [plain_feature(step) for step in steps] for key, steps in lists.items()}


class TestChecksums:
    def test_the_known_values(self):
        assert crc32c(b"123456789") == 0xE3069283 != zlib.crc32(b"123456789")
        assert crc32c(b"") == 0
        assert crc32c(bytes(32)) == 0x8A9136AA and crc32c(b"\xff" * 32) == 0x62A8AB43  # RFC 3720, B.4
        assert crc32c(bytes(range(32))) == 0x46DD794E and crc32c(bytes(range(32))[::-1]) == 0x113FDB5C

    @given(st.binary(max_size=300))
    def test_the_teaching_version_is_the_fast_one(self, data):
        assert crc32c(data) == crc32c(memoryview(data)) == crc32c_package.crc32c(data)

    @given(st.binary(max_size=50))
    def test_the_mask_comes_off_again(self, data):
        rotated = masked_crc32c(bytearray(data)) - 0xA282EAD8 & 0xFFFFFFFF
        assert (rotated >> 17 | rotated << 15) & 0xFFFFFFFF == crc32c_package.crc32c(data)

    def test_arrays_are_framed_by_their_bytes(self):
        floats = np.arange(3.0)
        assert frame(memoryview(floats)) == frame(floats.tobytes())
        with pytest.raises(TypeError):
            frame("text")

    def test_the_empty_record(self):
        assert frame(b"").hex() == "000000000000000029039807d8ea82a2"


class TestFilesOfTensorFlow:
    @pytest.mark.parametrize(
        ("name", "compression"),
        [("plain.tfrecord", None), ("gzip.tfrecord.gz", "GZIP"), ("zlib.tfrecord.zlib", "ZLIB")],
    )
    def test_all_compressions_hold_all_messages(self, name, compression):
        records = list(read_records(DATA / name, compression))
        assert records == [MESSAGES[key] for key in FILES["order"]] and len(records) == 24

    @pytest.mark.parametrize("name", ["raw_bytes.tfrecord", "one_record.tfrecord", "empty_file.tfrecord"])
    def test_bytes(self, name):
        records = [record.hex() for record in read_records(str(DATA / name))]
        assert (
            records == (FILES["files"][name]["records_hex"] or []) and len(records) == FILES["files"][name]["n_records"]
        )

    @pytest.mark.parametrize("name", ["plain", "raw_bytes", "one_record", "empty_file", "sequence_example"])
    def test_framing_again_gives_the_same_bytes(self, name):
        source = (DATA / f"{name}.tfrecord").read_bytes()
        assert b"".join(map(frame, read_records(io.BytesIO(source)))) == source
        target = io.BytesIO()
        write_records(target, read_records(io.BytesIO(source)))
        assert target.getvalue() == source

    @pytest.mark.parametrize(
        ("name", "offset", "text"),
        [
            ("corrupt_data", 12, "the CRC of the data is wrong"),
            ("corrupt_length", 0, "the CRC of the length is wrong"),
            ("truncated", 0, "truncated: 67 of 70 bytes"),
        ],
    )
    def test_damaged_ones_at_the_offset_that_tensorflow_names(self, name, offset, text):
        assert f" at {offset}" in FILES["files"][f"{name}.tfrecord"]["error"]
        with pytest.raises(RecordError, match=rf"{text}.*\(at byte {offset}\)") as caught:
            next(read_records(DATA / f"{name}.tfrecord"))
        assert caught.value.offset == offset

    def test_compressed_read_as_plain_and_the_reverse(self):
        with pytest.raises(RecordError, match="no TFRecord file"):
            list(read_records(DATA / "gzip.tfrecord.gz"))
        for name, compression in (("plain.tfrecord", "GZIP"), ("plain.tfrecord", "ZLIB"), ("gzip.tfrecord.gz", "ZLIB")):
            with pytest.raises(RecordError, match=f"damaged {compression} stream"):
                list(read_records(DATA / name, compression))


class TestFiles:
    RECORDS = (b"", b"a", bytes(100_000), random.Random(0).randbytes(3_000_000), b"end")

    @pytest.mark.parametrize("compression", [None, "GZIP", "ZLIB"])
    def test_paths_and_file_objects(self, compression, tmp_path):
        path = tmp_path / "records"
        assert write_records(path, iter(self.RECORDS), compression) == 5
        assert tuple(read_records(path, compression)) == self.RECORDS
        file = io.BytesIO()
        write_records(file, map(memoryview, self.RECORDS), compression)
        assert file.getvalue() == path.read_bytes() and not file.closed
        file.seek(0)
        assert tuple(read_records(file, compression, verify=False)) == self.RECORDS and not file.closed

    def test_other_programs_can_unpack_them(self, tmp_path):
        write_records(tmp_path / "gz", self.RECORDS, "GZIP")
        assert gzip.decompress((tmp_path / "gz").read_bytes()) == b"".join(map(frame, self.RECORDS))
        write_records(tmp_path / "zlib", self.RECORDS, "ZLIB")
        assert zlib.decompress((tmp_path / "zlib").read_bytes()) == b"".join(map(frame, self.RECORDS))

    def test_compressed_files_may_be_joined_and_very_dense(self):
        joined = gzip.compress(frame(b"one")) + gzip.compress(b"") + gzip.compress(frame(bytes(9_000_000)))
        assert list(read_records(io.BytesIO(joined), "GZIP")) == [b"one", bytes(9_000_000)]
        with pytest.raises(RecordError, match="damaged GZIP stream"):
            list(read_records(io.BytesIO(joined + b"rubbish"), "GZIP"))

    def test_a_source_may_give_little_at_a_time(self):
        class Drops(io.BytesIO):
            def read(self, count=-1):
                return super().read(min(count, 5))

        records = list(read_records(DATA / "plain.tfrecord"))
        for name, compression in (("plain.tfrecord", None), ("gzip.tfrecord.gz", "GZIP")):
            assert list(read_records(Drops((DATA / name).read_bytes()), compression)) == records

    @pytest.mark.parametrize("compression", [None, "GZIP", "ZLIB"])
    def test_a_file_cut_anywhere_gives_every_whole_record_and_then_the_error(self, compression):
        records = [b"", b"a" * 20, random.Random(1).randbytes(40)]
        file = io.BytesIO()
        write_records(file, records, compression)
        whole = file.getvalue()
        ends = np.cumsum([0] + [16 + len(record) for record in records]).tolist()
        for cut in range(1, len(whole)):
            reader, found = read_records(io.BytesIO(whole[:cut]), compression), []
            uncompressed = cut
            if compression:
                inflate = zlib.decompressobj(31 if compression == "GZIP" else 15)
                uncompressed = len(inflate.decompress(whole[:cut]))
            if compression or cut not in ends:
                with pytest.raises(RecordError) as caught:
                    found.extend(reader)
                assert caught.value.offset == max(end for end in ends if end <= uncompressed)
            else:
                found.extend(reader)
            assert found == records[: sum(end <= uncompressed for end in ends) - 1]

    def test_every_flipped_bit_is_found(self):
        for bit in range(8 * len(ONE_RECORD)):
            flipped = bytearray(ONE_RECORD)
            flipped[bit // 8] ^= 1 << bit % 8
            with pytest.raises(RecordError) as caught:
                list(read_records(io.BytesIO(flipped)))
            assert caught.value.offset == (0 if bit < 96 else 12)

    def test_verify_off_reads_on(self):
        damaged = bytearray(ONE_RECORD + ONE_RECORD)
        damaged[9] ^= 1
        damaged[20] ^= 1
        records = list(read_records(io.BytesIO(damaged), verify=False))
        assert len(records) == 2 and records[0] != records[1] == MESSAGES["basic"]

    @pytest.mark.parametrize("compression", [None, "GZIP"])
    @pytest.mark.parametrize("length", [1 << 31, 1 << 40, (1 << 64) - 1])
    @pytest.mark.parametrize("verify", [True, False])
    def test_an_enormous_length_allocates_nothing(self, length, compression, verify):
        """With a right CRC too: it proves that the length was meant, not that the data are there."""
        head = length.to_bytes(8, "little")
        stream = head + masked_crc32c(head).to_bytes(4, "little") + bytes(1000)
        file = io.BytesIO(gzip.compress(stream) if compression else stream)
        tracemalloc.start()
        try:
            with pytest.raises(RecordError, match=f"truncated: 1000 of {length + 4} bytes"):
                next(read_records(file, compression, verify))
            assert tracemalloc.get_traced_memory()[1] < 4e6
        finally:
            tracemalloc.stop()

    def test_memory_stays_constant(self, tmp_path):
        record = bytes(100_000)
        tracemalloc.start()
        try:
            for compression in (None, "ZLIB"):
                write_records(tmp_path / "many", (record for _ in range(300)), compression)
                assert sum(len(found) for found in read_records(tmp_path / "many", compression)) == 30_000_000
            assert tracemalloc.get_traced_memory()[1] < 2e6
        finally:
            tracemalloc.stop()

    def test_files_are_closed(self, tmp_path, monkeypatch):
        opened = []
        monkeypatch.setattr(module, "open", lambda *a, **k: opened.append(open(*a, **k)) or opened[-1], raising=False)
        path = tmp_path / "file"

        def records():
            yield b"one"
            raise RuntimeError

        with pytest.raises(RuntimeError):
            write_records(path, records())
        assert opened[-1].closed and list(read_records(path)) == [b"one"] and opened[-1].closed
        for name, compression in (("truncated.tfrecord", None), ("plain.tfrecord", "ZLIB")):
            with pytest.raises(RecordError):
                list(read_records(DATA / name, compression))
            assert opened[-1].closed
        reader = read_records(DATA / "gzip.tfrecord.gz", "GZIP")
        next(reader)
        assert not opened[-1].closed
        reader.close()
        assert opened[-1].closed and len(opened) == 5

    def test_what_is_asked_for_wrongly(self, tmp_path):
        with pytest.raises(ValueError, match="compression must be"):
            next(read_records(DATA / "plain.tfrecord", "gzip"))
        with pytest.raises(ValueError, match="compression must be"):
            write_records(tmp_path / "new", [b""], "BZ2")
        assert not (tmp_path / "new").exists()
        with pytest.raises(FileNotFoundError):
            next(read_records(tmp_path / "new"))

    def test_the_error_crosses_processes(self):
        error = pickle.loads(pickle.dumps(RecordError("corrupt", 12)))
        assert str(error) == "corrupt (at byte 12)" and error.offset == 12
        assert str(RecordError(str(error))) == str(error)  # as torch's DataLoader raises it again


class TestVarints:
    @pytest.mark.parametrize(
        ("value", "code"), [(0, "00"), (1, "01"), (127, "7f"), (128, "8001"), (300, "ac02"), (-1, "ff" * 9 + "01")]
    )
    def test_by_hand(self, value, code):
        assert encode_varint(value).hex() == code
        assert decode_varint(b"?" + bytes.fromhex(code) + b"?", 1) == (value % 2**64, 1 + len(code) // 2)

    @given(st.integers(-(2**63), 2**64 - 1))
    def test_round_trip(self, value):
        code = encode_varint(value)
        assert decode_varint(code) == (value % 2**64, len(code))
        assert len(code) == max(1, -(-(value % 2**64).bit_length() // 7))

    def test_numpy_integers(self):
        assert encode_varint(np.int64(-1)) == encode_varint(np.uint64(2**64 - 1)) == encode_varint(-1)
        assert encode_varint(np.uint8(255)) == b"\xff\x01"

    def test_bad_ones(self):
        for value in (2**64, -(2**63) - 1):
            with pytest.raises(ValueError, match="64 bits"):
                encode_varint(value)
        with pytest.raises(RecordError, match=r"truncated varint \(at byte 1\)"):
            decode_varint(b"a\xff\xff", 1)
        with pytest.raises(RecordError, match="more than 10 bytes"):
            decode_varint(b"\xff" * 11)


class TestMessagesOfTensorFlow:
    @pytest.mark.parametrize("name", GOOD)
    def test_content(self, name):
        expected = {key: golden_feature(content) for key, content in GOOD[name]["content"].items()}
        assert plain(decode_example(MESSAGES[name])) == expected
        assert plain(decode_example(memoryview(MESSAGES[name]))) == expected

    @pytest.mark.parametrize("name", sorted(set(EXAMPLES["serialized_by_tf"]) - {"empty_example"}))
    def test_encoding_again_gives_the_same_bytes(self, name):
        assert encode_example(decode_example(MESSAGES[name])) == MESSAGES[name]

    @pytest.mark.parametrize("name", EXAMPLES["malformed"])
    def test_malformed(self, name):
        data = bytes.fromhex(EXAMPLES["malformed"][name]["hex"])
        for decode in (decode_example, decode_sequence_example):
            with pytest.raises(RecordError, match="at byte") as caught:
                decode(data)
            assert 0 <= caught.value.offset <= len(data)

    def test_where_tensorflows_own_parser_differs(self):
        """It reads another number of values, or refuses what protobuf reads; we follow protobuf."""
        differ = set()
        for name, golden in EXAMPLES["hand_made_wire"].items():
            content = plain(decode_example(MESSAGES[name]))
            ours = {key: [str(value) for value in values] for key, (_, values) in content.items()}
            theirs = golden.get("tf_parse_single_example", {} if "tf_parse_single_example_error" in golden else None)
            if theirs is not None and ours != theirs:
                differ.add(name)
        assert differ == {
            "mixed_packed_unpacked",
            "split_packed_chunks",
            "oneof_last_wins",
            "oneof_same_member_merged",
            "map_entry_without_key",
        }

    def test_three_kinds_of_nothing(self):
        features = decode_example(encode_example({"none": Feature(None, ()), "empty": Feature("int64", [])}))
        assert (
            features["none"] == (None, ()) and features["empty"].kind == "int64" and len(features["empty"].values) == 0
        )
        assert "absent" not in features and len(features) == 2

    def test_sequence_example(self):
        data = bytes.fromhex(SEQUENCE["hex"])
        assert next(read_records(DATA / "sequence_example.tfrecord")) == data
        context, lists = decode_sequence_example(data)
        assert plain(context) == {key: golden_feature(content) for key, content in SEQUENCE["context"].items()}
        assert plain_sequence((context, lists))[1] == {
            key: [golden_feature(content) for content in steps] for key, steps in SEQUENCE["feature_lists"].items()
        }
        assert encode_sequence_example(context, lists) == data

    def test_a_tensor_as_tensorflow_serializes_it(self):
        """serialize_tensor([1, 2]) is a message too, of another type: dtype 1, shape 2, and 8 bytes of content."""
        semantics = json.loads((DATA / "parse_semantics.json").read_text(encoding="utf-8"))
        spans = explain(bytes.fromhex(semantics["serialize_tensor"]), None, framed=False)
        assert len(spans) == 1
        # What FixedLenFeature and its kin do with kinds not set, empty and absent, seen from the decoded features:
        assert semantics["fixedlen_kind_not_set_default"] == semantics["fixedlen_missing_default"]  # None is as absent
        assert "error" in semantics["fixedlen_empty_list_default"]  # an empty list is not


SIXTY_FOUR = st.integers(-(2**63), 2**63 - 1)
FEATURE = st.one_of(
    st.just(Feature(None, ())),
    st.builds(Feature, st.just("bytes"), st.lists(st.binary(max_size=200), max_size=4)),
    st.builds(Feature, st.just("float"), st.lists(st.floats(width=32), max_size=40)),
    st.builds(Feature, st.just("int64"), st.lists(SIXTY_FOUR | st.integers(-3, 300), max_size=40)),
)
FEATURES = st.dictionaries(st.text(max_size=150), FEATURE, max_size=4)


def as_given(feature):
    return feature.kind, [repr(v) if feature.kind == "float" else v for v in feature.values]


class TestAgainstProtobuf:
    @given(FEATURES)
    def test_it_reads_what_we_write(self, protobuf, features):
        data = encode_example(features)
        expected = {key: as_given(feature) for key, feature in features.items()}
        assert example_by_protobuf(protobuf, data) == expected
        assert plain(decode_example(data)) == expected

    @given(FEATURES, st.dictionaries(st.text(max_size=5), st.lists(FEATURE, max_size=4), max_size=3))
    def test_it_reads_what_we_write_in_sequences(self, protobuf, context, lists):
        data = encode_sequence_example(context, lists)
        expected = (
            {key: as_given(feature) for key, feature in context.items()},
            {key: [as_given(step) for step in steps] for key, steps in lists.items()},
        )
        assert sequence_by_protobuf(protobuf, data) == expected
        assert plain_sequence(decode_sequence_example(data)) == expected

    @given(FEATURES, st.dictionaries(st.text(max_size=5), st.lists(FEATURE, max_size=4), max_size=3))
    def test_we_read_what_it_writes(self, protobuf, context, lists):
        message, example = protobuf["SequenceExample"](), protobuf["Example"]()

        def fill(target, feature):
            if feature.kind:
                values = getattr(target, f"{feature.kind}_list")
                values.SetInParent()
                values.value.extend(feature.values)

        for key, feature in context.items():
            fill(message.context.feature[key], feature)
            fill(example.features.feature[key], feature)
        for key, steps in lists.items():
            message.feature_lists.feature_list[key].SetInParent()
            for step in steps:
                fill(message.feature_lists.feature_list[key].feature.add(), step)
        expected = {key: as_given(feature) for key, feature in context.items()}
        assert plain(decode_example(example.SerializeToString())) == expected
        found = plain_sequence(decode_sequence_example(message.SerializeToString()))
        assert found == (expected, {key: [as_given(step) for step in steps] for key, steps in lists.items()})

    @pytest.mark.parametrize("size", range(330))
    def test_every_size_of_a_list(self, protobuf, size):
        """Lengths of lengths change at 128, in four messages one after the other."""
        data = encode_example({"k" * (size % 140): [bytes(size)], "i": Feature("int64", range(size))})
        assert plain(decode_example(data)) == example_by_protobuf(protobuf, data)

    def test_long_lists_of_integers(self, protobuf):
        values = np.random.default_rng(0).integers(-(2**63), 2**63, 10_000) >> np.arange(10_000) % 64
        data = encode_example({"long": values})
        found = decode_example(data)["long"].values
        np.testing.assert_array_equal(found, values)
        assert found.tolist() == list(protobuf["Example"].FromString(data).features.feature["long"].int64_list.value)

    @pytest.mark.parametrize(
        "data",
        [
            "0b0c",  # an empty unknown group
            "0b0b0c0c",
            "0b130c14",  # groups that cross
            "0b14",
            "0c",
            "0b" + "0a02000c" + "0c",  # an end of group inside a string is none
            "f8ffffff0f01",  # the largest field number
            "f8ffffff1f01",  # and one more
            "8a80808000" + "00",  # a tag of more than 4 bytes
            "8a8080808000" + "00",
            "0a8080808000",  # a length of 5 bytes, and of 6
            "0a808080808000",
            "0affffffff0f",
            "0a8080808010",
            "48ffffffffffffffffff7f",  # the tenth byte of a varint has one bit, the others fall off
            "0a0e0a0c12061a040a02ff7f0a020a00",
            "0a020a090a0012051a030a0107",  # an entry longer than its map, with good fields where it goes on
            "0a180a0a12051a030a01010a016b0a0a12051a030a01020a016b",  # a key twice, each after its value
            "0a090a070a01ff12021a00",  # a key that is not UTF-8
            "0a0c0a0a0a01ff0a016b12021a00",  # such a key, replaced by another
            "0a0c0a0a0a016b120512030a0100",  # a float of one byte
            "0a0e0a0c0a016b12071a030a01801200",  # half a varint, in a list that is not the last
        ],
    )
    def test_dark_corners(self, protobuf, data):
        data = bytes.fromhex(data)
        expected = example_by_protobuf(protobuf, data)
        if expected is None:
            with pytest.raises(RecordError):
                decode_example(data)
        else:
            assert plain(decode_example(data)) == expected

    def test_depth_of_groups(self, protobuf):
        deep = b"\x0b" * 100 + b"\x0c" * 100
        assert decode_example(deep) == example_by_protobuf(protobuf, deep) == {}
        for depth in (101, 10_000, 1_000_000):
            deep = b"\x0b" * depth + b"\x0c" * depth
            assert example_by_protobuf(protobuf, deep) is None
            with pytest.raises(RecordError, match="more than 100 groups"):
                decode_example(deep)


class TestEncoding:
    def test_what_tells_its_kind(self):
        features = decode_example(
            encode_example(
                {
                    "text": "café",
                    "texts": ("a", b"b", bytearray(b"c")),
                    "number": 3,
                    "truth": [True, False],
                    "float": 0.5,
                    "mixed": [1, 2.5],
                    "image": np.arange(6, dtype=np.uint8).reshape(2, 3),
                    "scalar": np.float32(1.5),
                    "half": np.array([0.5], np.float16),
                    "mask": np.array([True]),
                    "tensor": torch.tensor([[1.0, 2.0]]),
                    "words": np.array(["x", "yz"]),
                    "none": np.zeros(0),
                }
            )
        )
        assert plain(features) == {
            "text": ("bytes", ["café".encode()]),
            "texts": ("bytes", [b"a", b"b", b"c"]),
            "number": ("int64", [3]),
            "truth": ("int64", [1, 0]),
            "float": ("float", ["0.5"]),
            "mixed": ("float", ["1.0", "2.5"]),
            "image": ("int64", [0, 1, 2, 3, 4, 5]),
            "scalar": ("float", ["1.5"]),
            "half": ("float", ["0.5"]),
            "mask": ("int64", [1]),
            "tensor": ("float", ["1.0", "2.0"]),
            "words": ("bytes", [b"x", b"yz"]),
            "none": ("float", []),
        }

    @pytest.mark.parametrize(
        "bad",
        [
            [],
            [1, "a"],
            [b"a", 1.0],
            None,
            [None],
            [[1], [2]],
            1j,
            [1e39],
            2**63,
            [-1, 2**63],
            [2**80],
            np.array([2**63], np.uint64),
            Feature("int64", [1.5]),
            Feature("float", ["a"]),
            Feature("bytes", [5]),
            Feature("bytes", "text"),
            Feature("int32", [5]),
            Feature(None, [5]),
            "\ud800",
        ],
        ids=repr,
    )
    def test_bad_values(self, bad):
        with pytest.raises(ValueError, match="feature 'name': "):
            encode_example({"name": bad})
        with pytest.raises(ValueError, match="feature 'name': "):
            encode_sequence_example({}, {"name": [1, bad]})

    def test_infinities_are_values(self):
        given = Feature("float", [np.inf, -np.inf, np.nan])
        assert as_given(given) == plain_feature(decode_example(encode_example({"x": given}))["x"])


def test_the_tfrecord_package_reads_what_we_write(tmp_path):
    tfrecord = pytest.importorskip("tfrecord")
    rng = np.random.default_rng(0)
    images = rng.normal(size=(20, 64)).astype(np.float32)
    for compression, name in ((None, None), ("GZIP", "gzip")):
        records = (encode_example({"image": image, "label": k, "id": [b"%d" % k]}) for k, image in enumerate(images))
        write_records(tmp_path / "digits", records, compression)
        found = list(tfrecord.tfrecord_loader(str(tmp_path / "digits"), None, compression_type=name))
        assert [row["label"].tolist() for row in found] == [[k] for k in range(20)]
        assert [bytes(row["id"]) for row in found] == [b"%d" % k for k in range(20)]
        np.testing.assert_array_equal([row["image"] for row in found], images)
    write_records(tmp_path / "sequence", [encode_sequence_example({"n": 2}, {"x": [[1, 2], [3]]})])
    ((context, lists),) = tfrecord.tfrecord_loader(str(tmp_path / "sequence"), None, sequence_description={})
    assert context["n"].tolist() == [2] and [step.tolist() for step in lists["x"]] == [[1, 2], [3]]


def check_tiling(spans, data):
    ends = [0]
    for span in spans:
        assert span.start == ends[-1] < span.stop and span.label and span.meaning
        ends.append(span.stop)
    assert ends[-1] == len(data)


class TestExplain:
    @pytest.mark.parametrize("path", sorted(DATA.glob("*.tfrecord*")), ids=lambda path: path.name)
    def test_every_byte_once(self, path):
        data = path.read_bytes()
        for message in ("Example", "SequenceExample", None):
            check_tiling(explain(data, message), data)

    def test_by_hand(self):
        spans = explain(frame(bytes.fromhex("0a0c0a0a0a016912051a030a0107")))
        texts = [(span.stop - span.start, span.label, span.depth) for span in spans]
        assert texts == [
            (8, "record length", 0),
            (4, "length CRC", 0),
            *((1, label, depth) for depth in (1, 2) for label in ("tag", "length")),
            *((1, label, 3) for label in ("tag", "length")),
            (1, "key", 4),
            *((1, label, depth) for depth in (3, 4, 5) for label in ("tag", "length")),
            (1, "int64", 6),
            (4, "data CRC", 0),
        ]
        meanings = [span.meaning for span in spans]
        assert meanings[0] == "14 bytes of data follow the CRC" and meanings[8] == "'i'" and meanings[15] == "7"
        assert meanings[2] == "field 1 of Example (features), wire type 2 (length-delimited)"
        assert meanings[11] == "field 3 of Feature (int64_list), wire type 2 (length-delimited)"
        assert all(span.ok for span in spans)

    @pytest.mark.parametrize("name", GOOD)
    def test_leaves_are_what_protobuf_finds(self, protobuf, name):
        spans = explain(MESSAGES[name], framed=False)
        check_tiling(spans, MESSAGES[name])
        assert all(span.ok for span in spans)
        message = protobuf["Example"].FromString(MESSAGES[name])
        if name in EXAMPLES["serialized_by_tf"]:
            leaves = {"bytes": [], "float": [], "int64": [], "key": []}
            for feature in message.features.feature.values():
                kind, values = by_protobuf(feature)
                leaves.get(kind, []).extend(values)
            leaves["key"] = list(message.features.feature)
            for label, values in leaves.items():
                found = [span.meaning for span in spans if span.label == label]
                if label == "float":
                    np.testing.assert_array_equal(np.array(found, np.float32), np.array(values, np.float32))
                else:  # protobuf forgets the order of the keys, and where empty strings were
                    assert sorted(found) == sorted(repr(value) for value in values if value not in ("", b""))
        else:
            assert any(span.label == "unknown" for span in spans) == (name == "unknown_fields_skipped")

    def test_which_crc_fails(self):
        for bit in range(8 * len(ONE_RECORD)):
            flipped = bytearray(ONE_RECORD)
            flipped[bit // 8] ^= 1 << bit % 8
            spans = explain(flipped)
            check_tiling(spans, flipped)
            wrong = {span.label for span in spans if "but the bytes give" in span.meaning}
            assert wrong == ({"length CRC"} if bit < 96 else {"data CRC"})
            assert not any(span.ok for span in spans if span.label in wrong)
            assert (spans[-1].label == "unread") == (bit < 96)

    def test_as_far_as_it_can(self):
        data = (DATA / "plain.tfrecord").read_bytes()
        for cut in range(len(data)):
            if cut < 300 or cut % 50 == 0:
                check_tiling(explain(data[:cut]), data[:cut])
        spans = explain((DATA / "truncated.tfrecord").read_bytes())
        assert spans[-1] == (78, 79, "malformed", "truncated: a CRC takes 4 bytes", 0, False)
        half = explain(ONE_RECORD[:50])
        assert half[3][2:] == ("length", "64 bytes follow, but only 36 are there", 1, False)
        assert [span.meaning for span in half if span.label in ("key", "bytes")] == ["'label'", "'name'", "b'kitche'"]
        for name in EXAMPLES["malformed"]:
            data = bytes.fromhex(EXAMPLES["malformed"][name]["hex"])
            spans = explain(data, framed=False)
            check_tiling(spans, data)
            assert not all(span.ok for span in spans)

    def test_after_a_malformed_field_the_next_one_is_read(self):
        bad_then_good = bytes.fromhex("0a0a0a030a01ff0a030a016b0f")
        spans = explain(bad_then_good, framed=False)
        check_tiling(spans, bad_then_good)
        assert [span.meaning for span in spans if span.label == "key"] == ["'k'"]
        assert [span.stop - span.start for span in spans if not span.ok] == [1, 1]

    def test_groups_are_unknown_fields(self):
        data = bytes.fromhex("0b08010c0a00")
        assert [span.label for span in explain(data, framed=False)] == ["tag", "unknown", "tag", "length"]


def mutate(data, chance):
    """One to four accidents: a flipped bit, a byte set, bytes removed, inserted, repeated, or the end cut off."""
    data = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at, length = chance.randrange(len(data) + 1), chance.randint(1, 8)
        accident = chance.randrange(6)
        if accident == 0 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif accident == 1 and at < len(data):
            data[at] = chance.choice((0, 1, 8, 10, 13, 18, 26, 127, 128, 255, chance.randrange(256)))
        elif accident == 2:
            del data[at : at + length]
        elif accident == 3:
            data[at:at] = chance.randbytes(length)
        elif accident == 4:
            data[at:at] = data[max(0, at - chance.randint(1, 40)) : at]
        elif chance.random() < 0.3:
            del data[at:]
    return bytes(data)


def entries_dropped_by_upb(message_class, data):
    """Tell whether a map entry has unknown fields: protobuf in C then drops the entry, in Python it does not."""
    from google.protobuf.unknown_fields import UnknownFieldSet

    parts = [part for _, part in message_class.FromString(data).ListFields()]
    return any((field.field_number, field.wire_type) == (1, 2) for part in parts for field in UnknownFieldSet(part))


def mutate_messages(protobuf, seed, count):
    """Ours and protobuf on mutated messages: the same content, or refused by both. Returns how many were accepted."""
    chance, accepted = random.Random(seed), 0
    sources = [*MESSAGES.values(), bytes.fromhex(SEQUENCE["hex"])]
    for _ in range(count):
        data = mutate(chance.choice(sources), chance)
        for message, decode, oracle, read in (
            ("Example", decode_example, example_by_protobuf, plain),
            ("SequenceExample", decode_sequence_example, sequence_by_protobuf, plain_sequence),
        ):
            expected = oracle(protobuf, data)
            try:
                found = read(decode(data))
            except RecordError as error:
                found = None
                assert 0 <= error.offset <= len(data)
            if found is None or expected is None or not entries_dropped_by_upb(protobuf[message], data):
                assert found == expected, data.hex()
            accepted += found is not None
        check_tiling(explain(data, chance.choice(("Example", "SequenceExample")), framed=False), data)
    return accepted


def mutate_files(seed, count):
    """Mutated files give records that were in the file, or the error. Returns how many gave the error."""
    chance, refused = random.Random(seed), 0
    sources = [
        (DATA / name, compression)
        for name, compression in (
            ("plain.tfrecord", None),
            ("raw_bytes.tfrecord", None),
            ("sequence_example.tfrecord", None),
            ("gzip.tfrecord.gz", "GZIP"),
            ("zlib.tfrecord.zlib", "ZLIB"),
        )
    ]
    sources = [(path.read_bytes(), set(read_records(path, how)), how) for path, how in sources]
    for _ in range(count):
        data, records, compression = chance.choice(sources)
        data = mutate(data, chance)
        try:
            for record in read_records(io.BytesIO(data), compression):
                assert record in records
        except RecordError as error:
            assert error.offset >= 0
            refused += 1
        for _ in read_unverified(data, compression):
            pass
        if chance.random() < 0.1:
            check_tiling(explain(data), data)
    return refused


def read_unverified(data, compression):
    try:
        for record in read_records(io.BytesIO(data), compression, verify=False):
            try:
                yield decode_example(record)
            except RecordError:
                pass
    except RecordError:
        pass


class TestAccidents:
    def test_messages(self, protobuf):
        assert 600 < mutate_messages(protobuf, seed=0, count=2_000) < 3_400

    def test_files(self):
        assert mutate_files(seed=0, count=1_000) > 800

    def test_memory(self):
        """Sizes that no data stand behind reserve nothing, in messages and in files."""
        tracemalloc.start()
        try:
            mutate_files(seed=1, count=200)
            assert tracemalloc.get_traced_memory()[1] < 8e6
        finally:
            tracemalloc.stop()

    @pytest.mark.parametrize(
        "filling", [b"\x0a", b"\x80", b"\xff", b"\x0b", b"\x12\x00", b"\x0a\x00", b"\x08\x80", b"\x1a"]
    )
    def test_long_rubbish_is_refused_or_read_in_no_time(self, filling):
        data = filling * 100_000
        for decode in (decode_example, decode_sequence_example):
            try:
                decode(data)
            except RecordError:
                pass
        check_tiling(explain(data, framed=False), data)
        for tag in (0x0A, 0x12, 0x1A):
            feature = bytes([tag]) + encode_varint(len(data)) + data
            message = feature
            for tag in (0x12, 0x0A, 0x0A):
                message = bytes([tag]) + encode_varint(len(message)) + message
            try:
                decode_example(message)
            except RecordError:
                pass


def dealt(files, workers, **given):
    loader = DataLoader(RecordDataset(files, **given), batch_size=None, num_workers=workers)
    return list(loader)


class TestShuffling:
    @given(st.lists(st.integers()), st.integers(1, 40), st.integers(0, 5))
    def test_every_item_comes_once_and_not_too_early(self, items, size, seed):
        given_items = list(enumerate(items))
        order = list(shuffled(iter(given_items), size, seed))
        assert sorted(order) == given_items
        assert all(place >= index - size + 1 for place, (index, _) in enumerate(order))

    def test_a_buffer_of_one_keeps_the_order(self):
        assert list(shuffled(range(50), 1, 0)) == list(range(50))

    def test_a_buffer_for_all_makes_every_order_equally_likely(self):
        counts = Counter(tuple(shuffled("abcd", 4, seed)) for seed in range(24_000))
        assert len(counts) == 24
        assert all(abs(count - 1000) < 5 * 1000**0.5 for count in counts.values())

    def test_how_late_an_item_comes_is_geometric(self):
        late = np.array([list(shuffled(range(300), 8, seed)).index(100) - 93 for seed in range(20_000)])
        for k in (0, 1, 5, 20):
            share = (7 / 8) ** k / 8
            assert abs((late == k).mean() - share) < 5 * (share / 20_000) ** 0.5

    def test_it_holds_no_more_than_the_buffer(self):
        taken = 0

        def source():
            nonlocal taken
            for item in range(1000):
                taken += 1
                yield item

        stream = shuffled(source(), 16, 0)
        for place, _ in zip(range(900), stream, strict=False):
            assert taken <= place + 17
        with pytest.raises(ValueError, match="at least 1, got 0"):
            next(shuffled([1], 0, 0))


class TestInterleaving:
    def test_by_hand(self):
        assert "".join(interleaved(["aaa", "b", "cccc", "", "dd"], 2)) == "abacacdcdc"

    @given(st.lists(st.lists(st.integers(), max_size=6), max_size=7), st.integers(1, 9))
    def test_every_item_comes_once_and_in_its_order(self, sources, in_turn):
        tagged = [[(k, i, item) for i, item in enumerate(source)] for k, source in enumerate(sources)]
        out = list(interleaved(tagged, in_turn))
        assert sorted(out) == sorted(item for source in tagged for item in source)
        assert all([item for item in out if item[0] == k] == source for k, source in enumerate(tagged))
        if in_turn == 1:
            assert out == [item for source in tagged for item in source]

    def test_a_source_is_opened_when_it_is_its_turn(self):
        opened = []

        def source(name):
            opened.append(name)
            yield from name * 3

        stream = interleaved(map(source, "abc"), 1)
        assert next(stream) == "a" and opened == ["a"]
        with pytest.raises(ValueError, match="at least 1, got 0"):
            next(interleaved([], 0))


# torch warns where there are more workers than processors
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
class TestDealing:
    @pytest.fixture
    def files(self, tmp_path):
        paths = [tmp_path / f"{shard}.tfrecord" for shard in range(5)]
        for shard, path in enumerate(paths):
            write_records(path, [b"%d-%d" % (shard, i) for i in range(20 + shard)])
        return paths

    @pytest.fixture
    def records(self, files):
        return [record for path in files for record in read_records(path)]

    @pytest.mark.parametrize("workers", [0, 1, 2, 7])
    @pytest.mark.parametrize("buffer", [0, 1, 8, 1000])
    def test_each_record_comes_exactly_once(self, files, records, workers, buffer):
        assert sorted(dealt(files, workers, shuffle_buffer=buffer)) == sorted(records)

    def test_without_a_buffer_one_process_keeps_the_order(self, files, records):
        assert dealt(files, 0) == dealt(files, 1) == records

    def test_epochs_differ_and_a_seed_repeats_them(self, files):
        loader = DataLoader(RecordDataset(files, shuffle_buffer=30), batch_size=None, num_workers=2)
        torch.manual_seed(1)
        first, second = list(loader), list(loader)
        torch.manual_seed(1)
        assert first == list(loader) and first != second

    def test_with_a_large_buffer_every_order_is_equally_likely(self, tmp_path):
        """The order of the files and the draws of the buffer must not come from the same random numbers."""
        paths = [tmp_path / name for name in "abcd"]
        for path in paths:
            write_records(path, [path.name.encode()])
        dataset = RecordDataset(paths, shuffle_buffer=4)
        torch.manual_seed(0)
        counts = Counter(tuple(dataset) for _ in range(2400))
        assert len(counts) == 24
        assert all(abs(count - 100) < 5 * 100**0.5 for count in counts.values())

    def test_files_are_read_in_turn(self, files):
        records = list(RecordDataset(files[:2], in_turn=2))
        assert records[:4] == [b"0-0", b"1-0", b"0-1", b"1-1"] and records[-1] == b"1-20"

    def test_compressed_files_are_decoded_and_batched(self, tmp_path):
        paths = [tmp_path / name for name in ("a", "b")]
        for k, path in enumerate(paths):
            write_records(path, [encode_example({"x": [k, i]}) for i in range(6)], "GZIP")
        dataset = RecordDataset(paths, decode=lambda r: decode_example(r)["x"].values, compression="GZIP")
        batches = list(DataLoader(dataset, batch_size=3, num_workers=2))
        assert [batch.shape for batch in batches] == [(3, 2)] * 4
        assert sorted(map(tuple, torch.cat(batches).tolist())) == [(k, i) for k in range(2) for i in range(6)]

    def test_it_can_be_sent_to_a_process_that_is_spawned(self, files):
        copy = pickle.loads(pickle.dumps(RecordDataset(iter(files), decode_example, "ZLIB", 3)))
        assert (copy.files, copy.decode, copy.compression, copy.shuffle_buffer) == (
            [str(path) for path in files], decode_example, "ZLIB", 3,
        )  # fmt: skip

    @pytest.mark.parametrize("workers", [0, 2])
    def test_an_error_names_the_record_that_cannot_be_decoded(self, tmp_path, workers):
        path = tmp_path / "a.tfrecord"
        write_records(path, [encode_example({"x": 1}), b"\x0a\x7f"])
        with pytest.raises(RecordError, match=r"a\.tfrecord, record 1: .*past the end .*\(at byte 0\)"):
            dealt([path], workers, decode=decode_example)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_an_error_names_the_file(self, monkeypatch, files, workers):
        # A loader that an error has ended waits so long for each of its workers, wherever it is collected: here.
        monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
        data = bytearray(files[3].read_bytes())
        data[13] ^= 1
        files[3].write_bytes(data)
        with pytest.raises(RecordError, match=r"3\.tfrecord: corrupt data.* \(at byte 12\)"):
            dealt(files, workers)
        gc.collect()

    @pytest.mark.parametrize(
        "given, problem",
        [
            ({"files": []}, "at least one path, got none"),
            ({"files": Path("nowhere").glob("*")}, "at least one path, got none"),
            ({"files": "a.tfrecord"}, "a list of paths, got 'a.tfrecord'"),
            ({"files": Path("a.tfrecord")}, "a list of paths"),
            ({"files": ["a"], "shuffle_buffer": -1}, "shuffle_buffer must be at least 0 .*got -1"),
            ({"files": ["a"], "in_turn": 0}, "in_turn 1, got 0 and 0"),
            ({"files": ["a"], "compression": "LZ4"}, "got 'LZ4'"),
        ],
    )
    def test_what_cannot_be_is_refused_at_once(self, given, problem):
        with pytest.raises(ValueError, match=problem):
            RecordDataset(**given)
