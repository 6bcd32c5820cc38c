"""Python runs this when it starts under `nnturbo run`, in child processes too; the folder is first in PYTHONPATH."""

import importlib.machinery
import importlib.util
import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))


def _run_the_other_one() -> None:
    """Run the sitecustomize that this one hides, if there is one."""
    elsewhere = [path for path in sys.path if os.path.abspath(path or os.curdir) != _HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", elsewhere)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


_run_the_other_one()
try:
    from nnturbo.engine.nnunet.hook import install  # pyright: ignore[reportMissingImports]
except ImportError as error:
    sys.stderr.write(f"nnturbo run: {sys.executable} has no nnturbo ({error}); nnU-Net runs as it is there\n")
else:
    install()
