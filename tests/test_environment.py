"""The files that install the project agree with each other, and what is missing is said in one sentence."""

from __future__ import annotations

import importlib
import re
import socket
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest
import yaml
from collection import NOTEBOOKS, ROOT, read, skip_unless_pinned
from jupyter_client.manager import start_new_kernel
from packaging.requirements import Requirement
from packaging.version import Version

import helpers.environment

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PYPI = {r.name: r for r in map(Requirement, PYPROJECT["project"]["dependencies"])}
TEST = {r.name: r for r in map(Requirement, PYPROJECT["project"]["optional-dependencies"]["test"])}
CONDA_NAMES = {"torch": "pytorch"}  # where conda-forge uses another name


def environment_yml():
    return yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))


def test_environment_yml_is_valid_for_conda():
    rattler = pytest.importorskip("rattler")
    environment = environment_yml()
    assert set(environment) == {"name", "channels", "dependencies"}
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    for spec in environment["dependencies"]:
        if isinstance(spec, str):
            rattler.MatchSpec(spec, strict=True)
    assert environment["dependencies"][-1] == {"pip": ["-e ."]}
    assert "pip" in environment["dependencies"]


def test_environment_yml_says_what_pyproject_says():
    specs = [spec for spec in environment_yml()["dependencies"] if isinstance(spec, str) and spec != "pip"]
    conda = dict(re.fullmatch(r"([a-z0-9_-]+)(.*)", spec).groups() for spec in specs)
    wanted = {CONDA_NAMES.get(name, name): str(r.specifier) for name, r in PYPI.items()}
    assert conda == wanted | {"python": PYPROJECT["project"]["requires-python"]}


def test_what_the_collection_is_built_on_is_declared():
    assert {"jupyter", "numpy", "matplotlib", "torch", "ipywidgets", "nbval"} <= set(PYPI)


def test_the_constraints_pin_every_dependency_inside_its_bounds():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {r.name.lower(): r for r in (Requirement(line) for line in lines if line and not line.startswith("#"))}
    for name, requirement in (PYPI | TEST).items():
        assert name in pins, f"constraints.txt does not pin {name}"
        (pin,) = pins[name].specifier
        assert pin.operator == "==" and requirement.specifier.contains(Version(pin.version)), name


def test_what_the_package_requires_at_import_is_declared():
    assert set(helpers.environment.REQUIRED_PACKAGES.values()) <= set(PYPI)
    minimum = ".".join(map(str, helpers.environment.MINIMUM_PYTHON))
    assert PYPROJECT["project"]["requires-python"] == f">={minimum}"


def test_every_import_of_the_project_is_a_declared_dependency():
    provides = {
        "PIL": "pillow",
        "sklearn": "scikit-learn",
        "yaml": "pyyaml",
        "rattler": "py-rattler",
        "skimage": "scikit-image",
    }
    provides |= {"farmhash": "cityhash", "google": "protobuf"}
    # Installed with what is declared, and documented as its parts.
    parts = {"cycler": "matplotlib", "nbformat": "nbval", "nbclient": "jupyter",
        "nbconvert": "jupyter",
        "jinja2": "jupyter",
        "bs4": "jupyter",
             "jupyter_client": "jupyter", "IPython": "jupyter", "packaging": "pytest"}  # fmt: skip
    sources = [p.read_text(encoding="utf-8") for folder in ("helpers", "tests") for p in (ROOT / folder).rglob("*.py")]
    sources.append((ROOT / "conftest.py").read_text(encoding="utf-8"))
    sources += [cell.source for path in NOTEBOOKS for cell in read(path).cells if cell.cell_type == "code"]
    imported = {m for s in sources for m in re.findall(r"^\s*(?:import|from) (\w+)", s, re.MULTILINE)}
    ours = {"helpers", "beyond_nbval", "collection", "offline", "reader"}
    foreign = imported - set(sys.stdlib_module_names) - ours
    undeclared = {m for m in foreign if (provides | parts).get(m, m) not in PYPI | TEST}
    assert not undeclared


def test_the_readme_and_ci_use_the_same_test_command():
    assert "make test\n" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").rstrip().endswith("make test")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))
    assert any("make test" in step.get("run", "") for step in workflow["jobs"]["make-test"]["steps"])


def test_the_code_is_formatted_and_linted():
    skip_unless_pinned("ruff")
    for command in (["check"], ["format", "--check"]):
        run = subprocess.run([sys.executable, "-m", "ruff", *command, str(ROOT)], capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr


def test_tests_have_no_network():
    for connect in ("connect", "connect_ex"):
        with socket.socket() as out, pytest.raises(ConnectionRefusedError, match="the tests run without network"):
            getattr(out, connect)(("192.0.2.1", 80))  # an address that is reserved for documentation


def test_kernels_have_no_network():
    manager, client = start_new_kernel()
    try:
        code = "import socket\nsocket.create_connection(('192.0.2.1', 80), timeout=5)"
        content = client.execute(code, reply=True, timeout=60)["content"]
        assert content["ename"] == "ConnectionRefusedError" and "the tests run without network" in content["evalue"]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_an_old_python_is_named_with_the_mend(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 2, "final", 0))
    with pytest.raises(ImportError, match=r"need Python 3\.11 or newer .*make install PYTHON=python3\.11"):
        helpers.environment.require_environment()


def test_missing_packages_are_named_with_the_mend(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("sklearn", "PIL") else real(name))
    with pytest.raises(ImportError, match=r"^pillow, scikit-learn are not installed here: run `make install`"):
        helpers.environment.require_environment()


def test_the_report_names_versions_and_says_whether_there_is_a_gpu():
    import torch

    report = helpers.environment.environment_report()
    assert f"torch {metadata.version('torch')}" in report
    assert ("GPU: " if torch.cuda.is_available() else "no CUDA GPU found") in report
