"""The training side of the `nnturbo` command: one module for each command, argument parsing only.

These modules have only light imports, so that `nnturbo --help` starts at once; commands import other modules when they
run.
"""

from __future__ import annotations

from typing import Any

from .choose import add_choose
from .crossvalidate import add_crossvalidate
from .demo import add_demo
from .evaluate import add_evaluate
from .phantom import add_phantom
from .prepare import add_prepare
from .publish import add_publish
from .submit import add_submit
from .train import add_train

__all__ = ["add_commands"]


def add_commands(commands: Any) -> None:
    """Declare the commands.

    Args:
        commands: What `ArgumentParser.add_subparsers` returns. Each command sets `run`, a function of the parsed
            arguments that returns an exit status.
    """
    add_phantom(commands)
    add_prepare(commands)
    add_train(commands)
    add_crossvalidate(commands)
    add_choose(commands)
    add_evaluate(commands)
    add_submit(commands)
    add_publish(commands)
    add_demo(commands)
