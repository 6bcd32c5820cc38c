"""The `nnturbo` command; nothing is imported here before it runs."""

from .main import main

__all__ = ["main"]
