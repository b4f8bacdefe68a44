"""Feature columns against TensorFlow's stored outputs, FarmHash's own code, torch and scikit-learn."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import farmhash
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.preprocessing import OneHotEncoder

from helpers.farmhash import fingerprint64, fingerprint_cat64
from helpers.feature_columns import (
    BucketizedColumn,
    CrossedColumn,
    EmbeddingColumn,
    FeatureError,
    HashedCategoricalColumn,
    IdentityCategoricalColumn,
    IndicatorColumn,
    NumericColumn,
    SparseIds,
    VocabularyListCategoricalColumn,
    WeightedCategoricalColumn,
    combine,
    initial_tables,
    input_layer,
    linear_model,
    sequence_input_layer,
)

DATA = Path(__file__).parent / "data" / "feature_column"
X = NumericColumn("x")


def golden(name):
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


def ids(column, **batch):
    return column.sparse_ids(batch).ids.tolist()


def indicator(column, **batch):
    return IndicatorColumn(column).dense(batch)


class TestFingerprint:
    def test_equals_farmhash_on_ten_thousand_byte_strings(self):
        rng = np.random.default_rng(64)
        lengths = np.r_[np.arange(300), rng.integers(0, 2001, 300), rng.integers(0, 130, 9400)]
        texts = [rng.bytes(n) for n in lengths]
        expected = np.array([farmhash.Fingerprint64(text) for text in texts], np.uint64)
        np.testing.assert_array_equal(fingerprint64(texts), expected)

    @given(st.lists(st.text(), max_size=20))
    def test_text_is_hashed_as_utf8_in_lists_and_arrays(self, texts):
        expected = [farmhash.Fingerprint64(text.encode("utf-8", "surrogatepass")) for text in texts]
        encodable = [text for text in texts if not any(0xD800 <= ord(c) < 0xE000 for c in text)]
        if encodable == texts:
            assert fingerprint64(texts).tolist() == expected
            if texts and not any(text.endswith("\0") for text in texts):  # numpy's text drops trailing NULs
                assert fingerprint64(np.array(texts)).tolist() == expected

    def test_arrays_of_ascii_of_different_lengths(self):
        texts = ["", "a", "ab", "N14228", "x" * 40, "y" * 70]
        assert fingerprint64(np.array(texts)).tolist() == fingerprint64(texts).tolist()
        assert fingerprint64(np.array([], str)).tolist() == [] and fingerprint64(np.array(["", ""])).size == 2

    def test_tensorflows_hashes(self):
        rows = golden("hash_bucket_fast")["rows"]
        hashes = fingerprint64([bytes.fromhex(row["hex"]) for row in rows])
        for name in ("mod_2", "mod_10", "mod_97", "mod_1000"):
            assert [int(h) % int(name[4:]) for h in hashes] == [row[name] for row in rows]
        assert [int(h) % (2**63 - 1) for h in hashes] == [row["mod_2^63-1"] for row in rows]

    def test_folding_in_plain_integers(self):
        def fold(first, second, k=0xC6A4A7935BD1E995, m=2**64):
            def shift(v):
                return v ^ (v >> 47)

            r = first ^ k
            r ^= shift(second * k % m) * k % m
            r = r * k % m
            return shift(shift(r) * k % m)

        rng = np.random.default_rng(1)
        a, b = (rng.integers(0, 2**64, 50, np.uint64) for _ in range(2))
        assert fingerprint_cat64(a, b).tolist() == [fold(int(x), int(y)) for x, y in zip(a, b, strict=True)]


class TestNumeric:
    def test_shape_default_and_normalizer(self):
        column = NumericColumn("x", (2,), 7.0, lambda x: x / 2)
        assert column.dense({"x": [[1, 2], [np.nan, 4]]}).tolist() == [[0.5, 1], [3.5, 2]]
        assert column.labels == ["x[0]", "x[1]"] and column.dense({"x": [[1, 2]]}).dtype == np.float32

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (["a", "b"], "'x': expected numbers, got <U1"),
            ([1.0, np.nan], "'x': row 1 is NaN"),
            ([[1, 2], [3]], "'x': rows differ in length"),
            ([[1, 2], [3, 4]], r"'x': expected shape \(rows, \*\(1,\)\), got \(2, 2\)"),
            ([1, "a"], "'x': expected numbers"),
            (3.0, "'x': expected shape"),
        ],
    )
    def test_bad_values(self, value, message):
        with pytest.raises(FeatureError, match=message):
            X.dense({"x": value})

    def test_bad_descriptions(self):
        with pytest.raises(FeatureError, match="'x': shape"):
            NumericColumn("x", (0,))


class TestBucketized:
    def test_tensorflows_buckets(self):
        stored = golden("bucketize")
        column = BucketizedColumn(X, stored["boundaries"])
        batch = {"x": np.array(stored["x"], float)}
        assert column.buckets(batch).ravel().tolist() == stored["bucket"]
        assert column.dense(batch).tolist() == stored["onehot"]
        wide = BucketizedColumn(NumericColumn("x", (2,)), stored["boundaries"])
        assert wide.dense({"x": stored["vector_in"]}).tolist() == stored["vector_onehot"]
        trap = stored["f32_trap"]
        assert BucketizedColumn(X, [trap["boundary"]]).buckets({"x": trap["x"]}).ravel().tolist() == trap["bucket"]

    @given(
        st.lists(st.floats(width=32, allow_nan=False), max_size=30),
        st.lists(st.floats(-(2.0**90), 2.0**90, width=32), min_size=1, max_size=8, unique=True),
    )
    def test_equals_torch(self, x, boundaries):
        boundaries = sorted(boundaries)
        expected = torch.bucketize(torch.tensor(x), torch.tensor(boundaries), right=True)
        assert BucketizedColumn(X, boundaries).buckets({"x": np.array(x)}).ravel().tolist() == expected.tolist()

    def test_labels_and_normalizer(self):
        column = BucketizedColumn(NumericColumn("x", normalizer_fn=lambda x: 10 * x), [0, 5])
        assert column.labels == ["x[-inf, 0)", "x[0, 5)", "x[5, inf)"]
        assert column.buckets({"x": [0.4, 0.6]}).ravel().tolist() == [1, 2]

    @pytest.mark.parametrize("boundaries", [[], [1, 0], [0, 0], [np.nan], [0, np.nan]])
    def test_bad_boundaries(self, boundaries):
        with pytest.raises(FeatureError, match="'x_bucketized': boundaries must be sorted"):
            BucketizedColumn(X, boundaries)

    def test_bad_source(self):
        with pytest.raises(FeatureError, match="one-dimensional"):
            BucketizedColumn(NumericColumn("x", (2, 2)), [0])


class TestCategories:
    def test_hashed(self):
        stored = golden("categorical_hash_bucket")
        column = HashedCategoricalColumn("x", 5)
        assert indicator(column, x=stored["string_in"]).tolist() == stored["string_onehot5"]
        assert indicator(column, x=stored["int_in"]).tolist() == stored["int_onehot5"]
        assert ids(column, x=["sports"]) == ids(column, x=[b"sports"]) == ids(column, x=np.array(["sports"])) == [2]

    def test_identity(self):
        stored = golden("categorical_identity")
        column = IdentityCategoricalColumn("x", stored["num_buckets"], 0)
        assert indicator(column, x=stored["in"]).tolist() == stored["default0"]

    def test_an_id_out_of_range_is_an_error_here_and_a_silent_row_of_zeros_in_tensorflow(self):
        assert golden("categorical_identity")["no_default_out_of_range"] == [[0, 0, 0, 0]]
        with pytest.raises(FeatureError, match=r"'x': id 4 in row 1 is not in \[0, 4\)"):
            ids(IdentityCategoricalColumn("x", 4), x=[3, 4])

    @pytest.mark.parametrize(
        ("options", "name"),
        [({}, "default"), ({"default_value": 0}, "default_value_0"), ({"num_oov_buckets": 3}, "oov3")],
    )
    def test_vocabulary(self, options, name):
        stored = golden("categorical_vocabulary")
        column = VocabularyListCategoricalColumn("x", stored["vocab"], **options)
        assert indicator(column, x=stored["in"]).tolist() == stored[name]

    def test_vocabulary_of_integers_and_from_a_file(self):
        stored = golden("categorical_vocabulary")
        column = VocabularyListCategoricalColumn("x", stored["int_vocab"], num_oov_buckets=4)
        assert indicator(column, x=stored["int_in"]).tolist() == stored["int_oov4"]
        column = VocabularyListCategoricalColumn.from_file("x", DATA / "vocab.txt", 2, num_oov_buckets=2)
        assert indicator(column, x=stored["in"]).tolist() == stored["file_size2_oov2"]
        assert column.labels == ["kitchenware", "electronics", "other 0", "other 1"]
        with pytest.raises(FeatureError, match="holds 3 entries, not 4"):
            VocabularyListCategoricalColumn.from_file("x", DATA / "vocab.txt", 4)

    def test_counts(self):
        stored = golden("indicator_multihot")
        assert indicator(VocabularyListCategoricalColumn("x", "abc"), x=stored["in"]).tolist() == stored["out"]

    @given(st.lists(st.sampled_from(["a", "bb", "ccc", "é", "zz"]), min_size=1, max_size=20))
    def test_indicator_equals_scikit_learn(self, values):
        vocabulary = ["zz", "a", "é", "bb"]
        encoder = OneHotEncoder(categories=[vocabulary], handle_unknown="ignore", sparse_output=False)
        expected = encoder.fit_transform(np.array(values)[:, None])
        np.testing.assert_array_equal(indicator(VocabularyListCategoricalColumn("x", vocabulary), x=values), expected)

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (["a", 1], "'x': categories must be all text or all integers, got int, str"),
            ([1.5], "'x': categories must be all text or all integers, got float"),
            (np.array([1.5]), "'x': categories must be text or integers, got float64"),
            ([True], "'x': categories must be"),
            ([None], "'x': categories must be"),
            ([["a"], "b"], "'x': some rows are lists"),
            (np.zeros((1, 1, 1), int), r"'x': expected shape \(rows,\)"),
            ([b"\xff"], "'x': a category is not UTF-8"),
        ],
    )
    def test_bad_values(self, value, message):
        with pytest.raises(FeatureError, match=message):
            ids(HashedCategoricalColumn("x", 5), x=value)

    def test_missing_keys_and_wrong_kinds(self):
        with pytest.raises(FeatureError, match="column 'x': the batch has no 'x'; it has 'y'"):
            ids(HashedCategoricalColumn("x", 5), y=["a"])
        with pytest.raises(FeatureError, match="'x': expected integers"):
            ids(IdentityCategoricalColumn("x", 5), x=["a"])
        with pytest.raises(FeatureError, match="'x': expected text"):
            ids(VocabularyListCategoricalColumn("x", ["a"]), x=[1])

    def test_empty_batches(self):
        for empty in ([], np.zeros(0, str), np.zeros((0, 3), int), [[], []]):
            assert ids(HashedCategoricalColumn("x", 5), x=empty) == []
        assert indicator(HashedCategoricalColumn("x", 5), x=[[], []]).tolist() == [[0] * 5] * 2

    @pytest.mark.parametrize(
        ("build", "message"),
        [
            (lambda: HashedCategoricalColumn("x", 0), "'x': hash_bucket_size must be at least 1"),
            (lambda: IdentityCategoricalColumn("x", 0), "'x': num_buckets"),
            (lambda: IdentityCategoricalColumn("x", 3, 3), r"'x': default_value 3 is not in \[0, 3\)"),
            (lambda: VocabularyListCategoricalColumn("x", []), "'x': vocabulary_list must not be empty"),
            (lambda: VocabularyListCategoricalColumn("x", ["a", "a"]), "'x': vocabulary_list holds a value twice"),
            (lambda: VocabularyListCategoricalColumn("x", ["a", 1]), "'x': categories must be all text"),
            (lambda: VocabularyListCategoricalColumn("x", ["a"], 0, 2), "'x': give num_oov_buckets or default_value"),
            (lambda: VocabularyListCategoricalColumn("x", ["a"], 1), "'x': default_value 1 is no place"),
            (lambda: VocabularyListCategoricalColumn("x", ["a"], num_oov_buckets=-1), "'x': num_oov_buckets"),
            (lambda: IndicatorColumn(X), "expected a categorical column"),
            (lambda: IndicatorColumn(CrossedColumn(("a", "b"), 0)), "'a_X_b' has no hash_bucket_size"),
            (lambda: EmbeddingColumn(HashedCategoricalColumn("x", 2), 0), "'x_embedding': dimension"),
            (lambda: EmbeddingColumn(HashedCategoricalColumn("x", 2), 1, "max"), "'x_embedding': combiner"),
            (lambda: EmbeddingColumn(HashedCategoricalColumn("x", 2), 1, max_norm=0), "'x_embedding': max_norm"),
            (lambda: WeightedCategoricalColumn(CrossedColumn(("a", "b"), 3), "w"), "weighted column"),
        ],
    )
    def test_bad_descriptions(self, build, message):
        with pytest.raises(FeatureError, match=message):
            build()


class TestCrosses:
    def test_tensorflows_crosses(self):
        stored = golden("crossed")
        batch = {key: stored["example"][key] for key in ("k1", "k2")}
        keys = ("k1", "k2")
        assert indicator(CrossedColumn(keys, 10), **batch).tolist() == stored["example"]["indicator"]
        assert ids(CrossedColumn(keys, 0), **batch) == stored["cross_hashed_num_buckets_0"]
        assert ids(CrossedColumn(keys, 100, 12345), **batch) == stored["cross_hashed_100_key_12345"]
        order = stored["product_order"]
        batch = {"k1": [order["k1"]], "k2": [order["k2"]]}
        assert ids(CrossedColumn(keys, 0), **batch) == order["values_nb0"]
        assert ids(CrossedColumn(keys[::-1], 0), **batch) == order["values_nb0_swapped"]
        whole = stored["int_cross_nb0"]
        assert ids(CrossedColumn(("a", "b"), 0), a=[whole["a"]], b=[whole["b"]]) == whole["values"]

    def test_buckets_and_texts(self):
        stored = golden("crossed")["bucket_cross"]
        lat, lon = (BucketizedColumn(NumericColumn(key), stored[f"{key}_b"]) for key in ("lat", "lon"))
        column = CrossedColumn((lat, lon, "city"), stored["buckets"])
        assert column.name == stored["name"]
        batch = {key: stored[key] for key in ("lat", "lon", "city")}
        assert ids(column, **batch) == stored["id"]
        nested = CrossedColumn((CrossedColumn((lat, lon), 7), "city"), stored["buckets"])
        assert ids(nested, **batch) == stored["id"]  # a crossed key gives its leaves, not its ids

    @given(
        st.lists(st.tuples(*[st.lists(st.sampled_from(["a", "b", "cc", ""]), max_size=3)] * 3), min_size=1, max_size=6)
    )
    def test_equals_a_loop_over_combinations(self, table):
        expected = []
        for row in table:
            for values in itertools.product(*row):
                h = np.array([0xDECAFCAFFE], np.uint64)
                for value in values:
                    h = fingerprint_cat64(h, np.array([farmhash.Fingerprint64(value)], np.uint64))
                expected.append(int(h[0]) % 1000)
        a, b, c = ([row[i] for row in table] for i in range(3))
        assert ids(CrossedColumn(("a", "b", "c"), 1000), a=a, b=b, c=c) == expected

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            (("a",), "at least two"),
            ((HashedCategoricalColumn("a", 3), "b"), "'a' is hashed already"),
            ((X, "b"), "a key must be a name or a column with ids"),
        ],
    )
    def test_bad_keys(self, keys, message):
        with pytest.raises(FeatureError, match=message):
            CrossedColumn(keys, 10)

    def test_rows_must_agree(self):
        with pytest.raises(FeatureError, match="'a_X_b': 'b' has 1 rows, the first key has 2"):
            ids(CrossedColumn(("a", "b"), 10), a=["u", "v"], b=["w"])


class TestEmbeddings:
    stored = golden("weighted_and_embedding")
    vocabulary = VocabularyListCategoricalColumn("x", ("a", "b", "c"))
    weighted = WeightedCategoricalColumn(vocabulary, "w")

    def dense(self, column, *options, **batch):
        column = EmbeddingColumn(column, 2, *options)
        return column.dense(batch, {column.name: self.stored["table"]})

    @pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
    def test_tensorflows_combiners(self, combiner):
        x, w = self.stored["sparse_ids"], self.stored["weights"]
        for result, name in (
            (self.dense(self.vocabulary, combiner, x=x), "unweighted"),
            (self.dense(self.weighted, combiner, x=x, w=w), "weighted"),
            (self.dense(self.vocabulary, combiner, 5.0, x=x), "maxnorm5"),
            (self.dense(self.vocabulary, combiner, x=[["a"], ["zzz"], []]), "oov_and_empty"),
        ):
            np.testing.assert_allclose(result, self.stored[f"emb_{name}_{combiner}"], rtol=1e-6, atol=1e-6)

    def test_weighted_indicator(self):
        result = indicator(self.weighted, x=self.stored["sparse_ids"], w=self.stored["weights"])
        assert result.tolist() == self.stored["indicator_weighted"]

    @given(st.integers(0, 2**32 - 1))
    def test_sum_and_mean_equal_torchs_embedding_bag(self, seed):
        rng = np.random.default_rng(seed)
        sizes = rng.integers(0, 4, 5)
        found, table = rng.integers(0, 7, sizes.sum()), rng.normal(size=(7, 3)).astype(np.float32)
        offsets = torch.tensor(np.cumsum(sizes) - sizes)
        sparse = SparseIds(np.repeat(np.arange(5), sizes), found, np.ones(len(found), np.float32), 5)
        for mode in ("sum", "mean"):
            expected = torch.nn.functional.embedding_bag(torch.tensor(found), torch.tensor(table), offsets, mode=mode)
            np.testing.assert_allclose(combine(sparse, table, mode), expected, atol=1e-6)

    def test_max_norm_leaves_the_table_alone(self):
        table = np.array([[3.0, 4.0]], np.float32)
        sparse = SparseIds(np.array([0]), np.array([0]), np.ones(1, np.float32), 1)
        np.testing.assert_allclose(combine(sparse, table, "sum", 1.0), [[0.6, 0.8]], rtol=1e-6)
        assert table.tolist() == [[3, 4]]

    def test_shared_tables_are_one_table(self):
        stored = golden("linear_and_shared")["shared_embeddings"]
        columns = [
            EmbeddingColumn(VocabularyListCategoricalColumn(key, "abc"), 2, table="letters") for key in ("a", "b")
        ]
        assert [column.name for column in columns] == stored["names"]
        assert len(initial_tables(columns, np.random.default_rng(0))) == stored["n_variables"]
        matrix, _ = input_layer({"a": ["a", "c"], "b": ["b", "b"]}, columns, {"letters": [[1, 10], [2, 20], [3, 30]]})
        assert matrix.tolist() == stored["out"]

    def test_initial_tables_are_cut_off_normal(self):
        column = EmbeddingColumn(HashedCategoricalColumn("x", 5000), 8)
        (table,) = initial_tables([column], np.random.default_rng(0)).values()
        stored = golden("errors_names_defaults")["embedding_default_init"]
        assert table.std() == pytest.approx(stored["std"], rel=0.01)
        assert np.abs(table).max() <= 2 * stored["expected_trunc_normal_stddev_arg"] * (1 + 1e-6)

    def test_bad_tables_and_weights(self):
        with pytest.raises(FeatureError, match="'x_embedding': the batch has no 'x_embedding'"):
            EmbeddingColumn(self.vocabulary, 2).dense({"x": ["a"]}, {})
        with pytest.raises(FeatureError, match=r"'x_embedding': the table has shape \(2, 2\), expected \(3, 2\)"):
            EmbeddingColumn(self.vocabulary, 2).dense({"x": ["a"]}, {"x_embedding": np.zeros((2, 2))})
        with pytest.raises(FeatureError, match="'x_weighted_by_w': weights and categories differ in shape"):
            indicator(self.weighted, x=[["a", "b"]], w=[[1.0]])


class TestWholeBatches:
    def test_names_are_tensorflows(self):
        names, i = golden("errors_names_defaults")["names"], IdentityCategoricalColumn("i", 3)
        assert NumericColumn("price").name == names["numeric"]
        assert BucketizedColumn(NumericColumn("price"), [1, 2]).name == names["bucketized"]
        assert CrossedColumn(("b", "a"), 5).name == names["crossed"]
        assert WeightedCategoricalColumn(i, "w").name == names["weighted"]
        assert EmbeddingColumn(i, 4).name == names["embedding"] and IndicatorColumn(i).name == names["indicator"]

    def test_order_of_columns(self):
        assert sorted(golden("dense_features_order")["names_given"]) == golden("dense_features_order")["names_sorted"]
        stored = golden("more")["order"]
        columns = [
            IndicatorColumn(VocabularyListCategoricalColumn("s", ["x", "y"])),
            NumericColumn("z_num", (2,), normalizer_fn=lambda x: (x - 3) / 4.2),
            BucketizedColumn(NumericColumn("age"), [18, 30]),
            IndicatorColumn(CrossedColumn(("age2", "s"), 6)),
            NumericColumn("Z"),  # capitals come first
        ]
        for some_order in itertools.permutations(columns):
            matrix, labels = input_layer(stored["batch"], some_order)
            np.testing.assert_allclose(matrix, stored["matrix"], rtol=1e-6)
        assert labels[0] == "Z" and labels[-1] == "z_num[1]"

    def test_matrix_and_labels(self):
        stored = golden("linear_and_shared")
        columns = [NumericColumn("n"), IndicatorColumn(VocabularyListCategoricalColumn("a", "abc"))]
        batch = {"a": ["a", "c"], "n": [2.0, 3.0]}
        matrix, labels = input_layer(batch, columns)
        assert matrix.tolist() == stored["input_layer"] and matrix.dtype == np.float32
        assert labels == ["a=a", "a=b", "a=c", "n"]

    def test_linear_model_equals_the_dense_product(self):
        rng = np.random.default_rng(3)
        categories = [
            VocabularyListCategoricalColumn("a", "abc"),
            HashedCategoricalColumn("h", 7),
            CrossedColumn(("a", "h"), 11),
        ]
        buckets, number = BucketizedColumn(NumericColumn("n"), [0.0, 1.0]), NumericColumn("m")
        columns = [*categories, buckets, number]
        width = {column.name: getattr(column, "num_buckets", 1) for column in columns}
        weights = {name: rng.normal(size=(size, 2)) for name, size in width.items()}
        batch = {
            "a": [["a", "b"], ["c"], ["zz"]],
            "h": ["u", "v", ""],
            "n": [-1.0, 0.5, 2.0],
            "m": [1.0, 2.0, 3.0],
        }
        matrix, _ = input_layer(batch, [*map(IndicatorColumn, categories), buckets, number])
        order = sorted(columns, key=lambda c: c.name + ("_indicator" if c in categories else ""))
        expected = matrix @ np.concatenate([weights[column.name] for column in order]) + 0.5
        np.testing.assert_allclose(linear_model(batch, columns, weights, 0.5), expected, rtol=1e-5)
        shapes = golden("linear_and_shared")["linear_vars"]
        assert [width["a"], 1] == shapes["a"][0] and shapes["n"] == [[1, 1]]

    def test_sequences(self):
        stored = golden("sequence_features")
        columns = [EmbeddingColumn(VocabularyListCategoricalColumn("t", "abc"), 2), NumericColumn("n")]
        tables = {"t_embedding": [[1, 10], [2, 20], [3, 30]]}
        batch = {"t": stored["in_t"], "n": stored["in_n"]}
        result, lengths = sequence_input_layer(batch, columns, tables)
        assert result.tolist() == stored["out"] and lengths.tolist() == stored["len"]
        with pytest.raises(FeatureError, match="'t_embedding': its sequences differ in length"):
            sequence_input_layer({"t": [["a"]], "n": [[1, 2]]}, columns, tables)

    def test_bad_batches(self):
        hashed = HashedCategoricalColumn("h", 3)
        with pytest.raises(FeatureError, match="'h' has ids: wrap it"):
            input_layer({"h": ["a"]}, [hashed])
        with pytest.raises(FeatureError, match="'x' has 1 rows, column 'h_indicator' has 2"):
            input_layer({"h": ["a", "b"], "x": [1.0]}, [X, IndicatorColumn(hashed)])
        with pytest.raises(FeatureError, match="two columns are named 'x'"):
            input_layer({"x": [1.0]}, [X, X])
        with pytest.raises(FeatureError, match="at least one column"):
            input_layer({}, [])


class TestMoreOfTensorFlow:
    """Cases run through TensorFlow 2.21 for this project: what is dropped where, and in which order things happen."""

    vocabulary = VocabularyListCategoricalColumn("x", ("a", "b", "c"))
    identity = IdentityCategoricalColumn("x", 4, 0)
    buckets = BucketizedColumn(NumericColumn("x", (2,)), (0.0, 10.0))
    columns = {  # noqa: RUF012
        "crossed x y 1000": CrossedColumn(("x", "y"), 1000),
        "crossed vocabulary y 1000": CrossedColumn((vocabulary, "y"), 1000),
        "crossed identity y 1000": CrossedColumn((identity, "y"), 1000),
        "crossed buckets y 1000": CrossedColumn((buckets, "y"), 1000),
        "hashed 1000": HashedCategoricalColumn("x", 1000),
        "vocabulary": vocabulary,
        "vocabulary oov 5": VocabularyListCategoricalColumn("x", ("a", "b", "c"), num_oov_buckets=5),
        "identity": identity,
    }

    @pytest.mark.parametrize("name", [name for name in golden("more")["cases"] if not name.startswith("weighted")])
    def test_ids(self, name):
        case = golden("more")["cases"][name]
        column = self.columns[case["column"]]
        crossed = isinstance(column, CrossedColumn)
        found = column.sparse_ids(case["batch"]) if crossed else column.all_ids(case["batch"])
        assert (found.rows.tolist(), found.ids.tolist()) == (case["rows"], case["ids"])

    @pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
    def test_weights_of_zero_and_below(self, combiner):
        case = golden("more")["cases"][f"weighted {combiner}"]
        column = EmbeddingColumn(WeightedCategoricalColumn(self.vocabulary, "w"), 2, combiner)
        result = column.dense(case["batch"], {column.name: [[1, 10], [2, 20], [3, 30]]})
        np.testing.assert_allclose(result, case["dense"], rtol=1e-6)

    def test_the_normalizer_comes_before_the_rounding(self):
        stored = golden("more")["normalizer"]
        column = NumericColumn("x", normalizer_fn=lambda x: x - stored["minus"])
        assert column.dense({"x": stored["x"]}).tolist() == stored["dense"]

    def test_nan_falls_in_the_last_bucket_whatever_the_default(self):
        column = BucketizedColumn(NumericColumn("x", default_value=7.0), [0, 10])
        assert column.buckets({"x": [np.nan]}).item() == golden("more")["nan_bucket"]

    def test_a_padded_sequence_ends_at_its_last_value(self):
        stored = golden("more")["padded_sequence"]
        columns = [IndicatorColumn(VocabularyListCategoricalColumn("t", "abc"))]
        result, lengths = sequence_input_layer({"t": stored["t"]}, columns)
        assert (result.tolist(), lengths.tolist()) == (stored["dense"], stored["lengths"])


class TestErrorsNameTheColumn:
    hashed = HashedCategoricalColumn("x", 5)
    weighted = WeightedCategoricalColumn(hashed, "w")

    @pytest.mark.parametrize(
        "value",
        [3, None, "abc", {"a": 1}, np.ma.array(["a"], mask=[True]), ["a\0"], [b"a\0"], np.array([2**63], np.uint64)],
        ids=repr,
    )
    def test_categories(self, value):
        with pytest.raises(FeatureError, match="column 'x'"):
            ids(self.hashed, x=value)

    @pytest.mark.parametrize("weights", ["q", 1.0, [["a"]], [[1.0], 2.0], [1.0, 2.0], None])
    def test_weights(self, weights):
        with pytest.raises(FeatureError, match="column 'x_weighted_by_w'"):
            indicator(self.weighted, x=[["a"]], w=weights)

    @pytest.mark.parametrize("boundaries", [["a"], [None], [np.nan], [0, "b"]])
    def test_boundaries(self, boundaries):
        with pytest.raises(FeatureError, match="'x_bucketized': boundaries"):
            BucketizedColumn(X, boundaries)

    def test_numeric_descriptions(self):
        with pytest.raises(FeatureError, match="'x': shape must be a tuple"):
            NumericColumn("x", 2)
        for wrong in (lambda x: x[:1], lambda x: x.sum(), lambda x: x.astype(str)):
            with pytest.raises(FeatureError, match="'x': normalizer_fn turned"):
                NumericColumn("x", normalizer_fn=wrong).dense({"x": [1.0, 2.0]})

    @pytest.mark.parametrize("table", [[[1.0], [1.0, 2.0]], "abc", [["a", "b"]]])
    def test_tables(self, table):
        with pytest.raises(FeatureError, match="'x_embedding': its table must be an array of numbers"):
            EmbeddingColumn(self.hashed, 2).dense({"x": ["a"]}, {"x_embedding": table})

    def test_linear_models(self):
        for weights in (np.zeros(5), np.zeros((4, 1)), np.zeros((6, 1))):
            with pytest.raises(FeatureError, match="'x': its weights have shape"):
                linear_model({"x": ["a"]}, [self.hashed], {"x": weights})
        with pytest.raises(FeatureError, match="'x_embedding': a linear model takes"):
            linear_model({"x": ["a"]}, [EmbeddingColumn(self.hashed, 2)], {"x_embedding": np.zeros((5, 2))})
        with pytest.raises(FeatureError, match="'x' has 1 rows, those before it have 2"):
            linear_model(
                {"x": ["a"], "n": [1.0, 2.0]}, [self.hashed, NumericColumn("n")], {"x": np.zeros((5, 1)), "n": [[1.0]]}
            )

    def test_sequences(self):
        for column in (
            BucketizedColumn(X, [0]),
            IndicatorColumn(CrossedColumn(("x", "y"), 5)),
            IndicatorColumn(self.weighted),
        ):
            with pytest.raises(FeatureError, match="a sequence takes columns of one key"):
                sequence_input_layer({"x": [["a"]], "w": [[1.0]]}, [column])
        with pytest.raises(FeatureError, match="'x_indicator': expected a list of values for each row"):
            sequence_input_layer({"x": ["a", "b"]}, [IndicatorColumn(self.hashed)])
        result, lengths = sequence_input_layer({"x": []}, [IndicatorColumn(self.hashed)])
        assert result.shape == (0, 0, 5) and lengths.tolist() == []
