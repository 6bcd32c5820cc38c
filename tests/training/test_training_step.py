"""One step of the trainer against a plain re-computation: losses, gradients, clips and both optimizers' formulas."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from nnturbo.engine.model.multi_task_unet import MultiTaskUNet
from torch.nn import functional as F

from tests.training.tiny import TINY, make_trainer, seed_everything

PHASES = {"segmentation": 0, "detached": 1, "joint": 2}
CHANGES = {
    "head_dropout": 0.0,
    "epochs": 10,
    "segmentation_epochs": 1,
    "detached_epochs": 1,
    "class_loss_weight": 0.7,
    "learning_rate": 2e-3,
    "head_learning_rate": 3e-3,
    "pancreas_weight": 0.25,
    "label_smoothing": 0.2,
    "weight_decay": 0.1,
    "head_weight_decay": 0.2,
    # Small enough that both clips bite.
    "gradient_clip": 0.05,
    "head_gradient_clip": 0.01,
}


def make(tiny, epoch, **changes):
    """A trainer with everything that a step needs, in the middle of a schedule."""
    seed_everything(1)
    trainer = make_trainer(tiny, replace(TINY, **{**CHANGES, **changes}))
    trainer.initialize()
    trainer.class_weights = torch.tensor([0.5, 1.0, 2.0])
    trainer.current_epoch = epoch
    trainer.network.train()
    trainer.lr_scheduler.step(epoch)
    return trainer


def make_batch(tiny, seed):
    """A patch with lesion and one with pancreas alone, and their labels at three resolutions."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(2, 1, 16, 32, 32, generator=generator)
    labels = torch.zeros(2, 1, 16, 32, 32, dtype=torch.int16)
    labels[:, :, 4:12, 8:24, 8:24] = 1
    labels[0, :, 6:10, 10:16, 10:16] = 2
    target = [labels, labels[..., ::2, ::2], labels[..., ::2, ::4, ::4]]
    cases = [next(case for case in tiny.training_cases if f"_{subtype}_" in case) for subtype in (2, 0)]
    return {"data": data, "target": target, "keys": cases}


def plain_seg_loss(outputs, target):
    """Soft Dice of the foreground and cross-entropy, by resolution with weights 1, 1/2, 0 scaled to a sum of 1."""
    losses = []
    for logits, labels in zip(outputs, target, strict=True):
        probabilities = logits.exp() / logits.exp().sum(1, keepdim=True)
        truth = torch.stack([labels[:, 0] == label for label in range(3)], 1).float()
        both, predicted, true = (a.sum((2, 3, 4))[:, 1:] for a in (probabilities * truth, probabilities, truth))
        dice = ((2 * both + 1e-5) / (true + predicted + 1e-5)).mean()
        cross_entropy = -(truth * probabilities.log()).sum(1).mean()
        losses.append(cross_entropy - dice)
    return (losses[0] + losses[1] / 2) / 1.5


def plain_class_loss(logits):
    """Of a patch of class 2 with lesion and one of class 0 with pancreas alone."""
    log_probabilities = logits - logits.exp().sum(1, keepdim=True).log()
    by_class = torch.tensor([0.5, 1.0, 2.0])
    shares = torch.tensor([[0.2 / 3, 0.2 / 3, 0.8 + 0.2 / 3], [0.8 + 0.2 / 3, 0.2 / 3, 0.2 / 3]])
    by_patch = -(shares * by_class * log_probabilities).sum(1)
    return (1.0 * by_patch[0] + 0.25 * by_patch[1]) / 2


def plain_step(network, batch, phase):
    """Losses, and gradients by name before clipping."""
    features = network.encoder(batch["data"])
    outputs = network.decoder(features)
    seg_loss = plain_seg_loss(outputs, batch["target"])
    if phase == "segmentation":
        class_loss, loss = torch.zeros(()), seg_loss
    else:
        focus = (outputs[0].exp() / outputs[0].exp().sum(1, keepdim=True))[:, 2:].detach()
        seen = [feature.detach() if phase == "detached" else feature for feature in features]
        class_loss = plain_class_loss(network.head(seen, focus))
        loss = seg_loss + (1.0 if phase == "detached" else 0.7) * class_loss
    parameters = dict(network.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return seg_loss.item(), class_loss.item(), dict(zip(parameters, gradients, strict=True))


def norm_of(gradients):
    return float(sum((gradient.double() ** 2).sum() for gradient in gradients) ** 0.5)


def split_by_part(gradients):
    """Of encoder and decoder, and of the head; without what took no part."""
    there = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    head = {name: gradient for name, gradient in there.items() if name.startswith("head.")}
    return {name: gradient for name, gradient in there.items() if name not in head}, head


def assert_same_gradients(got, wanted, factor):
    scale = factor * norm_of(wanted.values())
    assert set(got) == set(wanted)
    for name, gradient in wanted.items():
        difference = (got[name] - factor * gradient).abs().max()
        assert difference <= 1e-4 * factor * gradient.abs().max() + 1e-6 * scale, name


@pytest.mark.parametrize("phase", PHASES)
def test_losses_and_clipped_gradients(tiny, environment, phase):
    trainer = make(tiny, PHASES[phase])
    batch = make_batch(tiny, seed=0)
    seg_loss, class_loss, gradients = plain_step(copy.deepcopy(trainer.network), batch, phase)
    output = trainer.train_step(batch)
    assert float(output["loss"]) == pytest.approx(seg_loss, rel=1e-5)
    assert float(output["class_loss"]) == pytest.approx(class_loss, rel=1e-5)
    got = split_by_part({name: parameter.grad for name, parameter in trainer.network.named_parameters()})
    backbone, head = split_by_part(gradients)
    assert norm_of(backbone.values()) > 0.1
    assert_same_gradients(got[0], backbone, 0.05 / norm_of(backbone.values()))
    assert len(head) == (0 if phase == "segmentation" else len(list(trainer.network.head.parameters())))
    if head:
        assert norm_of(head.values()) > 0.02
        assert_same_gradients(got[1], head, 0.01 / norm_of(head.values()))
    else:
        assert not got[1]


@pytest.mark.parametrize("phase", PHASES)
def test_a_scaled_loss_gives_the_same_step(tiny, environment, phase):
    """What training does on CUDA: gradients are unscaled before they are clipped, each optimizer steps once."""
    plain, scaled = (make(tiny, PHASES[phase]) for _ in range(2))
    scaled.grad_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for seed in range(2):
        for trainer in (plain, scaled):
            trainer.train_step(make_batch(tiny, seed))
    wanted = plain.network.state_dict()
    for name, weights in scaled.network.state_dict().items():
        assert torch.allclose(weights, wanted[name], rtol=1e-5, atol=1e-7), name


def test_a_step_that_overflows_is_left_out(tiny, environment):
    trainer = make(tiny, PHASES["joint"])
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = copy.deepcopy(trainer.network.state_dict())
    batch = make_batch(tiny, seed=0)
    batch["data"][0, 0, 0, 0, 0] = torch.inf
    trainer.train_step(batch)
    assert trainer.grad_scaler.get_scale() == 512
    assert all(torch.equal(weights, before[name]) for name, weights in trainer.network.state_dict().items())


def test_small_gradients_are_not_clipped(tiny, environment):
    trainer = make(tiny, PHASES["joint"], gradient_clip=1e3, head_gradient_clip=1e3)
    batch = make_batch(tiny, seed=0)
    _, _, gradients = plain_step(copy.deepcopy(trainer.network), batch, "joint")
    trainer.train_step(batch)
    got = split_by_part({name: parameter.grad for name, parameter in trainer.network.named_parameters()})
    for part, wanted in zip(got, split_by_part(gradients), strict=True):
        assert_same_gradients(part, wanted, 1.0)


def encoder_gradients(tiny, epoch, **changes):
    trainer = make(tiny, epoch, gradient_clip=1e3, **changes)
    trainer.train_step(make_batch(tiny, seed=0))
    return [parameter.grad.clone() for parameter in trainer.network.encoder.parameters()]


def test_the_head_changes_the_encoder_only_in_the_joint_phase(tiny, environment):
    alone = encoder_gradients(tiny, PHASES["segmentation"])
    largest = max(float(gradient.abs().max()) for gradient in alone)

    def difference(gradients):
        return max(float((a - b).abs().max()) for a, b in zip(gradients, alone, strict=True))

    assert difference(encoder_gradients(tiny, PHASES["detached"])) <= 1e-6 * largest
    assert difference(encoder_gradients(tiny, PHASES["joint"])) > 1e-3 * largest
    # A weight of 0 means that the joint phase never comes.
    assert difference(encoder_gradients(tiny, 9, class_loss_weight=0.0)) <= 1e-6 * largest


def adamw(weights, gradients, rate, decay):
    """Loshchilov and Hutter 2019, algorithm 2, with torch's defaults."""
    first, second = torch.zeros_like(weights), torch.zeros_like(weights)
    for step, gradient in enumerate(gradients, start=1):
        weights = weights * (1 - rate * decay)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        denominator = (second / (1 - 0.999**step)).sqrt() + 1e-8
        weights = weights - rate * (first / (1 - 0.9**step)) / denominator
    return weights


def nesterov(weights, gradients, rate, decay):
    """SGD with a momentum of 0.99, the first gradient being the first velocity."""
    velocity = None
    for gradient in gradients:
        gradient = gradient + decay * weights
        velocity = gradient if velocity is None else 0.99 * velocity + gradient
        weights = weights - rate * (gradient + 0.99 * velocity)
    return weights


@pytest.mark.parametrize(("optimizer", "formula"), [("adamw", adamw), ("sgd", nesterov)])
def test_weights_after_three_steps(tiny, environment, optimizer, formula):
    """From the trainer's own gradients, which other tests check: rates of the schedule, decays, moments."""
    trainer = make(tiny, PHASES["joint"], optimizer=optimizer)
    before = {name: parameter.detach().clone() for name, parameter in trainer.network.named_parameters()}
    gradients = {name: [] for name in before}
    for seed in range(3):
        trainer.train_step(make_batch(tiny, seed))
        for name, parameter in trainer.network.named_parameters():
            unused = "seg_layers.0." in name  # of the coarsest output, whose weight in the loss is 0
            gradients[name].append(parameter.grad.clone() if parameter.grad is not None else None)
            assert unused or parameter.grad is not None
    factor = (1 - 2 / 10) ** 0.9
    for name, parameter in trainer.network.named_parameters():
        if gradients[name][0] is None:
            assert torch.equal(parameter, before[name])
            continue
        of_head = name.startswith("head.")
        step, rate, decay = (adamw, 3e-3, 0.2) if of_head else (formula, 2e-3, 0.1)
        wanted = step(before[name], gradients[name], rate * factor, decay)
        assert not torch.equal(parameter, before[name])
        assert torch.allclose(parameter, wanted, rtol=1e-5, atol=1e-7), name


def test_the_head_stays_as_it_is_while_the_segmentation_comes_first(tiny, environment):
    trainer = make(tiny, PHASES["segmentation"])
    before = copy.deepcopy(trainer.network.state_dict())
    output = trainer.train_step(make_batch(tiny, seed=0))
    assert output["class_loss"] == 0
    changed = {name for name, weights in trainer.network.state_dict().items() if not torch.equal(weights, before[name])}
    assert not any(name.startswith("head.") for name in changed)
    assert any(name.startswith("encoder.") for name in changed)
    assert not trainer.head_optimizer.state


def test_every_parameter_has_one_optimizer_and_its_place(tiny, environment):
    """Checkpoints know parameters by their place in the optimizer alone: it must follow from the network."""
    trainer = make(tiny, 0)
    of_backbone = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    of_head = [p for group in trainer.head_optimizer.param_groups for p in group["params"]]
    named = dict(trainer.network.named_parameters())
    assert list(map(id, of_head)) == [id(p) for name, p in named.items() if name.startswith("head.")]
    assert list(map(id, of_backbone)) == [id(p) for name, p in named.items() if not name.startswith("head.")]
    assert isinstance(trainer.head_optimizer, torch.optim.AdamW)


def test_class_weights_and_classes_come_from_the_training_cases(tiny, environment):
    trainer = make_trainer(tiny, TINY)
    trainer.initialize()
    counts = np.bincount([int(case.split("_")[1]) for case in tiny.training_cases], minlength=3)
    assert trainer.class_weights.tolist() == pytest.approx(len(tiny.training_cases) / (3 * counts))
    _, _, labels = trainer._to_device(make_batch(tiny, 0))
    assert labels.tolist() == [2, 0]


def test_the_head_computes_in_fp32_under_autocast(tiny, environment):
    """What training does on CUDA, with the type that autocast has on a CPU."""
    network: MultiTaskUNet = make(tiny, 0).network.eval()
    seen = []
    network.head.register_forward_pre_hook(lambda _, inputs: seen.append((inputs, torch.is_autocast_enabled("cpu"))))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seg_logits, class_logits = network.forward_multitask(make_batch(tiny, 0)["data"])
    assert seg_logits[0].dtype == torch.bfloat16
    assert class_logits.dtype == torch.float32
    (features, focus), autocast = seen[0]
    assert not autocast
    assert focus.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(class_logits, network.head([feature.float() for feature in features], focus))
    assert torch.equal(focus[:, 0], F.softmax(seg_logits[0].float(), 1)[:, 2])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_training_with_amp_on_cuda(tiny, tmp_path, monkeypatch):
    from nnturbo.engine import Engine
    from nnturbo.training.train import train

    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_compile", "f")
    seed_everything(0)
    folder = train(**tiny.arguments(tmp_path, device="cuda"))
    checkpoint = torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["current_epoch"] == 2
    assert checkpoint["grad_scaler_state"]["scale"] > 0
    history = checkpoint["multi_task"]["history"]
    assert all(np.isfinite(list(line.values())).all() for line in history)
    weights = checkpoint["network_weights"].values()
    assert all(tensor.dtype == torch.float32 and torch.isfinite(tensor).all() for tensor in weights)
    assert Engine.load(folder, device="cuda").predict(tiny.image(tiny.validation_cases[0])).classification is not None
