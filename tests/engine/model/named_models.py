"""Models of networks that are known by name, with seeded weights."""

import math

import torch
from nnturbo.engine.model.folder import read_model
from nnturbo.engine.model.mednext import BLOCKS, MedNeXt
from nnturbo.engine.model.stu_net import StuNet

from tests.engine.factory import plans_json, write_model

PATCH, LARGER = (32, 32, 32), (64, 64, 64)
UNET = "dynamic_network_architectures.architectures.unet.PlainConvUNet"


def plans_of(patch=PATCH, class_name=UNET, stages=6, **arguments):
    """A plan whose class says nothing about the network that was trained."""
    plans = plans_json(patch_size=list(patch), spacing=[2.0, 1.5, 1.5])
    described = plans["configurations"]["3d_fullres"]["architecture"]
    described["network_class_name"] = class_name
    described["arch_kwargs"] |= {"strides": [[1, 1, 1], *[[2, 2, 2]] * (stages - 1)], "n_stages": stages, **arguments}
    return plans


def filled(network, seed=0):
    """Seeded numbers for every weight of a network."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator) * (0.1 if tensor.ndim > 1 else 0.3)
        + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        for name, tensor in network.state_dict().items()
    }


def by_formula(network):
    """Numbers for every weight of a network that depend on its name and shape alone."""
    weights = {}
    for name, tensor in network.state_dict().items():
        waves = torch.sin(torch.arange(tensor.numel(), dtype=torch.float64) * 0.7 + len(name)).reshape(tensor.shape)
        if tensor.ndim > 1:
            weights[name] = (waves.float() * (3 / tensor[0].numel()) ** 0.5).contiguous()
        else:
            weights[name] = 0.2 * waves.float() + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return weights


def waves_of(patch):
    """A tile by a formula."""
    at = torch.arange(math.prod(patch), dtype=torch.float64)
    return (torch.sin(at * 0.11) * torch.cos(at * 0.0031)).reshape(1, 1, *patch).float()


def figures(logits):
    """Mean, standard deviation, and the logits of one voxel."""
    return [float(logits.mean()), float(logits.std()), *map(float, logits[0, :, 5, 7, 9])]


def model_of(folder, weights, trainer, plans=None):
    checkpoint = {"network_weights": weights, "trainer_name": trainer}
    return read_model(write_model(folder, plans=plans or plans_of(), checkpoint=checkpoint))


def tiles_of(patch=PATCH):
    return torch.randn(2, 1, *patch, generator=torch.Generator().manual_seed(1))


def stu_net(base=4, depth=1, outputs=3, strides=((2, 2, 2),) * 5):
    widths = [base * factor for factor in (1, 2, 4, 8, 16, 16)]
    return StuNet(1, outputs, widths=widths, depths=[depth] * 6, kernels=[(3, 3, 3)] * 6, strides=strides)


SIZES = {
    "S": ([2] * 9, [2] * 9),
    "B": ([2] * 9, [2, 3, 4, 4, 4, 4, 4, 3, 2]),
    "M": ([3, 4, 4, 4, 4, 4, 4, 4, 3], [2, 3, 4, 4, 4, 4, 4, 3, 2]),
    "L": ([3, 4, 8, 8, 8, 8, 8, 4, 3], [3, 4, 8, 8, 8, 8, 8, 4, 3]),
}
"""Blocks and expansions of the paper's table 1."""


def mednext(size="S", kernel=3, outputs=3, width=32, dimensions=3, shifted=False):
    """A MedNeXt; where its grid changes, it expands as what follows, or (`shifted`) as what comes before."""
    counts, expansions = (dict(zip(BLOCKS, of_size, strict=True)) for of_size in SIZES[size])
    for level in range(4):
        finer, coarser = (
            expansions[f"enc_block_{level}"],
            expansions[f"enc_block_{level + 1}" if level < 3 else "bottleneck"],
        )
        expansions[f"down_{level}"] = finer if shifted else coarser
        expansions[f"up_{level}"] = expansions[f"dec_block_{level}"]
    return MedNeXt(1, outputs, width=width, kernel=kernel, counts=counts, expansions=expansions, dimensions=dimensions)
