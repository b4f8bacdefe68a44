"""What the notebooks need, and a report in words about what this machine has.

Only the standard library is imported at the top: this module must work when everything else is missing.
"""

from __future__ import annotations

import importlib.util
import platform
import sys
from importlib import metadata

MINIMUM_PYTHON = (3, 11)

# Import name -> the name to install. The names differ from the declared ones only where Python's do.
REQUIRED_PACKAGES = {
    "crc32c": "crc32c",
    "ipywidgets": "ipywidgets",
    "jupyterlab": "jupyterlab",
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "PIL": "pillow",
    "scipy": "scipy",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "torch": "torch",
}

INSTALL_HINT = (
    "run `make install` in the project's folder (or `pip install -c constraints.txt -e .`), then restart the kernel"
)


def missing_packages() -> list[str]:
    """Names, as `pip` knows them, of the required packages that cannot be imported."""
    return [package for module, package in REQUIRED_PACKAGES.items() if importlib.util.find_spec(module) is None]


def require_environment() -> None:
    """Raise one clear sentence when Python is too old or a package is missing.

    Raises
    ------
    ImportError
        Saying what was found, what is needed and which command mends it.
    """
    if sys.version_info[:2] < MINIMUM_PYTHON:
        needed = ".".join(map(str, MINIMUM_PYTHON))
        raise ImportError(
            f"these notebooks need Python {needed} or newer and this is Python {platform.python_version()}: "
            f"install a newer Python, then run `make install PYTHON=python{needed}`"
        )
    if missing := missing_packages():
        names = ", ".join(missing)
        raise ImportError(f"{names} {'is' if len(missing) == 1 else 'are'} not installed here: {INSTALL_HINT}")


def environment_report() -> str:
    """Describe in words what this kernel has: Python, packages, and whether a GPU was found.

    Returns
    -------
    str
        One line per fact. Importing the package already guarantees that nothing needed is missing.
    """
    import torch  # here, not at the top: it takes seconds, and only this report needs it

    lines = [f"✓ Python {platform.python_version()} on {platform.system()} {platform.machine()}"]
    lines += [f"✓ {package} {metadata.version(package)}" for package in sorted(set(REQUIRED_PACKAGES.values()))]
    if torch.cuda.is_available():
        lines.append(f"✓ GPU: {torch.cuda.get_device_name()}; the speed demo of notebook 08 can use it")
    else:
        lines.append("– no CUDA GPU found: every notebook runs on the CPU, and none needs one")
    lines.append("Everything the notebooks need is here.")
    return "\n".join(lines)
