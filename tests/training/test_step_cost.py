"""One batch is tried before the first epoch; nothing of it stays but what it says."""

import os
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from nnturbo.engine import EngineError
from nnturbo.training.step_cost import StepCost, try_batch

from tests.training.tiny import TINY, make_trainer


def drawn():
    return random.random(), float(np.random.rand()), float(torch.rand(1))


def test_it_leaves_everything_as_it_was(tiny, environment):
    trainer = make_trainer(tiny, replace(TINY, head_dropout=0.5, seed=4))
    trainer.initialize()
    before = {name: weights.clone() for name, weights in trainer.network.state_dict().items()}
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    wanted = drawn()
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    cost = try_batch(trainer)
    assert drawn() == wanted
    assert all(torch.equal(weights, before[name]) for name, weights in trainer.network.state_dict().items())
    assert all(parameter.grad is None for parameter in trainer.network.parameters())
    assert not trainer.optimizer.state
    assert 0 < cost.validation_s < cost.training_s
    # Windows does not tell a process's peak.
    assert cost.memory_bytes is None if not hasattr(os, "fork") else cost.memory_bytes > 1 << 20


def test_the_log_has_the_estimate_once(tiny, environment, capsys):
    trainer = make_trainer(tiny, replace(TINY, validate_every=0))
    trainer.on_train_start()
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "Estimate: " in line)
    assert " an epoch and " in line
    assert (" for 2 epochs, " if hasattr(os, "fork") else " for 2 epochs. ") in line


@pytest.mark.parametrize(
    ("cost", "said"),
    [
        (
            StepCost(training_s=0.4, validation_s=0.1, memory_bytes=3 << 30),
            "Estimate: 105 s an epoch and 3.5 h for 120 epochs, 3.0 GiB of memory. It rests on one batch (0.4 s), ",
        ),
        (
            StepCost(training_s=40, validation_s=10, memory_bytes=None),
            "Estimate: 2.92 h an epoch and 14.6 days for 120 epochs. It rests on one batch (40 s), ",
        ),
        (StepCost(training_s=1.0, validation_s=1.0, memory_bytes=None), "Estimate: 5 min an epoch and 10 h for 120"),
    ],
)
def test_it_is_said_in_units_that_people_use(cost, said):
    assert cost.described(120, 250, 50).startswith(said)


def test_too_little_memory(tiny, environment, monkeypatch):
    trainer = make_trainer(tiny, TINY)
    trainer.initialize()

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\n...")

    monkeypatch.setattr(trainer, "losses", fail)
    message = "a batch of 2 patches of 16 x 32 x 32 needs more memory than cpu has: plan again with less --memory, or"
    with pytest.raises(EngineError, match=message):
        try_batch(trainer)
