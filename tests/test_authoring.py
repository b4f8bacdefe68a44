"""The maintainer's tools: build, the command line, the benchmark, a new notebook."""

from __future__ import annotations

import base64
import io
import subprocess
import sys

import nbformat
import numpy as np
import pytest
from bs4 import BeautifulSoup
from collection import NOTEBOOKS, ROOT, equation_problems, read
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from helpers.authoring import bench, build, export, new
from helpers.authoring.__main__ import main


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def noise(shape=(60, 80, 3)):
    return np.random.default_rng(0).integers(0, 255, shape)


def write_small(path):
    """A notebook with one picture, one widget and one cell whose output depends on the machine."""
    cells = [
        new_code_cell(
            "import matplotlib.pyplot as plt\nfrom helpers.teaching import explore, show, slider\n"
            "fig, ax = plt.subplots()\nax.plot([1, 3, 2])\nshow(fig, 'A line that goes up and down.')\n"
            "print('a')\nprint('b')"
        ),
        new_code_cell(
            "explore(lambda ax, n: ax.plot([0, n]) and None, alt='A line of a certain slope.', n=slider(1, 3))"
        ),
        new_code_cell("import time; print(time.time_ns())", metadata={"tags": ["nbval-ignore-output"]}),
    ]
    nbformat.write(new_notebook(cells=cells), path)
    return path


@pytest.fixture
def notebook(tmp_path):
    """The small notebook, never run."""
    return write_small(tmp_path / "small.ipynb")


@pytest.fixture(scope="module")
def once_built(tmp_path_factory):
    """What a build makes of the small notebook: the same for all tests that begin with it."""
    path = write_small(tmp_path_factory.mktemp("built") / "small.ipynb")
    build.build(path)
    return path.read_bytes()


@pytest.fixture
def built(tmp_path, once_built):
    """The small notebook as a build has stored it."""
    path = tmp_path / "small.ipynb"
    path.write_bytes(once_built)
    return path


class TestBuild:
    def test_stores_outputs_without_noise_and_then_changes_no_byte(self, notebook):
        assert build.build(notebook).changed
        stored = read(notebook)
        assert stored.metadata.language_info == {"name": "python"}
        assert [c.execution_count for c in stored.cells] == [1, 2, 3]
        assert build.WIDGET_VIEW not in notebook.read_text()
        assert [o.output_type for o in stored.cells[0].outputs] == ["display_data", "stream"]
        assert stored.cells[0].outputs[1].text == "a\nb\n"
        before = notebook.read_bytes()
        assert not build.build(notebook).changed
        assert notebook.read_bytes() == before

    def test_what_depends_on_the_machine_is_stored_anew_only_when_asked_for(self, built):
        stored = read(built).cells[2].outputs
        build.build(built)
        assert read(built).cells[2].outputs == stored
        build.build(built, fresh=True)
        assert read(built).cells[2].outputs != stored

    def test_line_ends_are_mended(self, built):
        good = built.read_bytes()
        built.write_bytes(good.replace(b"\n", b"\r\n"))
        assert build.build(built).changed and built.read_bytes() == good

    def test_check_says_what_is_out_of_date_and_writes_nothing(self, built):
        text = built.read_text().replace("[1, 3, 2]", "[1, 3, 0]")
        built.write_text(text)
        assert build.build(built, check=True).changed
        assert built.read_text() == text

    def test_a_failing_cell_is_not_stored(self, notebook):
        broken = read(notebook)
        broken.cells[0].source = "1 / 0"
        nbformat.write(broken, notebook)
        before = notebook.read_bytes()
        with pytest.raises(build.BuildError, match="ZeroDivisionError"):
            build.build(notebook)
        assert notebook.read_bytes() == before

    def test_a_widget_that_a_later_cell_breaks_is_found(self, notebook):
        broken = read(notebook)
        broken.cells[1].source = (
            "data = [0, 1]\n"
            "explore(lambda ax, n: ax.plot(data[:n]) and None, alt='A line of a certain length.', n=slider(2, 3))"
        )
        broken.cells[2].source = "data.append(5); data[1] = 3"
        nbformat.write(broken, notebook)
        with pytest.raises(build.BuildError, match="draws another picture than when it was built"):
            build.build(notebook)

    def test_too_large_a_notebook_is_refused(self, notebook, monkeypatch):
        monkeypatch.setattr(build, "LARGEST_NOTEBOOK", 1000)
        with pytest.raises(build.BuildError, match="1000 is the limit"):
            build.build(notebook)

    def test_pictures_are_shrunk_to_a_palette_and_stay_the_same_to_the_eye(self):
        smooth = np.linspace(0, 255, 80)[None, :, None].repeat(60, axis=0).repeat(3, axis=2)
        smooth[:, :, 1] = smooth[:, ::-1, 1]
        original = png(smooth)
        small = build.shrink(original)
        assert len(small) <= len(original) and not build.picture_difference(original, small)

    @pytest.mark.parametrize(
        "pixels, levels, differs", [(25, 255, False), (26, 255, True), (4800, 64, False), (4800, 65, True)]
    )
    def test_pictures_differ_when_many_pixels_differ_much(self, pixels, levels, differs):
        a = np.zeros((60, 80, 3))
        b = a.copy()
        b.reshape(-1, 3)[:pixels, 1] = levels
        assert bool(build.picture_difference(png(a), png(b))) == differs

    def test_pictures_of_other_sizes_differ(self):
        message = build.picture_difference(png(noise()), png(noise((60, 81, 3))))
        assert message == "the stored picture is 80×60, the fresh one 81×60"

    def test_a_stored_error_is_refused(self):
        cell = new_code_cell("1/0", outputs=[new_output("error", ename="E", evalue="v", traceback=[])])
        with pytest.raises(build.BuildError, match="failed: E: v"):
            build.clean(new_notebook(cells=[cell]))


class TestEquations:
    """The test that pairs equations with checks must itself be able to fail."""

    def cells(self, *tags, checks=(), printed=None):
        text = " ".join(rf"$$x \tag{{{n}}}$$" for n in tags)
        source = "\n".join(f"check({n}, 'x', 1, 2)" for n in checks)
        output = new_output("stream", text="".join(f"✓ ({n}) x\n" for n in (checks if printed is None else printed)))
        return [new_markdown_cell(text), new_code_cell(source, outputs=[output])]

    @pytest.mark.parametrize("cells, problem", [
        (lambda c: c(1, 2, checks=(1, 2)) + c(3, checks=(3,)), None),
        (lambda c: c(1, 2, checks=(1,)), "checks [1], the text before it numbers [1, 2]"),
        (lambda c: c(checks=(1,)), "checks [1], the text before it numbers []"),
        (lambda c: c(1)[:1], "equations [1] at the end have no check"),
        (lambda c: c(1, checks=(1,)) + c(3, checks=(3,)), "equations are numbered [1, 3]"),
        (lambda c: c(1, checks=(1,), printed=()), "does not print ✓ (1)"),
    ])  # fmt: skip
    def test_pairing(self, cells, problem):
        problems = equation_problems(new_notebook(cells=cells(self.cells)))
        assert (problems == []) if problem is None else any(problem in p for p in problems)


class TestCommandLine:
    def run(self, monkeypatch, *words):
        monkeypatch.setattr(sys, "argv", ["authoring", *map(str, words)])
        return main()

    def test_build_and_check(self, monkeypatch, capsys, notebook):
        assert self.run(monkeypatch, "build", "--check", notebook) == 1
        assert self.run(monkeypatch, "build", notebook) == 0
        assert self.run(monkeypatch, "build", "--check", notebook) == 0
        assert capsys.readouterr().out.count("small.ipynb: ") == 3

    def test_bench(self, monkeypatch, capsys, notebook):
        slow = read(notebook)  # slower than any processor is quick: what is measured has to be what `draw` takes
        slow.cells[1].source = (
            "import time\ndef draw(ax, n):\n    time.sleep(0.1)\n    ax.plot([0, n])\n"
            "explore(draw, alt='A line of a certain slope.', n=slider(1, 3))"
        )
        nbformat.write(slow, notebook)
        monkeypatch.setattr(bench, "LIMIT_MS", 1e6)
        assert self.run(monkeypatch, "bench", notebook) == 0
        header, row, verdict = capsys.readouterr().out.splitlines()
        assert header.split()[:3] == ["notebook", "widget", "control"] and row.split()[2] == "n"
        assert float(row.split()[3]) > 100 and verdict == "0 controls above 1000000 ms"

    def test_a_missing_notebook(self, monkeypatch, capsys):
        with pytest.raises(SystemExit):
            self.run(monkeypatch, "build", "no_such.ipynb")
        assert "there is no notebook no_such.ipynb" in capsys.readouterr().err

    def test_look_without_a_browser(self, monkeypatch, capsys):
        monkeypatch.setenv("CHROMIUM", "/no/such/browser")
        assert self.run(monkeypatch, "look", NOTEBOOKS[0]) == 1
        assert capsys.readouterr().err == "CHROMIUM=/no/such/browser is no file: set it to the browser's program\n"
        monkeypatch.delenv("CHROMIUM")
        monkeypatch.setattr("helpers.authoring.lab.shutil.which", lambda name: None)
        monkeypatch.setattr("helpers.authoring.lab.Path.is_file", lambda path: False)
        with pytest.raises(Exception, match=r"^no Chromium found: install one .* or set CHROMIUM to its path$"):
            from helpers.authoring.lab import find_chromium

            find_chromium()


class TestExport:
    @pytest.mark.parametrize("slides", [False, True])
    def test_every_picture_has_its_text(self, slides, tmp_path):
        path = NOTEBOOKS[1]
        page = BeautifulSoup(export.export(path, tmp_path, slides=slides).read_text(encoding="utf-8"), "html.parser")
        texts = [image["alt"] for image in page.find_all("img") if image["src"].startswith("data:image/png")]
        stored = [
            o.data["text/plain"]
            for c in read(path).cells
            for o in c.get("outputs", [])
            if "image/png" in o.get("data", {})
        ]
        assert texts == stored and len(texts) >= 8


class TestNew:
    def test_a_new_topic_is_a_triplet_that_runs(self, tmp_path, monkeypatch):
        for folder in ("notebooks", "helpers", "tests"):
            (tmp_path / folder).mkdir()
        made = new.new("99_diffusion", root=tmp_path)
        names = ["notebooks/99_diffusion.ipynb", "helpers/diffusion.py", "tests/test_diffusion.py"]
        assert [p.relative_to(tmp_path).as_posix() for p in made] == names
        notebook = read(made[0])
        assert equation_problems(build.clean(build.execute(notebook, ROOT))) == []
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--rootdir",
            str(tmp_path),
            str(made[2]),
        ]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert "1 failed" in run.stdout, "the skeleton's test must remind its author that nothing is tested yet"

    @pytest.mark.parametrize("name", ["diffusion", "1_x", "13-x", "13_X", "13_lambda"])
    def test_names(self, tmp_path, name):
        with pytest.raises(new.NameTaken, match="a topic is named like 13_diffusion"):
            new.new(name, root=tmp_path)

    @pytest.mark.parametrize("name, taken", [("01_other", "01_"), ("13_teaching", "teaching")])
    def test_numbers_and_packages_are_taken(self, name, taken):
        with pytest.raises(new.NameTaken, match=f"{taken}.* exists already"):
            new.new(name)

    def test_nothing_is_overwritten(self, tmp_path):
        (tmp_path / "helpers").mkdir()
        (tmp_path / "helpers" / "diffusion.py").write_text("mine")
        with pytest.raises(new.NameTaken, match=r"diffusion\.py exists already"):
            new.new("13_diffusion", root=tmp_path)
        assert (tmp_path / "helpers" / "diffusion.py").read_text() == "mine" and not (tmp_path / "tests").exists()
