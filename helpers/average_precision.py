"""Average precision of object detectors: PASCAL VOC's two definitions and COCO's, from boxes to the mean over classes.

Sources: the VOC development kit (``VOCevaldet.m``, ``VOCap.m``); M. Everingham et al., The PASCAL Visual Object
Classes (VOC) Challenge, IJCV 88 (2010); ``cocoeval.py`` of pycocotools 2.0.11 for COCO.

A *box* is x1, y1, x2, y2 in pixels with x1 <= x2 and y1 <= y2. Detections are `boxes`, `scores`, `classes` and
`images`, ground truth is `true_boxes`, `true_classes` and `true_images`: one row for each box, in any order. Ids of
classes and of images are integers or texts; without any, all boxes belong to one class or to one image.

Published numbers differ by conventions, which are parameters here:

=====================  ==============  ================  =====================  ==================================
convention             parameter       default           VOC development kit    COCO
=====================  ==============  ================  =====================  ==================================
one pixel more         plus_one        False             True                   False
IoU against threshold  strict          False: IoU >= t   False                  False
whom a detection asks  rule            "voc"             "voc"                  "coco"
best so many count     max_detections  None: all         None                   100 for each image *and class*
thresholds             thresholds      0.5               0.5                    COCO_THRESHOLDS
average                average         ap_area           ap_11_point until      ap_101_point
                                                         2009, then ap_area
=====================  ==============  ================  =====================  ==================================

Equal scores keep the order in which they are given (a stable sort of -score), and another order may give another
result. COCO's program does the same after sorting by image id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: IoU .50, .55 … .95, the float64 numbers that COCO's program uses (the ninth is 0.8999999999999999).
COCO_THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10).tolist())

_PAIRS_AT_ONCE = 2**17  # bounds the memory that pairs of boxes take before most of them are dropped


# --- boxes and their matches --------------------------------------------------------------------------------------


def iou(a: ArrayLike, b: ArrayLike, plus_one: bool = False) -> NDArray[np.float64]:
    """Intersection over union of each box in `a` with each box in `b`.

    Parameters
    ----------
    a, b
        Boxes, shapes (n, 4) and (m, 4).
    plus_one
        True counts the pixels x1 … x2 with both ends, as the VOC kit: a width is x2 - x1 + 1.

    Returns
    -------
    ndarray, shape (n, m)
        In [0, 1]; 0 where the intersection has no area, also for a box without area.

    Raises
    ------
    ValueError
        A box is not finite or has a negative side; the message names its row.
    """
    return _overlap(_boxes("a", a)[:, None], _boxes("b", b)[None], plus_one)


class Matches(NamedTuple):
    """What became of each detection, in the order given.

    A detection is a true positive, a false positive, or neither: on a difficult or crowd box, or beyond
    `max_detections`.
    """

    tp: NDArray[np.bool_]  #: true positive
    fp: NDArray[np.bool_]  #: false positive: on nothing, or a duplicate
    truth: NDArray[np.int64]  #: row of the true box it was assigned to, difficult ones too; -1 for none


def match_detections(
    boxes: ArrayLike,
    scores: ArrayLike,
    true_boxes: ArrayLike,
    *,
    classes: ArrayLike | None = None,
    true_classes: ArrayLike | None = None,
    class_ids: ArrayLike | None = None,
    images: ArrayLike | None = None,
    true_images: ArrayLike | None = None,
    image_ids: ArrayLike | None = None,
    difficult: ArrayLike | None = None,
    crowd: ArrayLike | None = None,
    threshold: float = 0.5,
    strict: bool = False,
    plus_one: bool = False,
    rule: Literal["voc", "coco"] = "voc",
    max_detections: int | None = None,
) -> Matches:
    """Assign detections to true boxes of their image and class, one after another by falling score.

    Parameters
    ----------
    boxes, scores, classes, images
        Detections: shape (n, 4), and (n,) each. A higher score is more confident.
    true_boxes, true_classes, true_images
        Ground truth: shape (m, 4), and (m,) each.
    class_ids, image_ids
        All classes and all images that there are; any other id is an error. Without `class_ids`, every class that
        occurs is one. Without `image_ids`, the images are those with ground truth: who evaluates detections on
        images without any must list the images, or a misspelt id would pass for a false positive.
    difficult
        Shape (m,), true for boxes that need not be found. A detection assigned to one is neither true nor false
        positive. By rule "voc" a difficult box takes any number of detections, by rule "coco" one.
    crowd
        Shape (m,), true for boxes around many objects; for rule "coco" only. Like a difficult one, but it takes any
        number of detections, and its overlap is the intersection over the *detection's* area.
    threshold
        Least IoU of a match, in (0, 1].
    strict
        True compares with > in place of >=, as py-faster-rcnn does.
    plus_one
        As in `iou`.
    rule
        "voc": a detection asks only the true box with the highest IoU (of equal ones the first), difficult or not;
        if that is taken, it is a duplicate, a false positive. "coco": it asks, by falling IoU (of equal ones the
        last first), all boxes that reach the threshold, difficult and crowd boxes after all others, and gets the
        first that is free; threshold 1 then means 1 - 1e-10.
    max_detections
        For each image and class, only so many of the highest scores count; None: all.

    Returns
    -------
    Matches
        Arrays of shape (n,).

    Raises
    ------
    ValueError
        A shape, an id, a box, a score or a parameter is wrong; the message names the array and the row.
    """
    problem = _gather(boxes, scores, true_boxes, classes, true_classes, class_ids, images, true_images, image_ids,
                      difficult, crowd, rule, max_detections)  # fmt: skip
    if np.ndim(threshold):
        raise ValueError(f"match_detections takes one threshold, got {threshold}")
    assigned = next(_assign(problem, _thresholds(threshold), strict, plus_one, rule))
    truth = np.full(problem.given, -1)
    tp, fp = np.zeros((2, problem.given), bool)
    truth[problem.rows] = assigned
    tp[problem.rows], fp[problem.rows] = problem.positive[assigned], assigned < 0
    return Matches(tp, fp, truth)


# --- from matches to a number -------------------------------------------------------------------------------------


class Curve(NamedTuple):
    """Precision and recall of the k highest scores, k = 1, 2, …; detections that are neither TP nor FP left out."""

    recall: NDArray[np.float64]
    precision: NDArray[np.float64]
    scores: NDArray[np.float64]  #: the lowest score among the k


def precision_recall(scores: ArrayLike, tp: ArrayLike, fp: ArrayLike, positives: int) -> Curve:
    """Count true and false positives by falling score; equal scores keep their order.

    Parameters
    ----------
    scores
        Of the detections of one class, shape (n,).
    tp, fp
        As in `Matches`, shape (n,).
    positives
        How many boxes there are to find: the true boxes that are neither difficult nor crowd.

    Returns
    -------
    Curve
        Arrays with one point for each detection that is TP or FP. Recall is NaN if `positives` is 0.

    Raises
    ------
    ValueError
        A score is NaN, lengths differ, a detection is both TP and FP, or there are more TP than `positives`.
    """
    scores = _scores(scores, np.size(scores))
    tp, fp = _flags("tp", tp, len(scores)), _flags("fp", fp, len(scores))
    if (tp & fp).any():
        raise ValueError(f"row {(tp & fp).argmax()} is both a true and a false positive")
    if not isinstance(positives, (int, np.integer)) or positives < 0:
        raise ValueError(f"positives must be an integer of at least 0, got {positives}")
    if positives < tp.sum():
        raise ValueError(f"positives is {positives}, but {tp.sum()} detections are true positives")
    order = np.argsort(-scores, kind="stable")
    order = order[(tp | fp)[order]]
    found = np.cumsum(tp[order])
    recall = found / positives if positives else np.full(len(order), np.nan)
    return Curve(recall, found / np.arange(1, len(order) + 1), scores[order])


def envelope(precision: ArrayLike) -> NDArray[np.float64]:
    """Greatest precision at this or any later point: the least non-increasing function that is nowhere below.

    Parameters
    ----------
    precision
        By rising recall, shape (n,).

    Returns
    -------
    ndarray, shape (n,)
    """
    return np.maximum.accumulate(np.asarray(precision, float)[::-1])[::-1]


def ap_area(recall: ArrayLike, precision: ArrayLike) -> float:
    """Area under the envelope, VOC from 2010 on: each step of recall times the envelope after it.

    Parameters
    ----------
    recall, precision
        Points by falling score, shape (n,) each, in [0, 1]; recall does not fall.

    Returns
    -------
    float
        In [0, 1]; 0.0 without any point; NaN if recall is NaN, which means that there was nothing to find.

    Raises
    ------
    ValueError
        The arrays differ in shape, or a value is impossible; the message names its row.
    """
    recall, precision = _points(recall, precision)
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope(precision)))


def ap_11_point(recall: ArrayLike, precision: ArrayLike, grid: Literal["exact", "arange"] = "exact") -> float:
    """Mean of the envelope at recall 0, .1, …, 1, VOC until 2009; 0 stands where the recall is not reached.

    Parameters, returns and errors are those of `ap_area`, and:

    Parameters
    ----------
    grid
        "exact": a recall of 3/10 reaches .3. "arange": the numbers of ``np.arange(0, 1.1, .1)``, which most Python
        translations use; the rounded .3, .6 and .7 are too large there, so that 3/10, 6/10 and 7/10 do not reach
        them. (MATLAB's 0:.1:1, in VOC's own program, misses .3 as well, by what its users report.)
    """
    return _ap_at({"exact": np.arange(11) / 10, "arange": np.arange(0, 1.1, 0.1)}, grid, recall, precision)


def ap_101_point(recall: ArrayLike, precision: ArrayLike, grid: Literal["linspace", "exact"] = "linspace") -> float:
    """Mean of the envelope at recall 0, .01, …, 1, as COCO; 0 stands where the recall is not reached.

    Parameters, returns and errors are those of `ap_area`, and:

    Parameters
    ----------
    grid
        "linspace": the numbers of ``np.linspace(0, 1, 101)``, since COCO's AP is whatever its program says; ten of
        them, such as the one for .35, are too large, so that 7/20 does not reach it. "exact": k/100 is reached by
        k/100.
    """
    return _ap_at({"linspace": np.linspace(0, 1, 101), "exact": np.arange(101) / 100}, grid, recall, precision)


class MeanAveragePrecision(NamedTuple):
    """Average precision of a set: mean and parts."""

    mean: float  #: over thresholds and over classes with ground truth; NaN without any
    ap: NDArray[np.float64]  #: shape (thresholds, classes); NaN for a class without ground truth
    classes: NDArray  #: ids of the classes, sorted
    positives: NDArray[np.int64]  #: shape (classes,), true boxes that are neither difficult nor crowd
    left_out: NDArray  #: ids of the classes without ground truth, which are not in the mean


def mean_average_precision(
    boxes: ArrayLike,
    scores: ArrayLike,
    true_boxes: ArrayLike,
    *,
    classes: ArrayLike | None = None,
    true_classes: ArrayLike | None = None,
    class_ids: ArrayLike | None = None,
    images: ArrayLike | None = None,
    true_images: ArrayLike | None = None,
    image_ids: ArrayLike | None = None,
    difficult: ArrayLike | None = None,
    crowd: ArrayLike | None = None,
    thresholds: ArrayLike = 0.5,
    strict: bool = False,
    plus_one: bool = False,
    rule: Literal["voc", "coco"] = "voc",
    max_detections: int | None = None,
    average: Callable[[NDArray, NDArray], float] = ap_area,
) -> MeanAveragePrecision:
    """Average precision for each IoU threshold and class of a whole set, and the mean of all.

    The other parameters and the errors are those of `match_detections`.

    Parameters
    ----------
    thresholds
        IoU thresholds: one number or several.
    average
        ``average(recall, precision)``: `ap_area`, `ap_11_point`, `ap_101_point`, or one of your own.

    Returns
    -------
    MeanAveragePrecision
        A class with ground truth but without detections has AP 0. One without ground truth, or with nothing but
        difficult and crowd boxes, has NaN, is left out of the mean and named in `left_out`.

    Examples
    --------
    COCO's AP of a set: ``mean_average_precision(**data, rule="coco", thresholds=COCO_THRESHOLDS, max_detections=100,
    average=ap_101_point)``. VOC 2007: ``mean_average_precision(**data, plus_one=True, average=ap_11_point)``.
    """
    thresholds = _thresholds(thresholds)
    problem = _gather(boxes, scores, true_boxes, classes, true_classes, class_ids, images, true_images, image_ids,
                      difficult, crowd, rule, max_detections)  # fmt: skip
    ids = problem.classes
    positives = np.bincount(problem.true_label[problem.positive[:-1]], minlength=len(ids))
    by_class = np.argsort(problem.label, kind="stable")  # within a class they stay sorted by score
    ends = np.searchsorted(problem.label[by_class], np.arange(len(ids) + 1))
    ap = np.full((len(thresholds), len(ids)), np.nan)
    for row, assigned in zip(ap, _assign(problem, thresholds, strict, plus_one, rule), strict=True):
        tp, fp = problem.positive[assigned], assigned < 0
        for k in np.flatnonzero(positives):
            mine = by_class[ends[k] : ends[k + 1]]
            curve = precision_recall(problem.scores[mine], tp[mine], fp[mine], positives[k])
            row[k] = average(curve.recall, curve.precision)
    scored = positives > 0
    mean = float(ap[:, scored].mean()) if scored.any() else float("nan")
    return MeanAveragePrecision(mean, ap, ids, positives, ids[~scored])


# --- how it is done -----------------------------------------------------------------------------------------------


class _Problem(NamedTuple):
    """Detections by falling score, those beyond `max_detections` dropped, and the ground truth in the order given."""

    given: int  # number of detections before any were dropped
    rows: NDArray[np.int64]  # where each detection stood
    boxes: NDArray[np.float64]
    scores: NDArray[np.float64]
    label: NDArray[np.int64]  # place of its class in `classes`
    group: NDArray[np.int64]  # one number for each image and class
    true_boxes: NDArray[np.float64]
    true_label: NDArray[np.int64]
    true_group: NDArray[np.int64]
    positive: NDArray[np.bool_]  # neither difficult nor crowd; at the end False, for detections assigned to row -1
    crowd: NDArray[np.bool_]
    classes: NDArray


def _gather(
    boxes: Any, scores: Any, true_boxes: Any, classes: Any, true_classes: Any, class_ids: Any, images: Any,
    true_images: Any, image_ids: Any, difficult: Any, crowd: Any, rule: str, max_detections: int | None,
) -> _Problem:  # fmt: skip
    """Check everything, number classes and images, and sort once."""
    if rule not in ("voc", "coco"):
        raise ValueError(f"rule must be 'voc' or 'coco', got {rule!r}")
    if max_detections is not None and not (isinstance(max_detections, (int, np.integer)) and max_detections >= 1):
        raise ValueError(f"max_detections must be an integer of at least 1 or None, got {max_detections}")
    boxes, true_boxes = _boxes("boxes", boxes), _boxes("true_boxes", true_boxes)
    n, m = len(boxes), len(true_boxes)
    scores = _scores(scores, n)
    difficult, crowd = _flags("difficult", difficult, m), _flags("crowd", crowd, m)
    if rule == "voc" and crowd.any():
        raise ValueError("crowd boxes are COCO's: use rule='coco', or call them difficult")
    label, true_label, known = _numbered("classes", classes, true_classes, class_ids, n, m)
    image, true_image, _ = _numbered("images", images, true_images, image_ids, n, m)
    group, true_group = image * len(known) + label, true_image * len(known) + true_label
    rows = np.argsort(-scores, kind="stable")
    if max_detections is not None:
        by_group = np.argsort(group[rows], kind="stable")
        runs = group[rows][by_group]
        place = np.arange(n) - np.searchsorted(runs, runs)  # place of each detection in its image and class
        rows = rows[np.sort(by_group[place < max_detections])]
    positive = np.append(~(difficult | crowd), False)
    return _Problem(n, rows, boxes[rows], scores[rows], label[rows], group[rows],
                    true_boxes, true_label, true_group, positive, crowd, known)  # fmt: skip


def _assign(
    problem: _Problem, thresholds: NDArray, strict: bool, plus_one: bool, rule: str
) -> Iterator[NDArray[np.int64]]:
    """Yield, for each threshold, the true box of each detection (by falling score), or -1.

    "One after another, each takes the best that is free" is computed for all at once, as a stable matching: everyone
    asks his favourite; a true box holds the highest score that ever asked and sends the others to their next. Since
    all true boxes rank detections by the same score, the result is the one of the sequence, and there are only as
    many rounds as the longest chain of refusals.
    """
    if rule == "coco":
        thresholds = np.minimum(thresholds, 1 - 1e-10)
    all_pairs = _pairs(problem, thresholds.min(), plus_one)
    nobody = len(problem.rows)
    for threshold in thresholds:
        near = all_pairs[2] > threshold if strict else all_pairs[2] >= threshold
        who, box, overlap = (column[near] for column in all_pairs)
        if rule == "coco":
            order = np.lexsort((-box, -overlap, ~problem.positive[box], who))
            endless = problem.crowd
        else:
            order = np.lexsort((box, -overlap, who))
            endless = ~problem.positive[:-1]
        box = box[order]
        wish, end = np.searchsorted(who, np.arange(nobody)), np.searchsorted(who, np.arange(nobody), side="right")
        if rule == "voc":
            end = np.minimum(end, wish + 1)  # asks one box only
        holder = np.full(len(problem.true_boxes), nobody)
        asking = np.flatnonzero(wish < end)
        while asking.size:
            asking = asking[~endless[box[wish[asking]]]]
            asked = box[wish[asking]]
            before = holder[asked]
            np.minimum.at(holder, asked, asking)
            refused = np.setdiff1d(np.concatenate([asking, before]), np.append(holder[asked], nobody))
            wish[refused] += 1
            asking = refused[wish[refused] < end[refused]]
        assigned = np.full(nobody, -1)
        assigned[wish < end] = box[wish[wish < end]]
        yield assigned


def _pairs(problem: _Problem, least: float, plus_one: bool) -> tuple[NDArray, NDArray, NDArray]:
    """Find all pairs in one image and class that overlap by `least`: detection, which rises, true box and overlap."""
    by_group = np.argsort(problem.true_group, kind="stable")
    runs = problem.true_group[by_group]
    first, last = (np.searchsorted(runs, problem.group, side=side) for side in ("left", "right"))
    who = np.flatnonzero(last > first)
    first, counts = first[who], (last - first)[who]
    sums = np.cumsum(counts)
    cuts = np.flatnonzero(np.diff(sums // _PAIRS_AT_ONCE)) + 1
    found = [(np.zeros(0, int), np.zeros(0, int), np.zeros(0))]
    for part in np.split(np.arange(len(who)), cuts):
        rows = np.repeat(part, counts[part])
        step = np.arange(len(rows)) - np.repeat(np.cumsum(counts[part]) - counts[part], counts[part])
        pair, box = who[rows], by_group[first[rows] + step]
        overlap = _overlap(problem.boxes[pair], problem.true_boxes[box], plus_one, problem.crowd[box])
        near = overlap >= least
        found.append((pair[near], box[near], overlap[near]))
    who, box, overlap = (np.concatenate(column) for column in zip(*found, strict=True))
    return who, box, overlap


def _overlap(a: NDArray, b: NDArray, plus_one: bool, crowd: Any = False) -> NDArray[np.float64]:
    """Intersection over union, or over the area of `a` where `b` is a crowd; boxes along the last axis."""
    widths = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]) + plus_one
    shared = np.prod(np.maximum(widths, 0), axis=-1)
    area_a, area_b = (np.prod(box[..., 2:] - box[..., :2] + plus_one, axis=-1) for box in (a, b))
    total = np.where(crowd, area_a, area_a + area_b - shared)
    return np.divide(shared, total, out=np.zeros_like(shared), where=shared > 0)  # 0 for boxes without area


def _ap_at(grids: dict[str, NDArray], grid: str, recall: Any, precision: Any) -> float:
    if grid not in grids:
        raise ValueError(f"grid must be {' or '.join(map(repr, grids))}, got {grid!r}")
    recall, precision = _points(recall, precision)
    if np.isnan(recall).any():
        return float("nan")
    reached = np.searchsorted(recall, grids[grid])  # first point with at least this recall
    return float(np.append(envelope(precision), 0.0)[reached].mean())


# --- what is refused ----------------------------------------------------------------------------------------------


def _numbers(name: str, values: Any) -> NDArray[np.float64]:
    try:
        return np.asarray(values, float)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected an array of numbers with rows of one length, got {values!r}") from None


def _one_each(name: str, values: NDArray, count: int) -> NDArray:
    if values.shape != (count,):
        raise ValueError(f"{name} has shape {values.shape}, expected ({count},): one entry for each row")
    return values


def _boxes(name: str, values: Any) -> NDArray[np.float64]:
    boxes = _numbers(name, values)
    if boxes.shape == (0,):
        return boxes.reshape(0, 4)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{name} has shape {boxes.shape}, expected (rows, 4): each row x1, y1, x2, y2")
    wild = ~(np.abs(boxes) < 1e150).all(axis=1)  # also NaN; an area of larger numbers would overflow
    inverted = (boxes[:, :2] > boxes[:, 2:]).any(axis=1)
    for bad, expected in ((wild, "finite numbers"), (inverted, "x1 <= x2 and y1 <= y2")):
        if bad.any():
            row = bad.argmax()
            raise ValueError(f"{name} row {row}: expected {expected}, got x1, y1, x2, y2 = {boxes[row].tolist()}")
    return boxes


def _scores(values: Any, count: int) -> NDArray[np.float64]:
    scores = _one_each("scores", _numbers("scores", values), count)
    if np.isnan(scores).any():
        raise ValueError(f"scores row {np.isnan(scores).argmax()}: expected a number, got NaN")
    return scores


def _flags(name: str, values: Any, count: int) -> NDArray[np.bool_]:
    flags = _one_each(name, np.zeros(count) if values is None else _numbers(name, values), count)
    odd = (flags != 0) & (flags != 1)
    if odd.any():
        raise ValueError(f"{name} row {odd.argmax()}: expected true or false, got {flags[odd.argmax()]}")
    return flags == 1


def _ids(name: str, values: Any) -> NDArray:
    if isinstance(values, (list, tuple)) and len({isinstance(value, str) for value in values}) > 1:
        raise ValueError(f"{name}: some ids are integers and some are texts, and 1 is not '1'")
    ids = np.asarray(values)
    if ids.dtype == object:  # a column of a table
        ids = np.asarray(ids.tolist())
    if ids.size and ids.dtype.kind not in "iuU":
        raise ValueError(f"{name}: expected ids that are integers or texts, got {ids.dtype}")
    return ids if ids.dtype.kind == "U" else ids.astype(np.int64)


def _numbered(
    name: str, ids: Any, true_ids: Any, known: Any, n: int, m: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray]:
    """Replace ids by their places in the sorted list of all ids that there are, and return this list, too."""
    if ids is None and true_ids is None and known is None:
        return np.zeros(n, int), np.zeros(m, int), np.zeros(1, int)
    if ids is None or true_ids is None:
        raise ValueError(f"{name} and true_{name} belong together: give both, or no ids at all")
    ids, true_ids = _one_each(name, _ids(name, ids), n), _one_each(f"true_{name}", _ids(f"true_{name}", true_ids), m)
    hint = ""
    if known is not None:
        known = _ids(f"the list of {name}", known)
    elif name == "classes":
        known = np.concatenate([ids, true_ids])
    else:
        known, hint = true_ids, "; if that image is one without ground truth, list all images in image_ids"
    if len({array.dtype.kind for array in (ids, true_ids, known) if array.size}) > 1:
        raise ValueError(f"{name}: some ids are integers and some are texts, and 1 is not '1'")
    known = np.unique(known)
    for key, array in ((name, ids), (f"true_{name}", true_ids)):
        strange = ~np.isin(array, known)
        if strange.any():
            some = ", ".join(map(repr, known[:5].tolist())) + (" …" if len(known) > 5 else "")
            raise ValueError(f"{key} row {strange.argmax()}: unknown id {array[strange.argmax()].item()!r}, expected "
                             f"one of {some or 'none'}{hint}")  # fmt: skip
    return np.searchsorted(known, ids), np.searchsorted(known, true_ids), known


def _points(recall: Any, precision: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    recall = _numbers("recall", recall)
    recall = _one_each("recall", recall, recall.size)
    precision = _one_each("precision", _numbers("precision", precision), recall.size)
    if np.isnan(recall).all():
        return recall, precision
    for name, values in (("recall", recall), ("precision", precision)):
        bad = ~((values >= 0) & (values <= 1))  # also NaN
        if bad.any():
            raise ValueError(f"{name} row {bad.argmax()}: expected a number in [0, 1], got {values[bad.argmax()]}")
    if (np.diff(recall) < 0).any():
        raise ValueError(f"recall row {(np.diff(recall) < 0).argmax() + 1} is below the row before; recall cannot fall")
    return recall, precision


def _thresholds(values: Any) -> NDArray[np.float64]:
    thresholds = np.atleast_1d(_numbers("thresholds", values))
    if thresholds.ndim != 1 or not thresholds.size or not ((thresholds > 0) & (thresholds <= 1)).all():
        raise ValueError(f"IoU thresholds must lie in (0, 1], got {values!r}")
    return thresholds
