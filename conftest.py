"""Shared by all tests and by the kernels they start: one thread, no network, widgets driven, a profile of our own."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).parent

os.environ["OMP_NUM_THREADS"] = "1"  # with two workers on two cores, more threads only get in each other's way
# The dozens of processes that follow need not each compile what the first has compiled.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
os.environ["DRIVE_WIDGETS"] = "1"  # every widget moves all its controls when it is built

# Kernels load this profile: it closes the network in them, and a reader's own start-up files cannot interfere.
_profile = Path(tempfile.mkdtemp(prefix="ipython"))
(_profile / "profile_default" / "startup").mkdir(parents=True)
(_profile / "profile_default" / "startup" / "offline.py").write_text(
    (ROOT / "tests" / "offline.py").read_text(encoding="utf-8"), encoding="utf-8"
)
os.environ["IPYTHONDIR"] = str(_profile)

# No example may fail for being slow, and every run tries the same ones.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)
hypothesis.settings.load_profile("steady")

pytest.register_assert_rewrite("reader")  # it holds the assertions of the browser tests
sys.path.insert(0, str(ROOT / "tests"))
import offline  # noqa: E402, F401  (importing it closes the network in this process)
from beyond_nbval import pytest_runtest_call  # noqa: E402, F401  (a hook)


def pytest_collection_modifyitems(items):
    """Begin with the browser: it takes longest."""
    items.sort(key=lambda item: "browser" not in item.path.parts)


def pytest_sessionfinish(session):
    """Remove the profile."""
    shutil.rmtree(_profile, ignore_errors=True)
