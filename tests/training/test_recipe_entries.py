"""Recipe entries that are off by default: an average of the weights, bf16, seeds."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from nnturbo.engine import Engine
from nnturbo.training.train import train
from nnturbo.training.weight_average import WeightAverage

from tests.training.tiny import TINY, assert_same, make_trainer, seed_everything


def joint_trainer(tiny, **changes):
    """A trainer of both tasks without dropout, with the same weights each time."""
    recipe = replace(TINY, head_dropout=0.0, detached_epochs=0, seed=1, optimizer="sgd", learning_rate=1e-2, **changes)
    trainer = make_trainer(tiny, recipe)
    trainer.initialize()
    trainer.network.train()
    trainer.lr_scheduler.step(0)
    return trainer


def batch(tiny, seed, cases=2):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(cases, 1, 16, 32, 32, dtype=torch.int16)
    labels[:, :, 4:12, 8:24, 8:24] = 1
    labels[:, :, 6:10, 10:16, 10:16] = 2
    target = [labels, labels[..., ::2, ::2], labels[..., ::2, ::4, ::4]]
    data = torch.randn(cases, 1, 16, 32, 32, generator=generator)
    return {"data": data, "target": target, "keys": list(tiny.training_cases[:cases])}


class TestAverage:
    def test_it_is_off_by_default(self, tiny, environment):
        assert TINY.average_decay == 0
        assert joint_trainer(tiny).average is None

    def test_the_formula(self):
        network = torch.nn.Linear(2, 1)
        average, wanted = WeightAverage(network, 0.2), network.weight.detach().clone()
        for step, decay in enumerate((1 / 10, 2 / 11, 0.2, 0.2)):
            torch.nn.init.normal_(network.weight)
            average.step()
            wanted = decay * wanted + (1 - decay) * network.weight.detach()
            assert torch.allclose(average.state_dict()["weight"], wanted), step
        trained = network.weight.detach().clone()
        with average.applied():
            assert torch.allclose(network.weight, wanted)
        assert torch.equal(network.weight, trained)

    def test_the_model_is_the_average_and_training_goes_on_from_its_weights(
        self, tiny, environment, without_curves, tmp_path
    ):
        recipe = replace(TINY, average_decay=0.9, seed=2)
        folder = train(**tiny.arguments(tmp_path, recipe=recipe))
        final = torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=False)
        averaged, trained = final["network_weights"], final["multi_task"]["trained_weights"]
        assert list(averaged) == list(trained)
        differing = [name for name in averaged if not torch.equal(averaged[name], trained[name])]
        assert any(name.startswith("encoder.") for name in differing)
        assert final["multi_task"]["average_steps"] == 4
        loaded = Engine.load(folder, device="cpu").segmenter.runner
        assert loaded is not None
        trainer = make_trainer(tiny, recipe)
        trainer.load_checkpoint(str(folder / "fold_0" / "checkpoint_final.pth"))
        assert_same(dict(trainer.network.state_dict()), dict(trained))
        assert_same(dict(trainer.average.state_dict()), dict(averaged))

    def test_resumed_it_ends_the_same(self, tiny, environment, without_curves, tmp_path):
        recipe = replace(TINY, average_decay=0.9, seed=2, validate_every=0)
        whole = train(**tiny.arguments(tmp_path / "whole", recipe=recipe))
        trainer = make_trainer(tiny, recipe)
        first = Path(trainer.output_folder)
        step = trainer.train_step

        def stopping(given):
            if trainer.current_epoch == 1:
                raise KeyboardInterrupt
            return step(given)

        trainer.train_step = stopping
        with pytest.raises(KeyboardInterrupt):
            trainer.run_training()
        resumed = make_trainer(tiny, recipe)
        resumed.load_checkpoint(str(first / "checkpoint_latest.pth"))
        resumed.run_training()
        got, wanted = (torch.load(f / "checkpoint_final.pth", weights_only=False) for f in (first, whole / "fold_0"))
        for checkpoint in (got, wanted):
            del checkpoint["init_args"]
        assert_same(got, wanted)


class TestPrecision:
    def products(self, tiny, precision):
        """Types of what the finest convolution gives, of what the loss gets, and of gradients; and the losses."""
        trainer, seen = joint_trainer(tiny, cpu_precision=precision), set()
        layer = next(part for part in trainer.network.encoder.modules() if isinstance(part, torch.nn.Conv3d))
        layer.register_forward_hook(lambda *call: seen.add(("product", call[-1].dtype)))
        trained = trainer.loss

        def loss(logits, target):
            seen.update(("logits", part.dtype) for part in logits)
            return trained(logits, target)

        trainer.loss = loss
        outputs = [trainer.train_step(batch(tiny, seed)) for seed in range(3)]
        seen.update(("gradient", p.grad.dtype) for p in trainer.network.parameters() if p.grad is not None)
        return seen, [float(output[name]) for output in outputs for name in ("loss", "class_loss")]

    def test_products_alone_are_in_bf16(self, tiny, environment):
        exact, wanted = self.products(tiny, "fp32")
        half, losses = self.products(tiny, "bf16")
        assert exact == {(what, torch.float32) for what in ("product", "logits", "gradient")}
        assert half == {("product", torch.bfloat16), ("logits", torch.float32), ("gradient", torch.float32)}
        assert losses != wanted
        assert losses == pytest.approx(wanted, rel=0.02)


class TestSeed:
    def weights(self, tiny, seed):
        trainer = make_trainer(tiny, replace(TINY, seed=seed))
        trainer.initialize()
        return trainer.network.state_dict(), float(np.random.rand())

    def test_the_same_seed_gives_the_same_weights_and_numbers(self, tiny, environment):
        seed_everything(1)
        first, after = self.weights(tiny, 5)
        seed_everything(2)
        second, again = self.weights(tiny, 5)
        other, _ = self.weights(tiny, 6)
        assert after == again
        assert all(torch.equal(weights, second[name]) for name, weights in first.items())
        assert not all(torch.equal(weights, other[name]) for name, weights in first.items())

    def test_without_one_the_generators_go_on(self, tiny, environment):
        seed_everything(1)
        first, _ = self.weights(tiny, -1)
        second, _ = self.weights(tiny, -1)
        assert not all(torch.equal(weights, second[name]) for name, weights in first.items())
