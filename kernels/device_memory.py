"""Gives cached memory back to a GPU, but not while a CUDA graph is recorded: torch then fails."""

from __future__ import annotations

import threading

import torch

RECORDING = threading.RLock()
"""Held by the thread that records a graph, so that one at a time does."""


def give_back() -> None:
    """Give back what torch keeps for later and no tensor uses; waits for a graph that is being recorded."""
    with RECORDING:
        torch.cuda.empty_cache()
