"""`check`, exercises, figures and widgets: what they accept, what they reject, and in which words."""

from __future__ import annotations

import base64
import gc
import io
import weakref

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from helpers.teaching import Exercise, check, choice, explore, set_style, show, slider, switch
from helpers.teaching.checks import CheckFailed
from helpers.teaching.figures import COLORS, describe, plain, require_finite
from helpers.teaching.widgets import EXPLORERS, ExploreError, freeze_globals


@pytest.fixture(autouse=True)
def style():
    set_style()
    yield
    plt.close("all")


class TestCheck:
    def test_prints_what_holds_and_how_well(self, capsys):
        check(3, "a = b", [1.0, 2.0], np.array([1.0, 2.0 + 1e-13]))
        check(4, "bound", 1.0, 2.0, relation="<=", tol=0)
        check(5, "band", [1.0, 2.0], [1.2, 2.0], tol=[0.3, 0.1])
        check(6, "relative", 1e6, 1e6 + 1, rtol=1e-5)
        check(7, "counts", [1, 2], [1, 2], tol=0)
        assert capsys.readouterr().out.splitlines() == [
            "✓ (3) a = b   [within 1e-12]",
            "✓ (4) bound   [holds]",
            "✓ (5) band   [within 0.3]",
            "✓ (6) relative   [within 1e-05 relative]",
            "✓ (7) counts   [exactly]",
        ]

    def test_names_the_largest_difference_and_its_place(self):
        a, b = np.zeros((2, 3)), np.zeros((2, 3))
        b[1, 2], b[0, 0] = 0.5, 0.25
        with pytest.raises(
            CheckFailed, match=r"^\(1\) same: largest difference 0.5 at index \(1, 2\): 0 ≠ 0.5 \(allowed 1e-12\)$"
        ):
            check(1, "same", a, b)

    @pytest.mark.parametrize(
        "relation, left, fine", [("<=", 1.0, True), ("<=", 3.0, False), (">=", 3.0, True), (">=", 1.0, False)]
    )
    def test_relations(self, relation, left, fine):
        if fine:
            check(1, "bound", left, 2.0, relation=relation)
        else:
            with pytest.raises(CheckFailed, match="largest difference 1"):
                check(1, "bound", left, 2.0, relation=relation)

    def test_tensors_of_any_kind(self):
        check(1, "float64", torch.ones(3, dtype=torch.float64, requires_grad=True), np.ones(3))
        check(1, "bfloat16", torch.tensor([0.5, 2.0], dtype=torch.bfloat16), [0.5, 2.0], tol=0)
        check(1, "integers", torch.arange(3), [0, 1, 2], tol=torch.zeros(3))
        check(1, "a list of tensors", [torch.tensor(1.0, requires_grad=True), torch.tensor(2.0)], [1, 2])
        check(1, "sparse", torch.eye(2).to_sparse(), np.eye(2))
        check(1, "conjugated", torch.tensor([1j]).conj(), [-1j])

    def test_text_bytes_and_truth_values_of_arrays(self, capsys):
        check(1, "names", ["a", "b"], np.array(["a", "b"]))
        check(1, "bytes", b"ab\0", bytes([97, 98, 0]))
        check(1, "mask", np.array([True, False]), [1, 0], tol=0)
        assert capsys.readouterr().out.count("✓") == 3
        with pytest.raises(CheckFailed, match="'b' ≠ 'c' at index 1"):
            check(1, "names", ["a", "b"], ["a", "c"])
        with pytest.raises(CheckFailed, match="98 ≠ 99"):
            check(1, "bytes", b"ab", b"ac")
        with pytest.raises(CheckFailed, match="≠"):
            check(1, "a trailing NUL counts", "a\0", "a")
        with pytest.raises(TypeError, match="one side is text"):
            check(1, "mixed", "1", 1)

    def test_large_integers_are_compared_exactly(self):
        with pytest.raises(CheckFailed, match="largest difference 1"):
            check(1, "beyond float64", [2**62 + 1], [2**62], tol=0)
        with pytest.raises(CheckFailed):
            check(1, "unsigned", np.array([0], np.uint64), np.array([2**64 - 1], np.uint64), tol=0)

        with pytest.raises(CheckFailed, match="9007199254740993 ≠ 9007199254740992"):
            check(1, "integer and float", [2**53 + 1], [2.0**53], tol=0)
        with pytest.raises(CheckFailed, match="largest difference 1"):
            check(1, "beyond 64 bits", 2**70, 2**70 + 1, tol=0)
        with pytest.raises(CheckFailed):
            check(1, "numpy would round these", [-1, 2**63], [-1, 2**63 + 1], tol=0)
        check(1, "small and large", [0, 2**63 + 1], np.array([0, 2**63 + 1], np.uint64), tol=0)

    def test_infinities_and_nan(self):
        check(1, "equal infinities, relatively", [np.inf], [np.inf], rtol=1e-3)
        check(1, "equal infinities", [np.inf, -np.inf], [np.inf, -np.inf])
        with pytest.raises(CheckFailed):
            check(1, "opposite infinities", np.inf, -np.inf)
        with pytest.raises(CheckFailed, match=r"the right side is NaN at index \(0, 1\)"):
            check(1, "nan", np.zeros((1, 2)), np.array([[0, np.nan]]))
        with pytest.raises(CheckFailed, match=r"the left side is NaN$"):
            check(1, "nan", np.nan, np.nan)

    def test_complex_numbers(self):
        check(1, "roots", np.exp(2j * np.pi / 4), 1j)
        with pytest.raises(CheckFailed, match="largest difference 2"):
            check(1, "roots", 1j, -1j)
        with pytest.raises(TypeError, match="no order"):
            check(1, "roots", 1j, 2j, relation="<=")

    def test_refuses_what_could_never_fail(self):
        a = np.ones(3)
        with pytest.raises(ValueError, match="both sides are the same object"):
            check(1, "itself", a, a)
        with pytest.raises(ValueError, match="both sides are the same object"):
            check(1, "a view of itself", a, a[:])
        tensor = torch.ones(2, requires_grad=True)
        with pytest.raises(ValueError, match="both sides are the same object"):
            check(1, "itself, detached", tensor, tensor.detach())
        check(1, "another view", a[1:], a[:-1])
        for yes in (np.allclose(a, 1), np.array(True), torch.tensor(True)):
            with pytest.raises(TypeError, match="compare two quantities, not a truth value"):
                check(1, "bare", yes, np.array(1))
        with pytest.raises(CheckFailed, match="nothing to compare"):
            check(1, "empty", [], [])
        for tol in (np.nan, np.inf, -1):
            with pytest.raises(ValueError, match="the tolerance must be finite and not negative"):
                check(1, "anything goes", 1, 2, tol=tol)

    def test_shapes_that_differ(self):
        with pytest.raises(ValueError, match=r"the tolerance has shape \(2, 1\), the sides have \(3,\)"):
            check(1, "band", np.ones(3), np.zeros(3), tol=[[1.0], [2.0]])
        with pytest.raises(
            ValueError, match=r"the left side has shape \(3,\), the right side \(1, 3\); make them equal"
        ):
            check(1, "shapes", np.ones(3), np.ones((1, 3)))

    def test_things_that_are_no_numbers(self):
        with pytest.raises(TypeError, match="cannot compare a dict"):
            check(1, "dict", {}, {1: 2})
        with pytest.raises(ValueError, match='relation must be "=", "<=" or ">="'):
            check(1, "relation", 1, 2, relation="<")


class TestExercise:
    half = Exercise("one half", 0.5, wrong={"that is a third": 1 / 3}, hint="think of a coin")
    double = Exercise("double", lambda x, y: 2 * x + y, cases=[(1.0, 0.0), (2.0, 1.0)], hint="add x to itself",
                      wrong={"that is the square": lambda x, y: x**2 + y})  # fmt: skip

    @pytest.mark.parametrize("answer, verdict", [
        (..., "not attempted yet: one half"), (None, "not attempted yet: one half"),
        (0.5, "✓ one half"), (np.float32(0.5), "✓ one half"), (torch.tensor(0.5), "✓ one half"),
        (1 / 3, "✗ one half: that is a third"), (0.7, "✗ one half: think of a coin"),
        (np.nan, "✗ one half: the answer is NaN"), ("half", "✗ one half: expected a number, got str: 'half'"),
        ([0.5], "✗ one half: think of a coin"),
    ])  # fmt: skip
    def test_numbers(self, answer, verdict):
        assert self.half.verdict(answer) == verdict

    def test_functions(self):
        def stub(x, y): ...

        def not_implemented(x, y):
            raise NotImplementedError

        def crash(x, y):
            return 1 / (x - 1)

        def half_done(x, y):
            return 2.0 if x == 1 else None

        def wrong_signature(x):
            return 2 * x

        verdict = self.double.verdict
        not_yet = "not attempted yet: double; or a `return` is missing"
        assert verdict(stub) == verdict(not_implemented) == verdict(...) == not_yet
        assert verdict(lambda x, y: x + x + y) == "✓ double"
        assert verdict(lambda *both: 2 * both[0] + both[1]) == "✓ double"
        assert verdict(lambda x, y: x**2 + y).endswith("(1, 0) gives 1, expected 2. that is the square")
        assert verdict(lambda x, y: 0).endswith("gives 0, expected 2. add x to itself")
        assert verdict(crash) == "✗ double: crash(1, 0) raises ZeroDivisionError: float division by zero"
        assert verdict(half_done) == "✗ double: half_done(2, 1) returns nothing; is a `return` missing on one path?"
        assert verdict(wrong_signature) == "✗ double: the function has to take (x, y); yours takes (x)"
        assert verdict(3.0) == "✗ double: expected a function, got float: 3"

    def test_an_answer_may_not_change_the_cases(self):
        total = Exercise("total", lambda x: x.sum(), cases=[(np.ones(3),)], hint="add")

        def spoil(x):
            x[:] = 0
            return 0.0

        assert total.verdict(spoil).startswith("✗ total: spoil([1, 1, 1]) gives 0, expected 3")
        assert total.verdict(lambda x: 0.0).startswith("✗") and total.verdict(np.sum) == "✓ total"

    def test_nothing_that_a_reader_writes_raises(self):
        leave = Exercise("leave", lambda x: x, cases=[(1.0,)], wrong={"it fails": lambda x: [][0]}, hint="stay")
        assert leave.verdict(lambda x: exit(3)) == "✗ leave: <lambda>(1) raises SystemExit: 3"
        assert leave.verdict(lambda x: [[1], [1, 2]]) == "✗ leave: <lambda>(1) gives [[1], [1, 2]], expected 1. stay"
        assert leave.verdict(lambda x: "y" * 1000).endswith("…, expected 1. stay")
        assert leave.verdict(lambda x: torch.tensor(x, requires_grad=True)) == "✓ leave"
        assert leave.verdict(lambda x: 1j).endswith("gives 0+1j, expected 1. stay")
        for answer in (10**400, "0.5", {}):
            assert self.half.verdict(answer).startswith("✗ one half: expected a number, got ")
        assert self.half.verdict(torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True)) == "✓ one half"
        assert Exercise("infinity", np.inf, hint="more").verdict(np.inf) == "✓ infinity"

    def test_long_arguments_are_not_printed(self):
        total = Exercise("total", sum, cases=[([1.0, 2.0],), (range(100),)], hint="add")
        assert total.verdict(lambda x, start=0: 3) == "✗ total: <lambda>(<100 values>) gives 3, expected 4950. add"

    def test_calling_prints_the_verdict(self, capsys):
        self.half(0.5)
        assert capsys.readouterr().out == "✓ one half\n"

    def test_an_exercise_needs_cases_exactly_for_functions(self):
        for arguments in ({"expected": abs}, {"expected": 1.0, "cases": [(1,)]}):
            with pytest.raises(ValueError, match="give `cases` exactly when the answer is a function"):
                Exercise("mistake", **arguments)


class TestFigures:
    def test_lecture_mode_is_larger(self):
        set_style(lecture=True)
        large = plt.rcParams["font.size"], plt.rcParams["figure.dpi"], plt.rcParams["lines.linewidth"]
        set_style()
        assert all(a > b for a, b in zip(large, (11, 100, 1.8), strict=True))
        assert plt.rcParams["font.size"] == 11

    def test_colours_are_told_apart_in_grey_or_by_their_line(self):
        cycle = plt.rcParams["axes.prop_cycle"].by_key()
        assert len(set(cycle["color"])) == len(COLORS)
        grey = [np.dot([0.299, 0.587, 0.114], [int(c[i : i + 2], 16) for i in (1, 3, 5)]) for c in cycle["color"]]
        for i, a in enumerate(grey):
            for j, b in enumerate(grey[:i]):
                assert abs(a - b) > 20 or cycle["linestyle"][i] != cycle["linestyle"][j]

    def test_show_gives_an_opaque_picture_with_its_text(self, monkeypatch):
        shown = {}
        monkeypatch.setattr(
            "helpers.teaching.figures.display", lambda data, raw, metadata: shown.update(data, meta=metadata)
        )
        figure, ax = plt.subplots()
        ax.plot([0, 1], [2, 4], label=r"$\alpha_k$")
        ax.set(xlabel="time (s)", ylabel="$V_k$")
        show(figure, "A line that rises from two to four.")
        text = (
            "A line that rises from two to four. horizontal axis time (s); vertical axis V_k; "
            "curve “α_k” ends at 4 and lies between 2 and 4."
        )
        assert shown["text/plain"] == text and shown["meta"] == {"image/png": {"alt": text}}
        image = Image.open(io.BytesIO(base64.b64decode(shown["image/png"])))
        assert image.mode == "RGB" and image.getpixel((0, 0)) == (255, 255, 255)
        assert not plt.get_fignums()

    def test_a_figure_without_description_is_refused(self):
        with pytest.raises(ValueError, match="does not describe the figure"):
            show(plt.figure(), "image")

    def test_descriptions_count_panels_bars_and_points(self):
        figure, (left, right) = plt.subplots(1, 2)
        left.bar([1, 2, 3], [1, 2, 3])
        left.set_title("counts", loc="left")
        right.scatter([1, 2], [3, 4])
        assert describe(figure) == "Panel 1: counts; 3 bars. Panel 2: 2 points."

    def test_categories_are_described(self):
        figure, ax = plt.subplots()
        ax.plot(["a", "b"], [1, 2], label="q")
        require_finite(ax.get_children())
        assert describe(figure) == "curve “q” ends at 2 and lies between 1 and 2."

    def test_plain_words_for_mathtext(self):
        assert plain(r"$\sum a_k^2 \leq \sqrt{k}$") == "Σ a_k^2 ≤ √k"

    @pytest.mark.parametrize("draw", [
        lambda ax: ax.plot([1, np.nan], [1, 2], label="gap"), lambda ax: ax.plot([1, 2], [1, np.inf], label="gap"),
        lambda ax: ax.scatter([1, 2], [np.nan, 1], label="gap"), lambda ax: ax.bar([1], [np.inf], label="gap"),
        lambda ax: ax.text(np.nan, 1, "lost"), lambda ax: ax.inset_axes([0, 0, 1, 1]).plot([1, np.nan]),
        lambda ax: ax.imshow([[1.0, np.nan]]), lambda ax: ax.pcolormesh(np.array([[np.inf, 1.0]])),
    ])  # fmt: skip
    def test_values_that_are_not_finite_are_found(self, draw):
        _, ax = plt.subplots()
        with np.errstate(invalid="ignore"):
            draw(ax)
        with pytest.raises(ValueError, match="the picture would hold a value that is not finite"):
            show(ax.figure, "A figure with a value that is missing.")

    def test_gaps_can_be_declared(self):
        _, ax = plt.subplots()
        ax.plot([1, 2], np.ma.fix_invalid([1, np.nan]))
        ax.imshow(np.ma.fix_invalid([[1.0, np.nan]]))
        require_finite(ax.get_children())


def frame(ax):
    ax.set(xlim=(0, 1), ylim=(-1, 1), xlabel="x", ylabel="y")


def draw(ax, power, shape="up", dotted=False):
    x = np.linspace(0, 1, 50)
    ax.plot(x, x**power if shape == "up" else -(x**power), ls=":" if dotted else "-", label="curve")
    ax.set_title(f"power {power}")
    return f"power ${power}$"


def widget(**changes):
    arguments = {"alt": "A power function between zero and one.", "frame": frame, "power": slider(1, 4), **changes}
    return explore(changes.pop("draw", draw), **{k: v for k, v in arguments.items() if k != "draw"})


class TestExplore:
    def test_moving_a_control_changes_picture_and_caption(self):
        explorer = widget()
        before = explorer.pixels
        explorer.controls["power"].value = 4
        assert (explorer.pixels != before).any() and "power $4$" in explorer.caption
        sent = np.asarray(Image.open(io.BytesIO(explorer.children[2].value)))
        assert (sent == explorer.pixels).all()

    @pytest.mark.parametrize("fixed_axes", [True, False])
    def test_a_quick_step_equals_a_picture_drawn_from_nothing(self, fixed_axes):
        explorer = widget(frame=frame if fixed_axes else None, shape=choice(["up", "down"]), dotted=switch())
        for setting in ({"power": 1}, {"power": 4}, {"shape": "down"}, {"dotted": True}, {"power": 2}):
            for name, value in setting.items():
                explorer.controls[name].value = value
            assert (explorer.pixels == explorer.redraw_in_full()).all()

    @pytest.mark.parametrize("change", [
        lambda ax, p: ax.set(ylim=(0, 10), xlabel="four", yscale="log"), lambda ax, p: ax.set_facecolor("#EEEEEE"),
        lambda ax, p: ax.set_xticks([0.2, 0.8], labels=[f"a{p}", "b"]), lambda ax, p: ax.invert_yaxis(),
        lambda ax, p: ax.figure.legend(), lambda ax, p: ax.figure.text(0.5, 0.5, f"text {p}"),
        lambda ax, p: ax.bar([0.5], [p]), lambda ax, p: ax.errorbar([0.5], [p], 0.1), lambda ax, p: ax.legend(),
        lambda ax, p: ax.imshow([[p, 0.0]], vmin=0, vmax=4, extent=(0, 1, 0, 1), aspect="auto"),
        lambda ax, p: ax.fill_between([0, 1], [0, p]), lambda ax, p: ax.set_aspect(p / 9),
        lambda ax, p: ax.inset_axes([0.5, 0.5, 0.3, 0.3]).plot([0, p]), lambda ax, p: ax.annotate(f"{p}", (0.5, 0.5)),
    ])  # fmt: skip
    def test_whatever_one_step_does_the_next_step_does_not_see(self, change):
        def at_some(ax, power):
            ax.plot([0, 1], [0, power], label=f"line {power}")
            if power != 2:
                change(ax, power)

        explorer = widget(draw=at_some)
        start, axes = explorer.pixels, explorer.figure.axes[0]
        for power in (4, 3, 1, 4, 2):
            explorer.controls["power"].value = power
            assert (explorer.pixels == explorer.redraw_in_full()).all(), power
        assert (explorer.pixels == start).all() and len(axes.containers) == 0 and len(explorer.figure.legends) == 0

    def test_drawing_on_what_the_frame_drew_is_found(self):
        def frame_line(ax):
            ax.set(xlim=(0, 1), ylim=(0, 4))
            ax.line = ax.plot([0, 1], [0, 1])[0]

        def redraw(ax, power):
            ax.line.set_ydata([0, power])

        with pytest.raises(ExploreError, match="does not look as if drawn from nothing"):
            widget(draw=redraw, frame=frame_line)

    def test_axes_are_made_in_the_frame(self):
        with pytest.raises(ExploreError, match=r"draw adds axes .* make them in frame, once"):
            widget(draw=lambda ax, power: ax.twinx() and None)

    def test_the_start_looks_the_same_after_all_controls_moved(self):
        explorer = widget(shape=choice(["up", "down"]))
        before = explorer.pixels
        assert explorer.drive() == 3 + 2 + 4
        assert (explorer.pixels == before).all() and explorer.values == {"power": 2, "shape": "up"}

    def test_the_background_is_painted_once_when_the_axes_stay(self, monkeypatch):
        explorer = widget()
        monkeypatch.setattr(explorer._scene, "_paint_background", lambda moving: pytest.fail("painted again"))
        explorer.drive()

    def test_an_error_is_shown_over_the_dimmed_picture_and_goes_away(self, monkeypatch):
        monkeypatch.delenv("DRIVE_WIDGETS")

        def fragile(ax, power):
            ax.plot([0, 1 / (3 - power)])

        explorer = widget(draw=fragile)
        good = explorer.children[2].value
        explorer.controls["power"].value = 3
        assert isinstance(explorer.error, ExploreError)
        complaint = explorer.children[1]
        assert "fragile(power=3) fails: ZeroDivisionError: division by zero" in complaint.value
        assert "#B00020" in complaint.value and complaint.layout.display == ""
        dimmed = np.asarray(Image.open(io.BytesIO(explorer.children[2].value)))
        assert explorer.children[2].value != good and dimmed.min() >= 180
        explorer.controls["power"].value = 2
        assert explorer.error is None and complaint.layout.display == "none" and complaint.value == ""

    def test_under_test_a_setting_that_fails_fails_the_cell(self):
        def at_one_end(ax, power):
            ax.plot([0, 1 / (4 - power)])

        with pytest.raises(ExploreError, match=r"at_one_end\(power=4\) fails: ZeroDivisionError"):
            widget(draw=at_one_end)

    def test_pairs_are_driven_to_their_corners(self):
        def at_one_corner(ax, a, b):
            assert (a, b) != (5, 0), "corner"

        with pytest.raises(ExploreError, match=r"at_one_corner\(a=5, b=0\) fails: AssertionError: corner"):
            explore(at_one_corner, alt="Nothing is drawn here, it fails.", a=slider(0, 5, 2), b=slider(0, 5, 2))

    def test_a_value_that_is_not_finite_fails(self):
        def spike(ax, power):
            ax.plot([0, np.inf if power == 1 else 1], label="spike")

        with pytest.raises(ExploreError, match="a value that is not finite, in “spike”"):
            widget(draw=spike)
        for bad in (np.nan, np.inf, -np.inf):
            with pytest.raises(ExploreError, match="text below the picture holds a value that is not finite"):
                explore(lambda ax, power: f"error {bad}.", alt="Nothing is drawn, it fails.", power=slider(0, 1))  # noqa: B023
        widget(draw=lambda ax, power: "the inf-norm of information")
        with pytest.raises(ValueError, match="a value that is not finite"):
            widget(frame=lambda ax: ax.plot([0, np.nan]))

    @pytest.mark.parametrize("controls, message", [
        ({"powr": slider(0, 1)}, r"draw\(\) has no argument 'powr' for a control: did you mean 'power'\?"),
        ({"zzz": slider(0, 1)}, r"draw\(\) has no argument 'zzz' for a control: it has power, shape, dotted"),
        ({}, r"draw\(\) needs 'power': add a control, power=slider\(…\)"),
        ({"power": 3}, r"the control 'power' must be a slider, choice or switch, not 3"),
    ])  # fmt: skip
    def test_controls_and_arguments_must_fit(self, controls, message):
        with pytest.raises(ExploreError, match=message):
            explore(draw, alt="A power function between zero and one.", **controls)

    def test_other_mistakes_in_the_call(self):
        with pytest.raises(ExploreError, match="calls an argument 'size', a word of explore"):
            explore(lambda ax, size: None, alt="Nothing to see, it is refused.", size=slider(0, 1))
        with pytest.raises(ExploreError, match="must take the axes to draw on as its first argument"):
            explore(lambda: None, alt="Nothing to see, it is refused.")
        with pytest.raises(ExploreError, match="has an argument 'power' that cannot be named"):
            widget(draw=eval("lambda ax, power, /: None"))
        with pytest.raises(ExploreError, match="has nothing to move"):
            explore(lambda ax: None, alt="Nothing to see, it is refused.")
        with pytest.raises(ExploreError, match="does not describe the picture"):
            widget(alt="image")
        for bad in ({"stills": [{"speed": 1}]}, {"goal": {"speed": 1}}):
            with pytest.raises(ExploreError, match="stills and goal must name controls, and 'speed' is none of power"):
                widget(**bad)
        with pytest.raises(ExploreError, match="it may return a line of text or nothing"):
            explore(lambda ax, power: 3, alt="Nothing to see, it is refused.", power=slider(0, 1))

    def test_the_goal_must_be_reached_where_it_is_said_to_be_and_not_at_the_start(self):
        def hit_four(ax, power):
            return "✓ goal" if power == 4 else "not yet"

        explorer = widget(draw=hit_four, goal={"power": 4})
        assert "not yet" in explorer.caption
        with pytest.raises(ExploreError, match=r"the goal is not reached at \{'power': 3\}: not yet"):
            widget(draw=hit_four, goal={"power": 3})
        with pytest.raises(ExploreError, match=r"the goal is reached at \{'power': 4\}"):
            widget(draw=hit_four, goal={"power": 4}, power=slider(1, 4, 4))

    def test_later_cells_cannot_change_a_widget(self):
        """Cells share one namespace: a later cell that reuses a name must not reach into an earlier widget."""
        names = {"explore": explore, "slider": slider}
        exec(
            "top = 1.0\n"
            "def helper(x): return helper(x - 1) if x > 1 else top * x\n"
            "def draw(ax, power): ax.plot([0, helper(1) * power / 9]); ax.set_ylim(0, 1)\n"
            "widget = explore(draw, alt='A line from zero to a height.', power=slider(1, 4))\n"
            "top = 'something else'\n"
            "def helper(x): raise RuntimeError\n",
            names,
        )
        names["widget"].require_unchanged()
        names["widget"].drive()

    def test_running_a_cell_again_frees_its_widgets(self, monkeypatch):
        run = ["cell a", 1]
        monkeypatch.setattr("helpers.teaching.widgets._present_run", lambda: tuple(run))
        first, beside = widget(), widget()
        figure = weakref.ref(first.figure)
        run[:] = "cell b", 2
        other = widget()
        assert all(w.comm is not None for w in (first, beside, other))
        run[:] = "cell a", 3
        again = widget()
        assert [w.comm is None for w in (first, beside, other, again)] == [True, True, False, False]
        assert first.controls["power"].comm is None and again.controls["power"].comm is not None
        gc.collect()
        assert figure() is None and first not in EXPLORERS.values()

    def test_changed_data_is_noticed(self):
        data = np.array([0.0, 1.0])
        explorer = widget(draw=lambda ax, power: ax.plot(data * power) and None)
        data += 1
        with pytest.raises(ExploreError, match="draws another picture than when it was built"):
            explorer.require_unchanged()

    def test_what_is_frozen_and_what_is_not(self):
        assert freeze_globals(np.sin) is np.sin and freeze_globals(None) is None
        copy = freeze_globals(draw)
        assert copy is not draw and copy.__defaults__ == draw.__defaults__ and copy.__name__ == "draw"

    def test_the_stored_picture_shows_the_stills_with_their_settings(self):
        explorer = widget(stills=[{"power": 1}, {"power": 4}, {"power": 2}], across=2)
        data, metadata = explorer._repr_mimebundle_()
        assert "application/vnd.jupyter.widget-view+json" in data
        image = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
        height, width = explorer.pixels.shape[:2]
        assert image.width == width and 2 * height < image.height < 2.4 * height
        text = data["text/plain"]
        assert metadata == {"image/png": {"alt": text}}
        assert text.startswith("A power function between zero and one. power = 1. power 1; horizontal axis x")
        assert text.count("curve “curve” ends at 1") == 3
        explorer.require_unchanged()  # taking stills does not disturb what the reader sees

    def test_controls(self):
        assert isinstance(slider(0, 10), ipywidgets.IntSlider) and slider(0, 10).value == 5
        assert slider(0, 1, 0.3, step=0.05).readout_format == ".2f"
        log = slider(0.01, 100, log=True)
        assert isinstance(log, ipywidgets.FloatLogSlider) and log.value == pytest.approx(1)
        assert choice({"one": 1, "two": 2}).value == 1 and choice([1, 2], 2).value == 2
        assert isinstance(choice([1, 2], ordered=True), ipywidgets.SelectionSlider)
        assert switch(label="on?").description == "on?"
        assert widget().controls["power"].description == "power"
        for bad, message in (((1, 1), "must lie below"), ((0, 1, 2), "lies outside")):
            with pytest.raises(ValueError, match=message):
                slider(*bad)
        with pytest.raises(ValueError, match="needs positive ends"):
            slider(0, 1, log=True)

    def test_every_kind_of_control_is_driven(self):
        seen = {name: set() for name in "abcde"}

        def record(ax, **values):
            for name, value in values.items():
                seen[name].add(round(value, 6) if isinstance(value, float) else value)

        def draw_all(ax, a, b, c, d, e):
            record(ax, a=a, b=b, c=c, d=d, e=e)

        controls = {"a": slider(0, 10), "b": slider(0.0, 1.0), "c": slider(0.01, 100, log=True)}
        explore(draw_all, alt="Nothing is drawn, values are noted.", **controls, d=choice(["x", "y", "z"]), e=switch())
        assert seen == {
            "a": {0, 5, 10},
            "b": {0, 0.5, 1},
            "c": {0.01, 1, 100},
            "d": {"x", "y", "z"},
            "e": {False, True},
        }
