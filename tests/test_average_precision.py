"""Average precision against the VOC kit written as loops, pycocotools, stored results, and what must hold for all."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import helpers.average_precision as module
from helpers.average_precision import (
    COCO_THRESHOLDS,
    ap_11_point,
    ap_101_point,
    ap_area,
    envelope,
    iou,
    match_detections,
    mean_average_precision,
    precision_recall,
)
from helpers.data import load_cartucho, load_padilla

DATA = Path(__file__).parent / "data" / "map"
GOLDEN = {name: json.loads((DATA / f"{name}.json").read_text(encoding="utf-8")) for name in ("padilla", "cartucho")}


# --- oracles


def iou_of_two(a, b, plus_one):
    width = min(a[2], b[2]) - max(a[0], b[0]) + plus_one
    height = min(a[3], b[3]) - max(a[1], b[1]) + plus_one
    if width <= 0 or height <= 0:
        return 0.0
    area = [(box[2] - box[0] + plus_one) * (box[3] - box[1] + plus_one) for box in (a, b)]
    return width * height / (area[0] + area[1] - width * height)


def voc_kit(problem, of_class, threshold, plus_one, strict=False):
    """VOCevaldet.m for one class, detection after detection: TP, FP by falling score, and how many are to be found."""
    rows = [k for k in np.argsort(-problem["scores"], kind="stable") if problem["classes"][k] == of_class]
    truth = [k for k in range(len(problem["true_boxes"])) if problem["true_classes"][k] == of_class]
    taken, tp, fp = set(), [], []
    for k in rows:
        best, best_overlap = -1, -np.inf
        for j in truth:
            if problem["true_images"][j] == problem["images"][k]:
                overlap = iou_of_two(problem["boxes"][k], problem["true_boxes"][j], plus_one)
                if overlap > best_overlap:
                    best, best_overlap = j, overlap
        hit = best_overlap > threshold if strict else best_overlap >= threshold
        difficult = hit and problem["difficult"][best]
        tp.append(bool(hit and not difficult and best not in taken))
        fp.append(bool(not hit or (not difficult and best in taken)))
        if tp[-1]:
            taken.add(best)
    return rows, tp, fp, sum(not problem["difficult"][j] for j in truth)


def voc_average(tp, fp, positives, kind):
    """VOCap.m and the loop before it: over exact grids, as the kit's definition says."""
    dots, hits, misses = [], 0, 0
    for t, f in zip(tp, fp, strict=True):
        hits, misses = hits + t, misses + f
        if t or f:
            dots.append((hits, hits / (hits + misses)))
    if kind == "area":
        return sum(max((p for h, p in dots if h >= j), default=0) for j in range(1, positives + 1)) / positives
    steps = {"11": 10, "101": 100}[kind]
    return np.mean([max((p for h, p in dots if h * steps >= j * positives), default=0) for j in range(steps + 1)])


def by_pycocotools(problem, thresholds, most=100):
    """AP of pycocotools, shape (thresholds, classes); -1, its mark for nothing to find, becomes NaN."""
    coco = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval

    images = sorted(set(problem["image_ids"]))
    classes = sorted(set(problem["class_ids"]))

    def annotation(k, box, image, label, **more):
        x1, y1, x2, y2 = map(float, box)
        area = (x2 - x1) * (y2 - y1)
        return {"id": k + 1, "image_id": image, "category_id": label, "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": area, "iscrowd": 0, **more}  # fmt: skip

    truth = zip(problem["true_boxes"], problem["true_images"], problem["true_classes"], problem["crowd"], strict=True)
    found = zip(problem["boxes"], problem["images"], problem["classes"], problem["scores"], strict=True)
    with contextlib.redirect_stdout(io.StringIO()):
        ground = coco.COCO()
        ground.dataset = {
            "images": [{"id": int(image)} for image in images],
            "categories": [{"id": int(label)} for label in classes],
            "annotations": [annotation(k, b, int(i), int(c), iscrowd=int(w)) for k, (b, i, c, w) in enumerate(truth)],
        }
        ground.createIndex()
        detections = coco.COCO()
        detections.dataset = dict(ground.dataset)
        detections.dataset["annotations"] = [
            annotation(k, b, int(i), int(c), score=float(s)) for k, (b, i, c, s) in enumerate(found)
        ]
        detections.createIndex()
        evaluation = COCOeval(ground, detections, "bbox")
        evaluation.params.iouThrs = np.array(thresholds)
        evaluation.params.maxDets = [most]
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    ap = evaluation.eval["precision"][:, :, :, 0, 0].mean(axis=1)
    return np.where(ap < 0, np.nan, ap)


def random_problem(seed, crowds=False):
    """Few images and classes, boxes on a coarse grid, scores from a short list: ties, duplicates and empty cases."""
    draw = np.random.default_rng(seed)
    n, m = (int(draw.integers(0, high)) for high in (25, 14))

    def boxes(count):
        corner, size = draw.integers(0, 8, (count, 2)), draw.integers(1, 7, (count, 2))
        return np.concatenate([corner, corner + size], axis=1).astype(float)

    return {
        "boxes": boxes(n),
        "scores": draw.integers(0, 6, n) / 5 if seed % 2 else draw.random(n),
        "classes": draw.integers(0, 3, n),
        "images": draw.integers(0, 3, n),
        "true_boxes": boxes(m),
        "true_classes": draw.integers(0, 3, m),
        "true_images": draw.integers(0, 3, m),
        "class_ids": np.arange(3),
        "image_ids": np.arange(3),
        "difficult": np.zeros(m, bool) if crowds else draw.random(m) < 0.2,
        "crowd": draw.random(m) < 0.2 if crowds else np.zeros(m, bool),
    }


def ours(problem, **given):
    return mean_average_precision(**problem, **given)


# --- against them


class TestBoxes:
    def test_by_hand(self):
        assert iou([[0, 0, 2, 2]], [[1, 0, 3, 2], [2, 0, 3, 2], [0, 0, 2, 2]]).tolist() == [[1 / 3, 0, 1]]
        assert iou([[0, 0, 1, 1]], [[1, 1, 2, 2]], plus_one=True).tolist() == [[1 / 7]]

    @given(st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=1, max_size=6), st.booleans())
    def test_all_pairs(self, corners, plus_one):
        boxes = [[min(a, c), min(b, d), max(a, c), max(b, d)] for a, b, c, d in corners]
        expected = [[iou_of_two(a, b, plus_one) for b in boxes] for a in boxes]
        assert np.abs(iou(boxes, boxes, plus_one) - expected).max() < 1e-12

    def test_a_box_without_area(self):
        assert iou([[1, 1, 1, 1]], [[1, 1, 1, 1], [0, 0, 2, 2]]).tolist() == [[0, 0]]


class TestVoc:
    @pytest.mark.parametrize("block", range(6))
    def test_300_random_problems(self, block):
        for seed in range(50 * block, 50 * block + 50):
            problem = random_problem(seed)
            threshold, plus_one, strict = [0.3, 0.5, 0.75][seed % 3], seed % 5 == 0, seed % 7 == 0
            given = {"threshold": threshold, "plus_one": plus_one, "strict": strict}
            matches = match_detections(**problem, **given)
            given["thresholds"] = given.pop("threshold")
            results = {
                "area": ours(problem, **given),
                "11": ours(problem, average=ap_11_point, **given),
                "101": ours(problem, average=lambda r, p: ap_101_point(r, p, "exact"), **given),
            }
            for label in range(3):
                rows, tp, fp, positives = voc_kit(problem, label, threshold, plus_one, strict)
                assert matches.tp[rows].tolist() == tp and matches.fp[rows].tolist() == fp, seed
                for kind, result in results.items():
                    assert result.positives[label] == positives
                    if positives:
                        expected = voc_average(tp, fp, positives, kind)
                        assert result.ap[0, label] == pytest.approx(expected, abs=1e-9), (seed, kind)
                    else:
                        assert np.isnan(result.ap[0, label]) and label in result.left_out

    @pytest.mark.parametrize("setting", ["thr0.3_plus0", "thr0.5_plus0", "thr0.3_plus1", "thr0.5_plus1"])
    def test_padilla(self, setting):
        data, golden = load_padilla(), GOLDEN["padilla"]["results"][setting]
        given = {"threshold": float(setting[3:6]), "plus_one": setting.endswith("1")}
        matches = match_detections(**data, **given)
        order = np.argsort(-data["scores"], kind="stable")
        assert matches.tp[order].tolist() == golden["tp"] and matches.fp[order].tolist() == golden["fp"]
        recall, precision, _ = precision_recall(data["scores"], matches.tp, matches.fp, golden["npos"])
        assert ap_area(recall, precision) == pytest.approx(golden["area"], abs=1e-9)
        assert ap_11_point(recall, precision) == pytest.approx(golden["ap11"], abs=1e-9)
        assert ap_101_point(recall, precision) == pytest.approx(golden["ap101"], abs=1e-9)

    def test_padilla_with_ties_turned_round(self):
        data = load_padilla()
        back = data | {key: data[key][::-1] for key in ("boxes", "scores", "classes", "images")}
        means = [mean_average_precision(**back, thresholds=0.3, plus_one=p).mean for p in (True, False)]
        assert np.round(means, 4).tolist() == [0.2235, 0.2032]

    @pytest.mark.parametrize("plus", [0, 1])
    @pytest.mark.parametrize("name, average", [("area", ap_area), ("ap11", ap_11_point), ("ap101", ap_101_point)])
    def test_cartucho(self, plus, name, average):
        data, golden = load_cartucho(), GOLDEN["cartucho"]
        result = mean_average_precision(**data, plus_one=bool(plus), average=average)
        assert result.mean == pytest.approx(golden["mAP"][f"plus{plus}"][name], abs=1e-9)
        assert len(data["boxes"]) == 494 and len(data["true_boxes"]) == 686 and len(data["image_ids"]) == 85
        assert len(result.left_out) == 6 + 2 and (result.positives > 0).sum() == 30

    def test_exactly_at_the_threshold(self):
        truth, found = [[0, 0, 10, 10]], [[0, 0, 10, 5]]
        assert [match_detections(found, [0.9], truth, strict=strict).tp[0] for strict in (False, True)] == [True, False]

    def test_difficult_boxes_take_any_number(self):
        truth, found = [[0, 0, 9, 9]], [[0, 0, 9, 9]] * 3
        matches = match_detections(found, [0.9, 0.8, 0.7], truth, difficult=[True])
        assert not matches.tp.any() and not matches.fp.any() and matches.truth.tolist() == [0, 0, 0]


class TestCoco:
    @pytest.mark.parametrize("block", range(6))
    def test_300_random_problems(self, block):
        for seed in range(50 * block, 50 * block + 50):
            problem = random_problem(seed, crowds=True)
            # pycocotools sorts detections by image before it breaks ties; here they are in that order.
            order = np.argsort(problem["images"], kind="stable")
            problem |= {key: problem[key][order] for key in ("boxes", "scores", "classes", "images")}
            thresholds, most = ([0.5, 0.75] if seed % 3 else list(COCO_THRESHOLDS)), (3 if seed % 4 == 0 else 100)
            result = ours(problem, rule="coco", thresholds=thresholds, max_detections=most, average=ap_101_point)
            expected = by_pycocotools(problem, thresholds, most)
            assert (np.isnan(result.ap) == np.isnan(expected)).all(), seed
            assert np.nanmax(np.abs(result.ap - expected), initial=0) < 1e-9, seed

    def test_cartucho(self):
        data, golden = load_cartucho(), GOLDEN["cartucho"]["pycocotools_2.0.11"]
        result = mean_average_precision(
            **data, rule="coco", thresholds=COCO_THRESHOLDS, max_detections=100, average=ap_101_point
        )
        means = [result.mean, *np.nanmean(result.ap, axis=1)[[0, 5]]]
        assert np.round(means, 6).tolist() == [golden["AP"], golden["AP50"], golden["AP75"]]

    def test_where_the_rules_differ(self):
        truth, found = [[0, 0, 10, 10], [4, 0, 14, 10]], [[0, 0, 10, 10], [1, 0, 11, 10]]
        assert [match_detections(found, [0.9, 0.8], truth, rule=r).tp.sum() for r in ("voc", "coco")] == [1, 2]

    @pytest.mark.parametrize("threshold", [0.5, 1.0])
    def test_ties_of_overlap_and_a_threshold_of_1_against_pycocotools(self, threshold):
        """Of two equal true boxes COCO takes the last; which one matters, as another detection fits only the first."""
        problem = {
            "boxes": [[0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 16]],
            "scores": [0.9, 0.8, 0.7],
            "true_boxes": [[0, 0, 10, 12], [0, 2, 10, 12], [0, 0, 10, 10]],
            "crowd": np.zeros(3, bool),
        }
        twins = problem | {"true_boxes": [[0, 0, 10, 12], [0, 0, 10, 12], [40, 0, 50, 10]]}
        for case in (problem, twins):
            ids = {key: np.zeros(3, int) for key in ("classes", "images", "true_classes", "true_images")}
            case = {k: np.array(v) for k, v in case.items()} | ids | {"class_ids": [0], "image_ids": [0]}
            result = ours(case, rule="coco", thresholds=threshold, max_detections=100, average=ap_101_point)
            assert result.ap[0, 0] == pytest.approx(by_pycocotools(case, [threshold])[0, 0], abs=1e-9)
        matches = match_detections([[0, 0, 10, 12]], [0.9], [[0, 0, 10, 12]] * 2, rule="coco", threshold=threshold)
        assert matches.truth.tolist() == [1]
        assert match_detections([[0, 0, 3, 3]], [0.9], [[0, 0, 3, 3]], rule="coco", threshold=1.0).tp.all()

    def test_a_threshold_of_1_means_a_little_less(self):
        almost = [[0, 0, 10, 10 - 1e-10]]
        found = [match_detections(almost, [0.9], [[0, 0, 10, 10]], rule=r, threshold=1).tp[0] for r in ("voc", "coco")]
        assert found == [False, True]

    def test_pairs_in_small_portions(self, monkeypatch):
        problem = random_problem(8)
        whole = ours(problem).ap
        monkeypatch.setattr(module, "_PAIRS_AT_ONCE", 3)
        assert np.array_equal(ours(problem).ap, whole, equal_nan=True)


class TestCurves:
    def test_by_hand(self):
        recall, precision, scores = precision_recall([0.5, 0.9, 0.7], [True, True, False], [False, False, True], 4)
        assert (recall.tolist(), precision.tolist(), scores.tolist()) == (
            [0.25, 0.25, 0.5], [1, 0.5, 2 / 3], [0.9, 0.7, 0.5],
        )  # fmt: skip
        assert ap_area(recall, precision) == pytest.approx(0.25 + 0.25 * 2 / 3)

    @given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
    def test_the_envelope_is_the_least_that_never_rises(self, precision):
        upper = envelope(precision)
        assert (upper >= precision).all() and (np.diff(upper) <= 0).all()
        assert upper.tolist() == [max(precision[k:]) for k in range(len(precision))]

    @given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(0, 20))
    def test_the_bound_and_the_range(self, tp, missed):
        positives = sum(tp) + missed or 1
        recall, precision, _ = precision_recall(-np.arange(len(tp)), tp, np.logical_not(tp), positives)
        area = ap_area(recall, precision)
        for average, bound in ((ap_11_point, 1 / 11), (lambda r, p: ap_101_point(r, p, "exact"), 1 / 101)):
            assert 0 <= average(recall, precision) <= 1 and abs(average(recall, precision) - area) <= bound + 1e-12
        worse = precision_recall(-np.arange(len(tp) + 1), [*tp, False], [*np.logical_not(tp), True], positives)
        assert ap_area(worse.recall, worse.precision) == pytest.approx(area, abs=1e-12)

    def test_it_comes_near_the_bound(self):
        one, all_but_one = ([1e-4], [1.0]), (np.arange(1, 10_000) / 10_000, np.ones(9_999))
        assert ap_11_point(*one) - ap_area(*one) == pytest.approx(1 / 11 - 1e-4)
        assert ap_area(*all_but_one) - ap_11_point(*all_but_one) == pytest.approx(1 / 11 - 1e-4)

    def test_grids_that_are_rounded(self):
        recall, precision = np.arange(1, 4) / 10, np.ones(3)
        assert [ap_11_point(recall, precision, grid) for grid in ("exact", "arange")] == [4 / 11, 3 / 11]
        recall, precision = np.arange(1, 8) / 20, np.ones(7)
        ours = [ap_101_point(recall, precision, grid) for grid in ("exact", "linspace")]
        assert ours == pytest.approx([36 / 101, 35 / 101])

    def test_nothing(self):
        assert ap_area([], []) == ap_11_point([], []) == ap_101_point([], []) == 0
        nothing = mean_average_precision([], [], [])
        assert np.isnan(nothing.mean) and nothing.left_out.tolist() == [0]
        assert mean_average_precision([], [], [[0, 0, 1, 1]]).mean == 0
        assert np.isnan(mean_average_precision([[0, 0, 1, 1]], [0.5], []).mean)


class TestWhatMustHold:
    @given(st.integers(0, 10_000))
    def test_scores_count_by_their_order_only(self, seed):
        problem = random_problem(seed)
        other = problem | {"scores": np.exp(3 * problem["scores"]) - 7}
        assert np.array_equal(ours(problem).ap, ours(other).ap, equal_nan=True)

    @given(st.integers(0, 10_000), st.sampled_from(["voc", "coco"]))
    def test_without_ties_the_order_of_rows_does_not_count(self, seed, rule):
        problem = random_problem(2 * seed)  # even: scores without ties
        shuffle = np.random.default_rng(seed).permutation(len(problem["boxes"]))
        other = problem | {key: problem[key][shuffle] for key in ("boxes", "scores", "classes", "images")}
        assert np.array_equal(ours(problem, rule=rule).ap, ours(other, rule=rule).ap, equal_nan=True)

    def test_ids_may_be_texts(self):
        problem = random_problem(3)
        keys = ("classes", "true_classes", "class_ids", "images", "true_images", "image_ids")
        texts = problem | {key: [f"id {value}" for value in problem[key]] for key in keys}
        assert np.array_equal(ours(problem).ap, ours(texts).ap, equal_nan=True)


class TestRefusals:
    @pytest.mark.parametrize(
        "change, problem",
        [
            ({"boxes": [[0, 0, 1, 1], [5, 0, 1, 1]]}, r"boxes row 1: expected x1 <= x2 and y1 <= y2, got .*\[5.0, 0.0"),
            ({"boxes": [[0, 0, 1, 1], [0, 0, np.nan, 1]]}, "boxes row 1: expected finite numbers"),
            ({"true_boxes": [[0, 0, np.inf, 1]]}, "true_boxes row 0: expected finite numbers"),
            ({"boxes": [[0, 0, 1]] * 2}, r"boxes has shape \(2, 3\), expected \(rows, 4\)"),
            ({"boxes": [[0, 0, 1, 1], [0, 0]]}, "boxes: expected an array of numbers with rows of one length"),
            ({"scores": [0.5, np.nan]}, "scores row 1: expected a number, got NaN"),
            ({"scores": [0.5]}, r"scores has shape \(1,\), expected \(2,\)"),
            ({"classes": [0, 9]}, "classes row 1: unknown id 9, expected one of 0, 1"),
            ({"images": ["a", "c"]}, "images row 1: unknown id 'c', expected one of 'a', 'b'"),
            ({"image_ids": None, "images": ["a", "b"]}, "list all images in image_ids"),
            ({"images": [1, 2]}, "some ids are integers and some are texts"),
            ({"true_images": None}, "images and true_images belong together"),
            ({"classes": [0.5, 1]}, "classes: expected ids that are integers or texts"),
            ({"difficult": [2]}, "difficult row 0: expected true or false, got 2"),
            ({"crowd": [True]}, "crowd boxes are COCO's"),
            ({"rule": "kitti"}, "rule must be 'voc' or 'coco', got 'kitti'"),
            ({"max_detections": 0}, "max_detections must be an integer of at least 1"),
            ({"max_detections": 1.5}, "max_detections must be an integer of at least 1"),
            (
                {"classes": [1, "a"], "true_classes": ["1"], "class_ids": None},
                "some ids are integers and some are texts",
            ),
            ({"thresholds": 0}, r"IoU thresholds must lie in \(0, 1\], got 0"),
            ({"thresholds": [0.5, np.nan]}, "IoU thresholds must lie"),
        ],
    )
    def test_what_is_wrong_is_named(self, change, problem):
        good = {
            "boxes": [[0, 0, 1, 1]] * 2, "scores": [0.5, 0.4], "true_boxes": [[0, 0, 1, 1]], "classes": [0, 1],
            "true_classes": [1], "class_ids": [0, 1], "images": ["a", "b"], "true_images": ["a"],
            "image_ids": ["a", "b"],
        }  # fmt: skip
        mean_average_precision(**good)
        with pytest.raises(ValueError, match=problem):
            mean_average_precision(**good | change)

    @pytest.mark.parametrize(
        "arguments, problem",
        [
            (([0.5], [True], [True], 1), "row 0 is both"),
            (([0.5, 0.4], [True, True], [False, False], 1), "positives is 1, but 2 detections are true"),
            (([np.nan], [True], [False], 1), "scores row 0"),
            (([0.5], [True], [False], 1.5), "positives must be an integer of at least 0, got 1.5"),
            (([0.5], [False], [True], -1), "positives must be an integer"),
        ],
    )
    def test_of_curves(self, arguments, problem):
        with pytest.raises(ValueError, match=problem):
            precision_recall(*arguments)

    @pytest.mark.parametrize("average", [ap_area, ap_11_point, ap_101_point])
    def test_of_averages(self, average):
        with pytest.raises(ValueError, match="recall row 1 is below the row before"):
            average([0.5, 0.4], [1, 1])
        with pytest.raises(ValueError, match=r"precision row 0: expected a number in \[0, 1\], got 2"):
            average([0.5], [2])
        with pytest.raises(ValueError, match="shape"):
            average([0.5], [1, 1])

    def test_of_several_thresholds(self):
        with pytest.raises(ValueError, match="one threshold"):
            match_detections([[0, 0, 1, 1]], [0.5], [[0, 0, 1, 1]], threshold=[0.5, 0.7])

    def test_of_grids(self):
        with pytest.raises(ValueError, match="grid must be 'exact' or 'arange', got 'fine'"):
            ap_11_point([0.5], [1], "fine")
