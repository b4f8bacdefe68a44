"""The speed demo: its arithmetic on known curves, its honesty about rivals that are wrong, slow or too large."""

from __future__ import annotations

import dataclasses
import re
import sys
import time
import types
import warnings

import pytest
import torch
from collection import NOTEBOOKS, ROOT, read

from helpers.speed import __main__ as command
from helpers.speed import benchmark, draw, load_records, measure, methods, summarise
from helpers.speed.methods import Method
from helpers.speed.record import BOTH, FORWARD, Point, Record


def power_laws(**laws):
    """A record whose curves are coefficient · n^exponent, up to a last n."""
    points = [
        Point(name, direction, 2**p, [0.5 * a * 2 ** (p * b), a * 2 ** (p * b), 9 * a * 2 ** (p * b)], 2**p)
        for name, (_, a, b, last) in laws.items()
        for direction in (FORWARD, BOTH)
        for p in range(8, last)
    ]
    return Record(
        date="2026-01-02T03:04+00:00",
        device={"kind": "cpu", "name": "a processor", "threads": 1},
        versions={"python": "3", "torch": "2"},
        settings={"batch": 2, "heads": 3, "features": 5, "dtype": "float32", "seconds": 1.0},
        method="made up",
        copy_bytes_per_second=1e9,
        matmul_flop_per_second=1e12,
        functions={name: law[0] for name, law in laws.items()},
        errors={},
        left_out={"another": "it is not there"},
        points=points,
    )


@pytest.fixture
def record():
    return power_laws(
        naive=("softmax", 1e-8, 2.0, 11), fused=("softmax", 1e-9, 2.0, 14), ours=("linear", 1e-6, 1.0, 17)
    )


class TestRecord:
    def test_exponents_of_power_laws(self, record):
        assert record.exponent("fused", FORWARD) == pytest.approx(2)
        assert record.exponent("ours", BOTH) == pytest.approx(1)
        assert record.exponent("ours", BOTH, last=20) is None and record.exponent("nobody", BOTH) is None

    def test_power_laws_cross_where_they_are_equal(self, record):
        # 1e-9 n² = 1e-6 n at n = 1,000, between two points; 1e-8 n² passes it before the first one.
        assert record.crossing("fused", "ours", FORWARD) == pytest.approx(1000)
        assert record.crossing("naive", "ours", FORWARD) == 256
        assert record.crossing("ours", "fused", FORWARD) is None
        assert record.crossing("nobody", "ours", FORWARD) is None

    def test_the_last_crossing_counts(self):
        """A curve that dips below once and rises again has not overtaken."""
        times = {"slow": [1, 1, 1, 1], "fast": [2, 0.5, 2, 0.5]}
        made = power_laws(slow=("softmax", 1, 1, 8), fast=("linear", 1, 1, 8))
        made.points.extend(Point(m, FORWARD, 2 ** (8 + i), [t]) for m, ts in times.items() for i, t in enumerate(ts))
        assert made.crossing("slow", "fast", FORWARD) == pytest.approx(2**10.5)

    @pytest.mark.parametrize("copy, products", [(1e9, 1e15), (1e15, 1e10)])
    def test_floors_are_counted_by_hand(self, record, copy, products):
        """6 sequences of 100 tokens and 5 features; q, k, v and o have 4 bytes a number."""
        record = dataclasses.replace(record, copy_bytes_per_second=copy, matmul_flop_per_second=products)
        if copy < products:
            assert record.floor("softmax", FORWARD, 100) == pytest.approx(6 * 4 * 100 * 5 * 4 / 1e9)
            assert record.floor("linear", BOTH, 100) == pytest.approx(6 * 11 * 100 * 5 * 4 / 1e9)
        else:
            assert record.floor("softmax", FORWARD, 100) == pytest.approx(6 * 2 * 100**2 * 5 / 1e10)
            assert record.floor("bare", FORWARD, 100) == pytest.approx(6 * 4 * 100 * 5**2 / 1e10)
            assert record.floor("softmax", BOTH, 100) == pytest.approx(3 * record.floor("softmax", FORWARD, 100))

    def test_repeats_that_lie_far_apart(self):
        assert Point("", FORWARD, 1, [1, 1, 1, 2, 2]).noisy and not Point("", FORWARD, 1, [1, 1, 1, 1.2, 9]).noisy

    def test_saved_and_loaded_it_is_the_same(self, record, tmp_path):
        record.save(tmp_path / "new" / "r.json")
        assert Record.load(tmp_path / "new" / "r.json") == record
        assert load_records(tmp_path / "new") == [record] and load_records(tmp_path) == []

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"points": [{"n": 1}]}'])
    def test_another_file_is_named(self, tmp_path, content):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(ValueError, match=r"x\.json is no record of a measurement"):
            Record.load(tmp_path / "x.json")


class TestReport:
    def test_the_table_says_what_the_curves_say(self, record):
        text = summarise(record)
        assert "a processor, 1 thread, 2026-01-02, torch 2: batch 2, 3 heads, 5 features, float32" in text
        assert "ours overtakes fused at n = 1,000; at 8,192 it takes 1/8.2 of the time" in text
        assert re.search(r"grows as +n\^2\.00 +n\^2\.00 +n\^1\.00", text)
        assert "left out: another (it is not there)" in text
        floor, median = record.floor("softmax", FORWARD, 2**13), 1e-9 * 2**26
        assert f"fused at n = 8,192: {100 * floor / median:.0f} % of the speed that the device could have" in text

    def test_one_that_stays_behind(self):
        text = summarise(power_laws(fused=("softmax", 1e-9, 1.0, 12), ours=("linear", 1e-6, 1.0, 14)))
        assert "ours does not overtake fused up to n = 2,048: at 2,048 it takes 1000.0 times as long" in text
        assert "above the speed (so that was measured too low) that" in text

    def test_one_that_is_always_ahead(self):
        text = summarise(power_laws(fused=("softmax", 1e-6, 1.0, 12), ours=("linear", 5e-7, 1.0, 12)))
        assert "ours is ahead of fused from the shortest length on; at 2,048 it takes 1/2.0 of the time" in text

    def test_short_curves_and_empty_ones(self):
        assert "n^" not in summarise(power_laws(fused=("softmax", 1e-9, 1.0, 9), ours=("linear", 1e-6, 1.0, 8)))

    def test_all_curves_are_drawn(self, record):
        figure = draw(record)
        for ax in figure.axes[:2]:
            drawn = {line.get_label(): line for line in ax.lines}
            assert {"naive", "fused", "ours"} < set(drawn)
            assert drawn["fused"].get_ydata()[0] == pytest.approx(1e3 * 1e-9 * 256**2)
        assert [line.get_ydata()[-1] for line in figure.axes[2].lines] == pytest.approx(
            [2**10 / 1e6, 2**13 / 1e6, 2**16 / 1e6]
        )


def test_a_short_run_on_this_processor(capsys):
    made = measure(device="cpu", seconds=2.0, longest=1024, progress=True)
    assert set(made.functions) == {"naive softmax", "SDPA flash", "linear, torch"} and not made.left_out
    assert all(0 < error < 1e-5 for found in made.errors.values() for error in found.values())
    assert made.copy_bytes_per_second > 1e8 and made.matmul_flop_per_second > 1e8
    for name in made.functions:
        first = made.curve(name, FORWARD)[0]
        assert first.n == 256 and 3 <= len(first.seconds) <= 25
        assert first.median == sorted(first.seconds)[len(first.seconds) // 2] or len(first.seconds) % 2 == 0
    peaks = {name: {p.n: p.peak_bytes for p in made.curve(name, FORWARD)} for name in made.functions}
    assert peaks["naive softmax"][256] >= 2 * 4 * 4 * 256**2  # scores and weights, 4 heads of 4-byte numbers
    assert peaks["linear, torch"][256] < 4 * 4 * 256**2
    assert "█" in capsys.readouterr().err


def broken(q, k, v):
    raise RuntimeError("no such device\nand a long trace")


def full(q, k, v):
    if q.shape[-2] > 256:
        raise torch.OutOfMemoryError("tried to allocate")
    return methods.softmax_attention(q, k, v)


def test_rivals_that_are_wrong_missing_or_full_are_named_and_the_others_go_on(monkeypatch):
    rivals = [
        Method("right", "softmax", lambda: methods.softmax_attention),
        Method("not causal", "softmax", lambda: lambda q, k, v: methods.softmax_attention(q, k, v, causal=False)),
        Method("no number", "softmax", lambda: lambda q, k, v: methods.softmax_attention(q, k, v) * torch.nan),
        Method("breaks", "softmax", lambda: broken),
        Method("full", "softmax", lambda: full),
        Method("missing", "bare", lambda: methods._fla("chunk_linear_attn")),
    ]
    monkeypatch.setattr(benchmark, "methods", lambda kind: rivals)
    monkeypatch.setitem(sys.modules, "fla", None)
    monkeypatch.setattr(methods, "find_spec", lambda name: None)
    made = measure(device="cpu", seconds=60.0, longest=512)
    assert set(made.functions) == {"right", "full"}
    for name in ("not causal", "no number"):
        assert re.match(r"differs from float64 by .* of its size: not timed", made.left_out[name])
    assert made.left_out["breaks"] == "RuntimeError: no such device"
    assert made.left_out["missing"] == "RuntimeError: flash-linear-attention is not installed"
    assert [p.n for p in made.curve("right", BOTH)] == [256, 512]
    notes = {(p.method, p.n): p.note for p in made.points if not p.seconds}
    assert notes[("full", 512)] == "out of memory"
    assert "full, forward, ends before n = 512: out of memory" in summarise(made)


def test_a_processor_is_not_asked_for_memory_that_it_has_not(monkeypatch):
    monkeypatch.setattr(benchmark._Bench, "free_memory", lambda self: 12e6)
    made = measure(device="cpu", seconds=60.0, longest=4096, only=["naive softmax", "linear, torch"])
    last = {(p.method, p.direction): p for p in made.points}
    assert re.match(r"out of memory: the next length needs about", last["naive softmax", FORWARD].note)
    assert "not even the inputs fit" in last["linear, torch", FORWARD].note


def test_what_is_measured_before_an_interruption_is_kept(monkeypatch):
    def interrupted(q, k, v):
        if q.shape[-2] > 256:
            raise KeyboardInterrupt
        return methods.softmax_attention(q, k, v)

    monkeypatch.setattr(benchmark, "methods", lambda kind: [Method("one", "softmax", lambda: interrupted)])
    made = measure(device="cpu", seconds=60.0, longest=512)
    assert [p.n for p in made.curve("one", BOTH)] == [256] and made.left_out == {"the rest": "interrupted"}


def test_inputs_that_do_not_fit_end_the_curves_and_nothing_else(monkeypatch):
    inputs = benchmark._Bench.inputs

    def full(self, n, tokens_first=False):
        if n > 256:
            raise torch.OutOfMemoryError
        return inputs(self, n, tokens_first)

    monkeypatch.setattr(benchmark._Bench, "inputs", full)
    made = measure(device="cpu", seconds=60.0, longest=512, only=["linear, torch"])
    assert [(p.n, p.note) for p in made.points if not p.seconds] == [
        (512, "out of memory: not even the inputs fit")
    ] * 2


def test_nothing_that_can_be_measured(monkeypatch):
    monkeypatch.setattr(benchmark, "methods", lambda kind: [Method("breaks", "softmax", lambda: broken)])
    with pytest.raises(RuntimeError, match=r"^nothing could be measured: breaks: RuntimeError: no such device$"):
        measure(device="cpu", seconds=1.0, longest=256)


@pytest.mark.parametrize("n", [128, 300, 512])
def test_flex_attention_gets_the_causal_blocks(monkeypatch, n):
    """Uncompiled, it runs on a CPU, and wants a notice of that no less than we do not."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    flex = methods._flex()
    q, k, v = (torch.randn(1, 2, n, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(flex(q, k, v), methods.softmax_attention(q, k, v))


def test_a_curve_ends_with_its_share_of_the_time():
    made = measure(device="cpu", seconds=0.02, longest=2**14)
    notes = [p.note for p in made.points if not p.seconds]
    assert len(notes) == 6 and all("share of the time" in note for note in notes)


def test_what_a_curve_has_spent_counts(monkeypatch):
    """Each length alone would fit into the share, five or six together do not."""

    def slow(q, k, v):
        time.sleep(0.05)
        return methods.linear_attention(q, k, v)[0]

    monkeypatch.setattr(benchmark, "methods", lambda kind: [Method("slow", "linear", lambda: slow)])
    made = measure(device="cpu", seconds=2.6, longest=2**13)
    assert any("share of the time" in p.note for p in made.points if p.direction == FORWARD)


def test_causal_blocks_cover_what_is_not_later():
    count, index, whole_count, whole = (x[0, 0] for x in methods.causal_blocks(400, torch.device("cpu")))
    for row in range(4):
        assert index[row, : count[row]].tolist() == [row], "on the diagonal, to be masked"
        assert whole[row, : whole_count[row]].tolist() == list(range(row))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"device": "tpu"}, "device must be auto, cpu or cuda, not 'tpu'"),
        ({"dtype": torch.float64}, "dtype must be one of float32, float16, bfloat16, not float64"),
        ({"heads": 0}, "heads must be a whole number of at least 1, not 0"),
        ({"features": 2.5}, "features must be a whole number of at least 1, not 2.5"),
        ({"longest": 100}, "the longest length must be at least 256, not 100"),
        ({"seconds": 0}, "seconds must be positive, not 0"),
        ({"only": ["SDPA flsh"]}, "unknown on cpu: SDPA flsh; there are naive softmax, SDPA flash, linear, torch"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        measure(**{"device": "cpu"} | settings)


@pytest.mark.parametrize("function", ["linear", "bare"])
def test_the_reference_is_the_definition(function):
    q, k, v = (
        torch.randn(1, 1, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3)
    )
    f = (lambda x: torch.nn.functional.elu(x) + 1) if function == "linear" else (lambda x: x)
    for i, row in enumerate(methods.reference(function, q, k, v)[0, 0]):
        weights = torch.tensor([float(f(q[0, 0, i]) @ f(k[0, 0, j])) for j in range(i + 1)], dtype=torch.float64)
        weights = weights / weights.sum() if function == "linear" else weights
        torch.testing.assert_close(row, weights @ v[0, 0, : i + 1])


def test_the_rival_of_another_package_gets_its_layout_and_our_function(monkeypatch):
    """flash-linear-attention wants (batch, n, heads, d), scales and normalises unless told not to."""
    seen = {}

    def chunk_linear_attn(q, k, v, scale=None, normalize=True):
        seen.update(shape=tuple(q.shape), contiguous=q.is_contiguous(), scale=scale, normalize=normalize)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return methods.reference("bare", q, k, v).transpose(1, 2), None

    module = types.ModuleType("fla.ops.linear_attn")
    module.chunk_linear_attn = chunk_linear_attn
    for name, content in (
        ("fla", types.ModuleType("fla")),
        ("fla.ops", types.ModuleType("fla.ops")),
        (module.__name__, module),
    ):
        monkeypatch.setitem(sys.modules, name, content)
    sys.modules["fla"].ops, sys.modules["fla.ops"].linear_attn = sys.modules["fla.ops"], module
    monkeypatch.setattr(methods, "find_spec", lambda name: True)
    rival = next(m for m in methods.methods("cuda") if m.name == "bare, fla chunk")
    bench = benchmark._Bench("cpu", torch.float32, (2, 3, 4))
    errors = bench.errors(rival, rival.prepare(), 256)
    assert max(errors.values()) < 1e-5
    assert seen == {"shape": (2, 256, 3, 4), "contiguous": True, "scale": 1.0, "normalize": False}


class TestCommand:
    def test_it_prints_and_writes(self, tmp_path, capsys):
        arguments = ["--device", "cpu", "--seconds", "0.5", "--longest", "512", "--heads", "1", "--features", "8", "16"]
        assert command.main([*arguments, "--to", str(tmp_path)]) == 0
        printed = capsys.readouterr().out
        assert "8 features" in printed and "16 features" in printed and "forward + backward, milliseconds" in printed
        assert [r.settings["features"] for r in load_records(tmp_path)] in ([8, 16], [16, 8])
        assert len(list(tmp_path.glob("*-b1h1d16-float32.png"))) == 1 and len(list(tmp_path.glob("*.png"))) == 2

    def test_a_folder_that_cannot_be_made(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(benchmark, "measure", lambda **_: pytest.fail("measured before the folder was there"))
        (tmp_path / "file").write_text("")
        assert command.main(["--to", str(tmp_path / "file" / "folder")]) == 1
        assert "file" in capsys.readouterr().err

    @pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
    def test_a_gpu_that_is_not_there(self, tmp_path, capsys):
        assert command.main(["--device", "cuda", "--to", str(tmp_path)]) == 1
        assert "torch finds no CUDA GPU here" in capsys.readouterr().err

    def test_a_setting_that_cannot_be(self, capsys):
        assert command.main(["--device", "cpu", "--heads", "-2"]) == 1
        assert capsys.readouterr().err == "heads must be a whole number of at least 1, not -2\n"
        with pytest.raises(SystemExit):
            command.main(["--threads", "0"])
        assert "--threads must be at least 1" in capsys.readouterr().err


def test_what_travels_with_the_notebooks_was_measured():
    records = load_records()
    assert records, "no record is in the repository"
    for found in records:
        assert re.match(r"\d{4}-\d\d-\d\dT", found.date) and found.device["name"] and found.versions["torch"]
        assert found.functions.keys() == found.errors.keys() and found.method
        assert all(len(p.seconds) >= 3 for p in found.points if p.seconds)
        assert found.settings["features"] >= 1


def test_the_notebook_quotes_the_kernel():
    """Every line of the kernel that 08 explains is a line of the kernel."""
    (notebook,) = (read(path) for path in NOTEBOOKS if path.stem == "08_linear_attention")
    source = {line.strip() for line in (ROOT / "helpers" / "speed" / "kernels.py").read_text("utf-8").splitlines()}
    (quoted,) = (re.findall(r"```python\n(.*?tl\.dot.*?)```", c.source, re.DOTALL)[0] for c in notebook.cells
                 if c.cell_type == "markdown" and "tl.dot" in c.source)  # fmt: skip
    lines = [line.strip() for line in quoted.splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(lines) > 8 and not set(lines) - source, set(lines) - source
