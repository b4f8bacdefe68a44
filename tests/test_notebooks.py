"""What every notebook promises, read from the stored files: nbval executes them, these tests look at the rest."""

from __future__ import annotations

import ast
import base64
import io
import re

import nbformat
import pytest
from collection import NOTEBOOKS, ROOT, TOPICS, calls, equation_problems, exercises, read
from PIL import Image

EXPECTED_NOTEBOOKS = [
    "00_start_here",
    "01_stochastic_approximation",
    "02_adamw",
    "03_feature_columns",
    "04_tfrecord",
    "05_upsampling",
    "06_average_precision",
    "07_efficient_attention",
    "08_linear_attention",
    "09_performer",
    "10_transnormer",
    "11_flash",
    "12_hippo",
]

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
every_topic = pytest.mark.parametrize("path", TOPICS, ids=lambda path: path.stem)


def code_cells(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def markdown(path):
    return "\n\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")


def pictures(path):
    """Every stored picture: cell, output."""
    return [(c, o) for c in code_cells(path) for o in c.outputs if "image/png" in o.get("data", {})]


def test_the_notebooks_are_the_expected_ones():
    assert [path.stem for path in NOTEBOOKS] == EXPECTED_NOTEBOOKS


def test_nbval_collected_every_code_cell(request):
    """A glob that matches nothing passes, and so does a notebook that nbval overlooks: count what was collected."""
    collected = {}
    for item in request.session.items:
        if type(item).__name__ == "IPyNbCell":
            collected[item.path.stem] = collected.get(item.path.stem, 0) + 1
    if not collected:
        pytest.skip("the notebooks are not part of this run; `make test` includes them")
    assert collected == {path.stem: len(code_cells(path)) for path in NOTEBOOKS}
    assert sum(collected.values()) >= 30


@every_notebook
def test_every_numbered_equation_is_checked_in_the_next_code_cell(path):
    assert equation_problems(read(path)) == []


@every_notebook
def test_every_code_cell_was_run_in_order_without_warnings(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        prints = bool(calls(cell.source, "print") or calls(cell.source, "check") or calls(cell.source, "explore"))
        assert not prints or cell.outputs, f"the output of {cell.id} was cleared"
        for output in cell.outputs:
            assert output.output_type != "error", f"{cell.id} stores an error"
            assert output.get("name") != "stderr", f"{cell.id} stores a warning: {output.text}"


@every_notebook
def test_nothing_that_belongs_to_one_machine_is_stored(path):
    text = path.read_text(encoding="utf-8")
    notebook = read(path)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert "application/vnd.jupyter.widget" not in text
    for pattern in (r"/home/", r"/Users/", r"/root/", r"/tmp/", r"[A-Z]:\\\\", r"site-packages", r" at 0x[0-9a-f]"):
        assert not re.search(pattern, text), f"{pattern} in {path.name}"
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"slideshow", "tags", "jupyter"}
        assert cell.metadata.slideshow.slide_type in {"slide", "subslide", "fragment", "skip", "notes", "-"}


@every_notebook
def test_the_code_is_clean(path):
    for cell in code_cells(path):
        assert not cell.source.rstrip().endswith(";"), f"{cell.id} ends in ';', which nbval compares wrongly"
        for word in (
            "sys.path",
            "warnings.",
            "urlopen",
            "requests.",
            "fetch_",
            "!pip",
            "%pip",
            "plt.show",
            "interact(",
        ):
            assert word not in cell.source, f"{word} in {cell.id}"
        assert not calls(cell.source, "allclose"), f"{cell.id}: a bare allclose is no check"
        assert max(map(len, cell.source.splitlines())) <= 120, f"a line in {cell.id} is wider than the page"
        names = {n.id for n in ast.walk(ast.parse(cell.source)) if isinstance(n, ast.Name)}
        assert "Output" not in names, f"{cell.id} uses an Output widget"


@every_notebook
def test_pictures_are_small_opaque_and_described(path):
    assert path.stat().st_size < 1_000_000
    assert pictures(path)
    for cell, output in pictures(path):
        image = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
        assert image.mode in ("RGB", "P") and "transparency" not in image.info, f"{cell.id} is transparent"
        assert 300 <= image.width <= 1200, f"{cell.id} is {image.width} pixels wide"
        alt = output.metadata["image/png"]["alt"]
        assert len(alt.split()) >= 12, f"{cell.id} is hardly described: {alt}"
        assert "$" not in alt and "\\" not in alt, f"{cell.id}: TeX in the alternative text: {alt}"
        assert alt == output.data["text/plain"], f"{cell.id}: nbval compares text/plain, so it must be the description"


@every_notebook
def test_every_widget_has_a_question_a_goal_and_a_folded_answer(path):
    cells = read(path).cells
    widgets = [i for i, cell in enumerate(cells) if cell.cell_type == "code" and calls(cell.source, "explore")]
    assert widgets
    for i in widgets:
        before = next(c for c in reversed(cells[:i]) if c.cell_type == "markdown")
        after = next(c for c in cells[i:] if c.cell_type == "markdown")
        assert "**Predict first.**" in before.source, f"{cells[i].id}: nothing to predict"
        assert re.search(r"\*\*(Goal|Then play|Break it):\*\*", before.source), f"{cells[i].id}: no goal"
        assert after.source.startswith("<details><summary><b>What you should have seen"), f"{cells[i].id}: no answer"
        assert cells[i].metadata.get("jupyter", {}).get("source_hidden"), f"{cells[i].id}: fold the drawing code"
        (call,) = calls(cells[i].source, "explore")
        given = {keyword.arg for keyword in call.keywords}
        assert {"alt", "stills", "goal"} <= given, f"{cells[i].id} lacks { ({'alt', 'stills', 'goal'} - given) }"


@every_notebook
def test_markdown_is_well_formed(path):
    text = markdown(path)
    assert text.count("<details>") == text.count("</details>")
    for cell in read(path).cells:
        if cell.cell_type == "markdown":
            source = re.sub(r"```.*?```|`[^`]*`", "", cell.source, flags=re.DOTALL)
            assert source.count("$$") % 2 == 0 and source.replace("$$", "").count("$") % 2 == 0, cell.id
            for formula in re.findall(r"\$\$(.*?)\$\$", source, re.DOTALL):
                assert formula.count("{") == formula.count("}"), f"{cell.id}: {formula}"


@every_notebook
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", markdown(path)):
        if not target.startswith("https://"):
            assert (path.parent / target).is_file(), f"{path.name} links to {target}"


@every_topic
def test_a_topic_has_the_anatomy_and_the_size(path):
    notebook, text = read(path), markdown(path)
    title, promise = [line for line in notebook.cells[0].source.splitlines() if line][:2]
    assert title.startswith(f"# {path.name[:2]} · ") and promise.startswith("**")
    assert re.search(r"\*\d+ (minutes|hours)", notebook.cells[0].source) and "**Terms.**" in notebook.cells[0].source
    assert re.search(r"[一-鿿]", notebook.cells[0].source), "the terms in Chinese are missing"
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    for wanted in ("What people get wrong", "Exercises", "All on one page", "References"):
        assert any(wanted in heading for heading in headings), f"no section {wanted!r}"
    assert 25 <= len(notebook.cells) <= 50, len(notebook.cells)
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    prose = re.sub(r"\$\$.*?\$\$|\$[^$]*\$", "formula", prose, flags=re.DOTALL)  # a formula counts as one word
    assert 1500 <= len(prose.split()) <= 3500, len(prose.split())
    assert len(exercises(notebook)) >= 3
    summary = text.split("## All on one page")[1]
    numbers = [int(n) for n in re.findall(r"\\tag\{(\d+)\}", text)]
    for a, b in re.findall(r"\((\d+)\)[–,] ?\((\d+)\)", summary):
        numbers = [n for n in numbers if not int(a) <= n <= int(b)]
    assert not numbers, f"the summary table leaves out equations {numbers}"


@every_topic
def test_a_topic_is_a_triplet_and_the_map_and_the_readme_link_to_it(path):
    name = path.stem[3:]
    assert (ROOT / "helpers" / f"{name}.py").is_file() and (ROOT / "tests" / f"test_{name}.py").is_file()
    assert f"({path.name})" in markdown(ROOT / "notebooks" / "00_start_here.ipynb")
    assert f"(notebooks/{path.name})" in (ROOT / "README.md").read_text(encoding="utf-8")
