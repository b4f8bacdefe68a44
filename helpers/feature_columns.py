# ruff: noqa: D102 - what every column offers is explained once, in `Column`
"""Feature columns: how a table of prices, brands and dates becomes the numbers that a network sees.

Results are bit-compatible with TensorFlow 2.21's ``tf.feature_column``, without TensorFlow. Sources: the
``feature_column`` guide and `feature_column_v2.py` of TensorFlow; G. Pike's FarmHash (`farmhashna`, Fingerprint64);
`sparse_cross_op.cc` for crosses.

A *batch* is a mapping from names to values: arrays of shape (rows,) or (rows, values), lists of the same shapes, or
lists of lists of different lengths. As in TensorFlow, '' and -1 mean "missing" in a rectangle of categories, but not
in lists of different lengths and not in a cross.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from helpers.farmhash import fingerprint64, fingerprint_cat64

Batch = Mapping[str, Any]

_CROSS_SEED = 0xDECAFCAFFE
_NO_BUCKETS = 2**63 - 1


class FeatureError(ValueError):
    """A column or a batch is wrong; the message names the column."""


# --- what a batch holds -------------------------------------------------------------------------------------------


class SparseIds(NamedTuple):
    """Categories of a batch: id `ids[j]` with weight `weights[j]` stands in row `rows[j]`; rows ascend."""

    rows: NDArray[np.int64]
    ids: NDArray[np.int64]
    weights: NDArray[np.float32]
    count: int  #: number of rows, also of those without any category


def _get(batch: Batch, key: str, name: str) -> Any:
    if key not in batch:
        raise FeatureError(f"column {name!r}: the batch has no {key!r}; it has {', '.join(map(repr, batch))}")
    return batch[key]


class _Values(NamedTuple):
    rows: NDArray[np.int64]
    values: NDArray
    count: int
    rectangular: bool


def _values(batch: Batch, key: str, name: str) -> _Values:
    """Read the categories of one key, in the order of the rows; nothing is dropped yet."""
    value = _get(batch, key, name)
    if isinstance(value, np.ma.MaskedArray):
        raise FeatureError(f"column {name!r}: masked arrays are not understood; fill the gaps with '' or -1")
    if isinstance(value, np.ndarray):
        if value.ndim not in (1, 2):
            raise FeatureError(f"column {name!r}: expected shape (rows,) or (rows, values), got {value.shape}")
        width = value.shape[1] if value.ndim == 2 else 1
        return _Values(np.repeat(np.arange(len(value)), width), _one_type(value.ravel(), name), len(value), True)
    if not isinstance(value, (list, tuple)):
        raise FeatureError(f"column {name!r}: expected an array or a list with one entry a row, got {value!r}")
    nested = [isinstance(row, (list, tuple, np.ndarray)) for row in value]
    if len(set(nested)) > 1:
        raise FeatureError(f"column {name!r}: some rows are lists and some are not")
    lists = bool(nested) and nested[0]
    sizes = np.array([len(row) for row in value] if lists else [1] * len(value), int)
    flat = list(itertools.chain.from_iterable(value)) if lists else list(value)
    rectangular = len(np.unique(sizes)) <= 1
    return _Values(np.repeat(np.arange(len(sizes)), sizes), _one_type(flat, name), len(sizes), rectangular)


def _one_type(values: Any, name: str) -> NDArray:
    """Turn values into an array of text or of int64, and refuse mixtures and everything else."""
    array = values if isinstance(values, np.ndarray) else None
    if array is None or array.dtype == object:
        types = set(map(type, values))
        whole = {kind for kind in types if issubclass(kind, (int, np.integer)) and kind is not bool}
        if not (types <= {str, np.str_} or types <= {bytes, np.bytes_} or types == whole):
            raise FeatureError(
                f"column {name!r}: categories must be all text or all integers, got "
                + ", ".join(sorted(kind.__name__ for kind in types))
            )
        if not whole and any(value[-1:] in ("\0", b"\0") for value in values):
            raise FeatureError(f"column {name!r}: a text that ends in NUL cannot be kept apart from one without")
        array = np.asarray(list(values)) if len(types) else np.zeros(0, str)
    if array.dtype.kind == "S":
        try:
            array = np.char.decode(array, "utf-8")
        except UnicodeDecodeError as error:
            raise FeatureError(f"column {name!r}: a category is not UTF-8: {error}") from None
    if array.dtype.kind not in "Uiu":
        raise FeatureError(f"column {name!r}: categories must be text or integers, got {array.dtype}")
    if array.dtype.kind == "U":
        return array
    if array.size and array.max() > np.iinfo(np.int64).max:
        raise FeatureError(f"column {name!r}: {array.max()} does not fit in 64 bits with a sign")
    return array.astype(np.int64)


def _places(rows: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Place of each entry within its row, from 0, where row i has sizes[i] entries."""
    return np.arange(len(rows)) - (np.cumsum(sizes) - sizes)[rows]


def _present(values: NDArray) -> NDArray[np.bool_]:
    return values != ("" if values.dtype.kind == "U" else -1)


def _text_fingerprints(values: NDArray) -> NDArray[np.uint64]:
    """Fingerprints of texts; an integer is hashed as its decimal text."""
    if values.dtype.kind == "U":
        return fingerprint64(values)
    distinct, where = np.unique(values, return_inverse=True)
    return fingerprint64(distinct.astype(str))[where]


class Column:
    """What every column is: an immutable description, which a batch is read with.

    Attributes
    ----------
    name
        Orders the columns of the input layer.
    width, labels
        Of a dense column: how many numbers it gives for each row, and the name of each of them.
    num_buckets, labels
        Of a categorical column: ids are below this number; the name of each id.

    A dense column has ``dense(batch, tables)``: its numbers, float32, shape (rows, width). A categorical one has
    ``sparse_ids(batch)``: the ids of what is present. A bucketized column is both.
    """


# --- dense columns of numbers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NumericColumn(Column):
    """Numbers as they are, after an optional normalizer.

    Parameters
    ----------
    key
        Name in the batch.
    shape
        Shape of one row's value.
    default_value
        Stands in for NaN; without it, NaN is an error.
    normalizer_fn
        Applied to the array of rows by `shape`, before it is rounded to float32.
    """

    key: str
    shape: tuple[int, ...] = (1,)
    default_value: float | None = None
    normalizer_fn: Callable[[NDArray], NDArray] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.shape, tuple) or not self.shape or min(self.shape) < 1:
            raise FeatureError(f"column {self.key!r}: shape must be a tuple of positive numbers, got {self.shape}")

    @property
    def name(self) -> str:
        return self.key

    @property
    def width(self) -> int:
        return int(np.prod(self.shape))

    @property
    def labels(self) -> list[str]:
        return [self.key] if self.width == 1 else [f"{self.key}[{i}]" for i in range(self.width)]

    def dense(self, batch: Batch, tables: Mapping[str, NDArray] | None = None) -> NDArray[np.float32]:
        x = self.numbers(batch)
        missing = np.isnan(x)
        if missing.any():
            if self.default_value is None:
                row = int(np.argwhere(missing)[0][0])
                raise FeatureError(f"column {self.name!r}: row {row} is NaN and the column has no default_value")
            x = np.where(missing, self.default_value, x)
        return self.normalized(x).reshape(len(x), self.width)

    def normalized(self, x: NDArray) -> NDArray[np.float32]:
        """Apply the normalizer, then round to float32: in this order, as TensorFlow."""
        if self.normalizer_fn is not None:
            given, x = x, np.asarray(self.normalizer_fn(x))
            if x.shape != given.shape or x.dtype.kind not in "biuf":
                raise FeatureError(
                    f"column {self.name!r}: normalizer_fn turned shape {given.shape} into {x.dtype} of shape {x.shape}"
                )
        return x.astype(np.float32)

    def numbers(self, batch: Batch) -> NDArray:
        """Read the numbers as they are, shape (rows, *shape)."""
        value = _get(batch, self.key, self.name)
        try:
            x = np.asarray(value)
        except ValueError:
            raise FeatureError(f"column {self.name!r}: rows differ in length") from None
        if x.dtype.kind not in "biuf":
            raise FeatureError(f"column {self.name!r}: expected numbers, got {x.dtype}")
        if x.ndim == 0 or x.size != len(x) * self.width:
            raise FeatureError(f"column {self.name!r}: expected shape (rows, *{self.shape}), got {x.shape}")
        return x.reshape(len(x), *self.shape)


@dataclass(frozen=True)
class BucketizedColumn(Column):
    """One-hot of the bucket that a number falls in: the number of boundaries that are at most x.

    Numbers and boundaries are compared in float32; NaN falls in the last bucket, as in TensorFlow.
    """

    source_column: NumericColumn
    boundaries: tuple[float, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.source_column, NumericColumn) or len(self.source_column.shape) != 1:
            raise FeatureError(f"bucketized column: the source must be a one-dimensional numeric column, got "
                               f"{self.source_column}")  # fmt: skip
        object.__setattr__(self, "boundaries", tuple(self.boundaries))
        numbers = all(isinstance(b, (int, float, np.number)) and b == b for b in self.boundaries)
        if not self.boundaries or not numbers or not all(a < b for a, b in itertools.pairwise(self.boundaries)):
            raise FeatureError(f"column {self.name!r}: boundaries must be sorted and distinct, got {self.boundaries}")

    @property
    def name(self) -> str:
        return f"{self.source_column.key}_bucketized"

    @property
    def num_buckets(self) -> int:
        return (len(self.boundaries) + 1) * self.source_column.shape[0]

    @property
    def width(self) -> int:
        return self.num_buckets

    @property
    def labels(self) -> list[str]:
        ends = ["-inf", *map(str, self.boundaries), "inf"]
        return [f"{source}[{a}, {b})" for source in self.source_column.labels for a, b in itertools.pairwise(ends)]

    def buckets(self, batch: Batch) -> NDArray[np.int64]:
        """Bucket of each number, shape (rows, numbers)."""
        x = self.source_column.normalized(self.source_column.numbers(batch))
        return np.searchsorted(np.asarray(self.boundaries, np.float32), x, side="right")

    def sparse_ids(self, batch: Batch) -> SparseIds:
        buckets = self.buckets(batch)
        count, numbers = buckets.shape
        ids = buckets + np.arange(numbers) * (len(self.boundaries) + 1)
        return SparseIds(np.repeat(np.arange(count), numbers), ids.ravel(), np.ones(ids.size, np.float32), count)

    all_ids = sparse_ids  # every number has a bucket

    def dense(self, batch: Batch, tables: Mapping[str, NDArray] | None = None) -> NDArray[np.float32]:
        return _multi_hot(self.sparse_ids(batch), self.width)


def _multi_hot(sparse: SparseIds, width: int) -> NDArray[np.float32]:
    flat = np.bincount(sparse.rows * width + sparse.ids, sparse.weights, sparse.count * width)
    return flat.reshape(sparse.count, width).astype(np.float32)


# --- categories ---------------------------------------------------------------------------------------------------


class CategoricalColumn(Column):
    """What all categorical columns share: they turn the values of one key into ids below `num_buckets`."""

    key: str
    num_buckets: int

    @property
    def name(self) -> str:
        return self.key

    @property
    def labels(self) -> list[str]:
        return [str(i) for i in range(self.num_buckets)]

    def sparse_ids(self, batch: Batch) -> SparseIds:
        found = self.all_ids(batch)
        known = found.ids >= 0
        return SparseIds(found.rows[known], found.ids[known], found.weights[known], found.count)

    def all_ids(self, batch: Batch) -> SparseIds:
        """Give what `sparse_ids` gives, and -1 for each category that has no id: a cross takes these, too."""
        found = _values(batch, self.key, self.name)
        return self._look_up(found, np.ones(len(found.rows), np.float32))

    def _look_up(self, found: _Values, weights: NDArray[np.float32]) -> SparseIds:
        rows, values, count, rectangular = found
        if rectangular:
            present = _present(values)
            rows, values, weights = rows[present], values[present], weights[present]
        return SparseIds(rows, self._ids(values, rows), weights, count)

    def _ids(self, values: NDArray, rows: NDArray) -> NDArray[np.int64]:
        raise NotImplementedError

    def _require(self, values: NDArray, kind: str) -> None:
        if values.size and (values.dtype.kind == "U") != (kind == "text"):
            raise FeatureError(f"column {self.name!r}: expected {kind}, got {values.dtype}")


@dataclass(frozen=True)
class IdentityCategoricalColumn(CategoricalColumn):
    """Integers that are ids already.

    An id outside 0 … num_buckets - 1 becomes `default_value`; without one it is an error. (TensorFlow gives a row
    of zeros instead, and nobody notices.)
    """

    key: str
    num_buckets: int
    default_value: int | None = None

    def __post_init__(self) -> None:
        if self.num_buckets < 1:
            raise FeatureError(f"column {self.key!r}: num_buckets must be at least 1, got {self.num_buckets}")
        if self.default_value is not None and not 0 <= self.default_value < self.num_buckets:
            raise FeatureError(
                f"column {self.key!r}: default_value {self.default_value} is not in [0, {self.num_buckets})"
            )

    def _ids(self, values: NDArray, rows: NDArray) -> NDArray[np.int64]:
        self._require(values, "integers")
        outside = (values < 0) | (values >= self.num_buckets)
        if outside.any() and self.default_value is None:
            at = int(outside.argmax())
            raise FeatureError(
                f"column {self.name!r}: id {values[at]} in row {rows[at]} is not in [0, {self.num_buckets}), "
                "and the column has no default_value"
            )
        return np.where(outside, self.default_value or 0, values).astype(np.int64)


@dataclass(frozen=True)
class VocabularyListCategoricalColumn(CategoricalColumn):
    """Ids are places in a vocabulary of texts or of integers.

    A value that is not in it gets `default_value` (-1: it is left out) or, with `num_oov_buckets` > 0, the id
    len(vocabulary_list) + Fingerprint64(value) mod num_oov_buckets.
    """

    key: str
    vocabulary_list: tuple[Any, ...]
    default_value: int = -1
    num_oov_buckets: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocabulary_list", tuple(self.vocabulary_list))
        if not self.vocabulary_list:
            raise FeatureError(f"column {self.key!r}: vocabulary_list must not be empty")
        object.__setattr__(self, "vocabulary_list", tuple(_one_type(self.vocabulary_list, self.key).tolist()))
        if len(set(self.vocabulary_list)) < len(self.vocabulary_list):
            raise FeatureError(f"column {self.key!r}: vocabulary_list holds a value twice")
        if self.num_oov_buckets < 0:
            raise FeatureError(f"column {self.key!r}: num_oov_buckets must not be negative")
        if self.num_oov_buckets and self.default_value != -1:
            raise FeatureError(f"column {self.key!r}: give num_oov_buckets or default_value, not both")
        if not -1 <= self.default_value < len(self.vocabulary_list):
            raise FeatureError(f"column {self.key!r}: default_value {self.default_value} is no place in the vocabulary")

    @classmethod
    def from_file(cls, key: str, path: str | Path, vocabulary_size: int | None = None, **options: Any) -> Any:
        """Read the vocabulary from a UTF-8 file, one entry a line, of which the first `vocabulary_size` count."""
        entries = Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n")
        if vocabulary_size is not None and not 0 < vocabulary_size <= len(entries):
            raise FeatureError(f"column {key!r}: {path} holds {len(entries)} entries, not {vocabulary_size}")
        return cls(key, tuple(entries[:vocabulary_size]), **options)

    @property
    def num_buckets(self) -> int:
        return len(self.vocabulary_list) + self.num_oov_buckets

    @property
    def labels(self) -> list[str]:
        return [*map(str, self.vocabulary_list), *(f"other {i}" for i in range(self.num_oov_buckets))]

    def _ids(self, values: NDArray, rows: NDArray) -> NDArray[np.int64]:
        vocabulary = _one_type(self.vocabulary_list, self.key)
        self._require(values, "text" if vocabulary.dtype.kind == "U" else "integers")
        order = np.argsort(vocabulary)
        place = order[np.searchsorted(vocabulary, values, sorter=order).clip(max=len(order) - 1)]
        unknown = vocabulary[place] != values
        if self.num_oov_buckets and unknown.any():
            hashed = _text_fingerprints(values[unknown]) % np.uint64(self.num_oov_buckets)
            place[unknown] = len(vocabulary) + hashed.astype(np.int64)
        else:
            place[unknown] = self.default_value
        return place


@dataclass(frozen=True)
class HashedCategoricalColumn(CategoricalColumn):
    """Id = Fingerprint64(value) mod hash_bucket_size; an integer is hashed as its decimal text."""

    key: str
    hash_bucket_size: int

    def __post_init__(self) -> None:
        if self.hash_bucket_size < 1:
            raise FeatureError(f"column {self.key!r}: hash_bucket_size must be at least 1, got {self.hash_bucket_size}")

    @property
    def num_buckets(self) -> int:
        return self.hash_bucket_size

    def _ids(self, values: NDArray, rows: NDArray) -> NDArray[np.int64]:
        return (_text_fingerprints(values) % np.uint64(self.hash_bucket_size)).astype(np.int64)


@dataclass(frozen=True)
class CrossedColumn(CategoricalColumn):
    """All combinations of the values of several keys in a row, hashed; the last key varies fastest.

    Parameters
    ----------
    keys
        At least two: names in the batch (texts, or integers, which enter as they are) or columns with ids
        (bucketized, vocabulary, identity, crossed), whose ids enter. The order matters for the hash, not for the name.
    hash_bucket_size
        Number of ids; 0 for ids below 2⁶³ - 1.
    hash_key
        Where the folding of the fingerprints starts.
    """

    keys: tuple[Any, ...]
    hash_bucket_size: int
    hash_key: int = _CROSS_SEED

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", tuple(self.keys))
        if len(self.keys) < 2:
            raise FeatureError(f"crossed column: keys must name at least two columns, got {self.keys}")
        for key in self.keys:
            if isinstance(key, HashedCategoricalColumn):
                raise FeatureError(
                    f"crossed column: {key.name!r} is hashed already, and hashing twice collides more; give its name"
                )
            if not isinstance(key, (str, CategoricalColumn, BucketizedColumn)) or isinstance(
                key, WeightedCategoricalColumn
            ):
                raise FeatureError(f"crossed column: a key must be a name or a column with ids, got {key}")
        if self.hash_bucket_size < 0:
            raise FeatureError(f"column {self.name!r}: hash_bucket_size must not be negative")

    @property
    def leaves(self) -> list[Any]:
        """The keys, with those of crossed columns in their place."""
        inner = (key.leaves if isinstance(key, CrossedColumn) else [key] for key in self.keys)
        return list(itertools.chain.from_iterable(inner))

    @property
    def name(self) -> str:
        return "_X_".join(sorted(leaf if isinstance(leaf, str) else leaf.name for leaf in self.leaves))

    @property
    def num_buckets(self) -> int:
        return self.hash_bucket_size or _NO_BUCKETS

    @property
    def labels(self) -> list[str]:
        return [str(i) for i in range(self.hash_bucket_size)]

    def sparse_ids(self, batch: Batch) -> SparseIds:
        parts = [self._leaf(leaf, batch) for leaf in self.leaves]
        count = parts[0][2]
        for leaf, (_, _, other) in zip(self.leaves, parts, strict=True):
            if other != count:
                raise FeatureError(f"column {self.name!r}: {leaf!r} has {other} rows, the first key has {count}")
        sizes = np.array([np.bincount(rows, minlength=count) for rows, _, _ in parts])
        combinations = sizes.prod(axis=0)
        rows = np.repeat(np.arange(count), combinations)
        place = _places(rows, combinations)
        hashed = np.full(len(rows), self.hash_key % 2**64, np.uint64)
        for i, (_, fingerprints, _) in enumerate(parts):
            later = sizes[i + 1 :].prod(axis=0)[rows]
            starts = (np.cumsum(sizes[i]) - sizes[i])[rows]
            hashed = fingerprint_cat64(hashed, fingerprints[starts + place // later % sizes[i][rows]])
        ids = (hashed % np.uint64(self.num_buckets)).astype(np.int64)
        return SparseIds(rows, ids, np.ones(len(rows), np.float32), count)

    def _leaf(self, leaf: Any, batch: Batch) -> tuple[NDArray, NDArray[np.uint64], int]:
        if not isinstance(leaf, str):
            found = leaf.all_ids(batch)
            return found.rows, found.ids.astype(np.uint64), found.count
        rows, values, count, _ = _values(batch, leaf, self.name)
        return rows, fingerprint64(values) if values.dtype.kind == "U" else values.astype(np.uint64), count


@dataclass(frozen=True)
class WeightedCategoricalColumn(CategoricalColumn):
    """A categorical column whose values carry weights, given under a key of their own in the same shape."""

    categorical_column: CategoricalColumn
    weight_feature_key: str

    def __post_init__(self) -> None:
        if not isinstance(self.categorical_column, CategoricalColumn) or isinstance(
            self.categorical_column, (CrossedColumn, WeightedCategoricalColumn)
        ):
            raise FeatureError(f"weighted column: expected a categorical column of one key, got "
                               f"{self.categorical_column}")  # fmt: skip

    @property
    def key(self) -> str:
        return self.categorical_column.key

    @property
    def name(self) -> str:
        return f"{self.categorical_column.name}_weighted_by_{self.weight_feature_key}"

    @property
    def num_buckets(self) -> int:
        return self.categorical_column.num_buckets

    @property
    def labels(self) -> list[str]:
        return self.categorical_column.labels

    def all_ids(self, batch: Batch) -> SparseIds:
        found = _values(batch, self.key, self.name)
        given = _get(batch, self.weight_feature_key, self.name)
        try:
            if isinstance(given, (list, tuple)) and given and isinstance(given[0], (list, tuple, np.ndarray)):
                sizes = [len(row) for row in given]
                weights = np.array(list(itertools.chain.from_iterable(given)), np.float32)
            else:
                sizes = [int(np.prod(np.shape(given)[1:]))] * len(given)
                weights = np.asarray(given, np.float32).ravel()
        except (TypeError, ValueError):
            raise FeatureError(f"column {self.name!r}: the weights must be numbers, got {given!r}") from None
        if sizes != np.bincount(found.rows, minlength=found.count).tolist():
            raise FeatureError(f"column {self.name!r}: weights and categories differ in shape")
        return self.categorical_column._look_up(found, weights)


# --- dense columns of categories ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class IndicatorColumn(Column):
    """Multi-hot: how often (or with what total weight) each category stands in the row."""

    categorical_column: CategoricalColumn

    def __post_init__(self) -> None:
        _require_categorical(self.categorical_column, "indicator column")

    @property
    def name(self) -> str:
        return f"{self.categorical_column.name}_indicator"

    @property
    def width(self) -> int:
        return self.categorical_column.num_buckets

    @property
    def labels(self) -> list[str]:
        return [f"{self.categorical_column.name}={label}" for label in self.categorical_column.labels]

    def dense(self, batch: Batch, tables: Mapping[str, NDArray] | None = None) -> NDArray[np.float32]:
        return _multi_hot(self.categorical_column.sparse_ids(batch), self.width)


@dataclass(frozen=True)
class EmbeddingColumn(Column):
    """A row of a table for each category, combined over the categories of a row.

    Parameters
    ----------
    categorical_column
        Where the ids come from.
    dimension
        Numbers for each category.
    combiner
        "sum" Σwe, "mean" Σwe/Σw or "sqrtn" Σwe/√Σw². Except in "sum", weights that are not positive are left out.
        A row without categories gives zeros.
    max_norm
        Rows of the table are scaled down to this length before they are combined; the table itself stays.
    table
        Name of the table; columns that name the same one share it. The column's own name if not given.
    """

    categorical_column: CategoricalColumn
    dimension: int
    combiner: str = "mean"
    max_norm: float | None = None
    table: str | None = None

    def __post_init__(self) -> None:
        _require_categorical(self.categorical_column, "embedding column")
        if self.dimension < 1:
            raise FeatureError(f"column {self.name!r}: dimension must be at least 1, got {self.dimension}")
        if self.combiner not in ("sum", "mean", "sqrtn"):
            raise FeatureError(f"column {self.name!r}: combiner must be sum, mean or sqrtn, got {self.combiner!r}")
        if self.max_norm is not None and not self.max_norm > 0:
            raise FeatureError(f"column {self.name!r}: max_norm must be positive, got {self.max_norm}")

    @property
    def name(self) -> str:
        return f"{self.categorical_column.name}_{'shared_' if self.table else ''}embedding"

    @property
    def table_name(self) -> str:
        """Name of the table that the rows come from."""
        return self.table or self.name

    @property
    def width(self) -> int:
        return self.dimension

    @property
    def labels(self) -> list[str]:
        return [f"{self.name}[{i}]" for i in range(self.dimension)]

    def dense(self, batch: Batch, tables: Mapping[str, NDArray] | None = None) -> NDArray[np.float32]:
        table = _table(_get(tables or {}, self.table_name, self.name), self.name)
        expected = (self.categorical_column.num_buckets, self.dimension)
        if table.shape != expected:
            raise FeatureError(f"column {self.name!r}: the table has shape {table.shape}, expected {expected}")
        return combine(self.categorical_column.sparse_ids(batch), table, self.combiner, self.max_norm)


def _table(given: Any, name: str) -> NDArray[np.float32]:
    try:
        return np.asarray(given, np.float32)
    except (TypeError, ValueError):
        raise FeatureError(f"column {name!r}: its table must be an array of numbers, got {given!r}") from None


def combine(
    sparse: SparseIds, table: NDArray[np.float32], combiner: str = "mean", max_norm: float | None = None
) -> NDArray[np.float32]:
    """Look up the ids in `table` and combine them for each row; see `EmbeddingColumn`."""
    rows, ids, weights, count = sparse
    if combiner != "sum":
        keep = weights > 0
        rows, ids, weights = rows[keep], ids[keep], weights[keep]
    found = table[ids]
    if max_norm is not None:
        length = np.sqrt((found**2).sum(axis=1, keepdims=True))
        found = found * (np.float32(max_norm) / np.maximum(length, np.float32(max_norm)))
    result = np.zeros((count, table.shape[1]), np.float32)
    if len(rows):
        starts = np.flatnonzero(np.diff(rows, prepend=-1))
        total = np.add.reduceat(found * weights[:, None], starts)
        if combiner != "sum":
            scale = np.add.reduceat(weights if combiner == "mean" else weights**2, starts)
            total /= (scale if combiner == "mean" else np.sqrt(scale))[:, None]
        result[rows[starts]] = total
    return result


def _require_categorical(column: Any, what: str) -> None:
    if not isinstance(column, (CategoricalColumn, BucketizedColumn)):
        raise FeatureError(f"{what}: expected a categorical column, got {column}")
    if isinstance(column, CrossedColumn) and not column.hash_bucket_size:
        raise FeatureError(f"{what}: {column.name!r} has no hash_bucket_size, so its ids are too large for a table")


# --- the whole batch ----------------------------------------------------------------------------------------------

DenseColumn = NumericColumn | BucketizedColumn | IndicatorColumn | EmbeddingColumn


def initial_tables(columns: Sequence[DenseColumn], rng: np.random.Generator) -> dict[str, NDArray[np.float32]]:
    """Draw a table for each embedding: normal with deviation 1/√dimension, cut off beyond two deviations."""
    tables = {}
    for column in columns:
        if isinstance(column, EmbeddingColumn) and column.table_name not in tables:
            table = rng.normal(size=(column.categorical_column.num_buckets, column.dimension))
            while (beyond := np.abs(table) > 2).any():
                table[beyond] = rng.normal(size=beyond.sum())
            tables[column.table_name] = (table / np.sqrt(column.dimension)).astype(np.float32)
    return tables


def input_layer(
    batch: Batch, columns: Sequence[DenseColumn], tables: Mapping[str, NDArray] | None = None
) -> tuple[NDArray[np.float32], list[str]]:
    """Turn a batch into the matrix that the network sees.

    Parameters
    ----------
    batch
        Named values.
    columns
        Dense columns; the matrix holds them in the order of their names, whatever order they are given in.
    tables
        Embedding tables by name, each of shape (num_buckets, dimension).

    Returns
    -------
    matrix, labels
        Shape (rows, total width), and the name of each of its columns.

    Raises
    ------
    FeatureError
        Naming the column: a key is missing, a value has the wrong type or lies out of range, rows differ in number.
    """
    ordered = _ordered(columns)
    for column in ordered:
        if not isinstance(column, DenseColumn):
            raise FeatureError(f"column {column.name!r} has ids: wrap it in an indicator or an embedding column")
    parts = [column.dense(batch, tables) for column in ordered]
    for column, part in zip(ordered, parts, strict=True):
        if len(part) != len(parts[0]):
            raise FeatureError(
                f"column {column.name!r} has {len(part)} rows, column {ordered[0].name!r} has {len(parts[0])}"
            )
    return np.concatenate(parts, axis=1), [label for column in ordered for label in column.labels]


def linear_model(
    batch: Batch, columns: Sequence[Any], weights: Mapping[str, ArrayLike], bias: ArrayLike = 0.0
) -> NDArray[np.float32]:
    """Sum of the weights of everything that a row holds.

    Parameters
    ----------
    batch
        Named values.
    columns
        Numeric, bucketized and categorical columns.
    weights
        For each column's name an array of shape (width or num_buckets, units).
    bias
        Shape (units,) or a number.

    Returns
    -------
    ndarray, shape (rows, units)
        A categorical column adds up the weights of its ids: its one-hot matrix is never built.
    """
    total, count = np.asarray(bias, np.float32), None
    for column in _ordered(columns):
        dense = isinstance(column, (NumericColumn, IndicatorColumn))
        if not dense and not isinstance(column, (CategoricalColumn, BucketizedColumn)):
            raise FeatureError(f"column {column.name!r}: a linear model takes numeric and categorical columns")
        size = column.width if dense else column.num_buckets
        table = _table(_get(weights, column.name, column.name), column.name)
        if table.ndim != 2 or len(table) != size:
            raise FeatureError(
                f"column {column.name!r}: its weights have shape {table.shape}, expected ({size}, units)"
            )
        part = column.dense(batch) @ table if dense else combine(column.sparse_ids(batch), table, "sum")
        if count not in (None, len(part)):
            raise FeatureError(f"column {column.name!r} has {len(part)} rows, those before it have {count}")
        total, count = total + part, len(part)
    return total


def sequence_input_layer(
    batch: Batch, columns: Sequence[DenseColumn], tables: Mapping[str, NDArray] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Turn a batch of sequences (lists of different lengths) into an array padded with zeros.

    Returns
    -------
    array, lengths
        Shape (rows, longest, total width), and the length of each row's sequence.
    """
    ordered = _ordered(columns)
    steps, lengths = {}, None
    for column in ordered:
        source = getattr(column, "categorical_column", column)
        key = getattr(source, "key", None)
        if key is None or isinstance(source, WeightedCategoricalColumn):
            raise FeatureError(f"column {column.name!r}: a sequence takes columns of one key, without weights")
        value = _get(batch, key, column.name)
        if not all(isinstance(row, (list, tuple, np.ndarray)) for row in value):
            raise FeatureError(f"column {column.name!r}: expected a list of values for each row")
        here = np.array([len(row) for row in value], int)
        if not isinstance(column, NumericColumn):  # a padded row ends at its last value
            rows, values, count, rectangular = _values(batch, key, column.name)
            if rectangular:
                place = _places(rows, here) + 1
                here = np.zeros(count, int)
                np.maximum.at(here, rows[_present(values)], place[_present(values)])
        if lengths is not None and not np.array_equal(here, lengths):
            raise FeatureError(f"column {column.name!r}: its sequences differ in length from those before it")
        lengths = here
        steps[key] = [step for row, length in zip(value, here, strict=True) for step in row[:length]]
    matrix, _ = input_layer(steps, ordered, tables)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    result = np.zeros((len(lengths), lengths.max(initial=0), matrix.shape[1]), np.float32)
    result[rows, _places(rows, lengths)] = matrix
    return result, lengths


def _ordered(columns: Sequence[Any]) -> list[Any]:
    ordered = sorted(columns, key=lambda column: column.name)
    for a, b in itertools.pairwise(ordered):
        if a.name == b.name:
            raise FeatureError(f"two columns are named {a.name!r}")
    if not ordered:
        raise FeatureError("give at least one column")
    return ordered
