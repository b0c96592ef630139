"""The transformers library, imported where it finds no folder of ours.

The library looks whether there is a distribution called `kernels`, and takes a folder of that name on
sys.path for one. In a checkout the root has such a folder, and it is on sys.path whenever Python is started
there (`python -m nmoe`, a notebook, pytest). So the root leaves sys.path while the library is in use; nmoe's
own modules are found through the package and do not need it.
"""

import contextlib
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import nmoe
from nmoe.errors import ConfigError, Diagnostic

# The folder in which `kernels` lies under its bare name; in an installed package that is the package itself.
ROOT = (Path(nmoe.__file__).parent / "kernels").resolve().parent
OLDEST, FIRST_UNKNOWN = (5, 17), (6,)
REQUIREMENT = "transformers>=5.17,<6"


def require() -> None:
    """ConfigError N0912 if the library is not installed, or not in a version that this was written for."""
    try:
        installed = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        found = "the transformers library is not installed"
    else:
        version = tuple(int(part) for part in installed.split(".")[:2] if part.isdigit())
        if OLDEST <= version < FIRST_UNKNOWN:
            return
        found = f"the transformers library is of version {installed}"
    raise ConfigError(
        Diagnostic(
            code="N0912",
            message=f"{found}; an export is compared with it before it counts",
            help=f"pip install '{REQUIREMENT}'",
        )
    )


@contextlib.contextmanager
def transformers() -> Iterator[ModuleType]:
    """The library's top module. All use of it belongs into the block: it goes on importing until a model is loaded."""
    before = list(sys.path)
    sys.path[:] = [entry for entry in before if Path(entry or ".").resolve() != ROOT]
    try:
        import transformers as library

        yield library
    finally:
        sys.path[:] = before
