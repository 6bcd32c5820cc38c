"""The learning rate over the epochs, for both optimizers."""

import types
from dataclasses import replace

import pytest
import torch
from nnturbo.training.recipe import Recipe
from nnturbo.training.schedule import EpochScheduler, Schedule


class TestSchedule:
    def test_without_stopping_it_is_nnunets(self):
        polylr = pytest.importorskip("nnunetv2.training.lr_scheduler.polylr")
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.01)
        scheduler = polylr.PolyLRScheduler(optimizer, 0.01, 50)
        schedule = Schedule(epochs=50, annealing_epochs=10)
        assert schedule.last_epoch == 50
        for epoch in range(50):
            scheduler.step(epoch)
            assert 0.01 * schedule.factor(epoch) == optimizer.param_groups[0]["lr"]

    def test_annealing_by_hand(self):
        schedule = Schedule(epochs=100, annealing_epochs=4, anneal_from=50)
        there = 0.5358867312681466  # 0.5 ** 0.9
        assert schedule.last_epoch == 54
        assert schedule.factor(0) == 1
        assert schedule.factor(49) == pytest.approx(0.51**0.9)
        factors = [schedule.factor(epoch) for epoch in range(50, 56)]
        assert factors == pytest.approx([there * part for part in (0.8, 0.6, 0.4, 0.2, 0, 0)])

    def test_annealing_does_not_go_beyond_the_last_epoch(self):
        schedule = Schedule(epochs=100, annealing_epochs=10, anneal_from=97)
        assert schedule.last_epoch == 100
        assert [schedule.factor(e) / 0.03**0.9 for e in (97, 98, 99, 100)] == pytest.approx([0.75, 0.5, 0.25, 0])

    def test_it_never_rises(self):
        for start in range(1, 40):
            schedule = replace(Schedule(epochs=40, annealing_epochs=5), anneal_from=start)
            factors = [schedule.factor(epoch) for epoch in range(schedule.last_epoch + 1)]
            assert factors == sorted(factors, reverse=True)
            assert factors[-1] == 0
            assert factors[-2] > 0


def test_both_optimizers_follow_the_schedule():
    first, second = (torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], 1.0) for _ in range(2))
    recipe = Recipe(learning_rate=1e-2, head_learning_rate=3e-3)
    schedule = Schedule(epochs=10, annealing_epochs=2, anneal_from=5)
    owner = types.SimpleNamespace(recipe=recipe, schedule=schedule, head_optimizer=second)
    scheduler = EpochScheduler(owner, first)
    for epoch in (0, 3, 5, 6):
        scheduler.step(epoch)
        assert first.param_groups[0]["lr"] == 1e-2 * schedule.factor(epoch)
        assert second.param_groups[0]["lr"] == 3e-3 * schedule.factor(epoch)
