"""Heads as other programs write them, in plain torch modules, and checkpoints that hold them."""

import torch
from nnturbo.engine.model.network import build_network
from nnturbo.engine.model.plans import parse_plan
from torch import nn
from torch.nn import functional as F

from tests.engine.factory import (
    dataset_json,
    plans_json,
    random_weights,
    write_model,
)

CHANNELS = (4, 8, 8, 12)
CLASSES = 3


def deep_plans():
    """Four stages, 4 to 12 channels; the bottleneck of a tile has 2 x 2 x 2 voxels."""
    plans = plans_json(patch_size=[16, 16, 16])
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] |= {
        "n_stages": 4,
        "features_per_stage": list(CHANNELS),
        "kernel_sizes": [[3, 3, 3]] * 4,
        "strides": [[1, 1, 1], *[[2, 2, 2]] * 3],
        "n_conv_per_stage": [1] * 4,
        "n_conv_per_stage_decoder": [1] * 3,
    }
    return plans


class Gap(nn.Module):
    """A head on the bottleneck, as AaronC-BME writes it."""

    def __init__(self):
        super().__init__()
        self.classification_head = nn.Sequential(
            nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(CHANNELS[-1], CLASSES)
        )

    def forward(self, features, seg_logits):
        return self.classification_head(features[-1])


class MaskedPowers(nn.Module):
    """Masked generalised mean and three layers, as briannazhao's."""

    def __init__(self):
        super().__init__()
        self.gem_p = nn.Parameter(torch.tensor(2.5))
        self.classification_head = nn.Sequential(
            nn.Dropout(0.5),
            nn.Linear(CHANNELS[-1], 10),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(10, 6),
            nn.ReLU(),
            nn.Dropout(0.15),
            nn.Linear(6, CLASSES),
        )

    def forward(self, features, seg_logits):
        values = features[-1]
        mask = torch.softmax(seg_logits, 1)[:, 1:].max(1, keepdim=True)[0]
        mask = F.adaptive_avg_pool3d(mask, values.shape[2:])
        exponent = torch.clamp(self.gem_p, 1, 6)
        total = mask.sum((2, 3, 4))
        powers = ((values.clamp_min(0) ** exponent) * mask).sum((2, 3, 4)) / total.clamp_min(1)
        pooled = powers.clamp_min(1e-6) ** (1 / exponent)
        pooled = torch.where(total / values[0, 0].numel() < 5e-4, values.mean((2, 3, 4)), pooled)
        return self.classification_head(pooled)


class Fused(nn.Module):
    """Three stages at one grid, as AAttarpour's and vyhbdinh-ai's, which differ in names, activation and grid."""

    def __init__(self, fusion="fusion", activation=nn.GELU, grid=4):
        super().__init__()
        head = nn.Module()
        head.feature_adapters = nn.ModuleList(
            nn.Sequential(
                nn.Conv3d(count, 5, 1, bias=False), nn.BatchNorm3d(5), activation(), nn.AdaptiveAvgPool3d(grid)
            )
            for count in CHANNELS[-3:]
        )
        layers = nn.Sequential(nn.Conv3d(15, 7, 3, padding=1), nn.BatchNorm3d(7), activation(), nn.AdaptiveAvgPool3d(1))
        setattr(head, fusion, layers)
        head.classifier = nn.Sequential(
            nn.Linear(7, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Dropout(0.3), nn.Linear(6, CLASSES)
        )
        self.ClassificationHead, self.fusion = head, fusion

    def forward(self, features, seg_logits):
        head = self.ClassificationHead
        adapted = [adapter(values) for adapter, values in zip(head.feature_adapters, features[-3:], strict=True)]
        return head.classifier(getattr(head, self.fusion)(torch.cat(adapted, 1)).flatten(1))


class Convolved(nn.Module):
    """Two convolutions of an even kernel and five linear layers, as Hassan9001's."""

    def __init__(self):
        super().__init__()
        layers, count = [], CHANNELS[-1]
        for outputs in (6, 8):
            layers += [nn.Conv3d(count, outputs, 1, bias=False), nn.BatchNorm3d(outputs), nn.ReLU()]
            count = outputs
        self.cfe = nn.Sequential(*layers)
        blocks = []
        for outputs in (8, 7, 6, 5):
            blocks += [nn.Linear(count, outputs), nn.BatchNorm1d(outputs), nn.ReLU(), nn.Dropout(0.3)]
            count = outputs
        self.fc_blocks = nn.Sequential(*blocks)
        self.fc_out, self.bn_out = nn.Linear(count, CLASSES), nn.BatchNorm1d(CLASSES)

    def forward(self, features, seg_logits):
        pooled = F.adaptive_avg_pool3d(self.cfe(features[-1]), 1).flatten(1)
        return self.bn_out(self.fc_out(self.fc_blocks(pooled)))


class Convolved2(Convolved):
    """The same with its kernels of two voxels."""

    def __init__(self):
        super().__init__()
        self.cfe[0] = nn.Conv3d(CHANNELS[-1], 6, 2, bias=False)


TWINS = {
    "gap": Gap,
    "masked powers": MaskedPowers,
    "fused": Fused,
    "fused, of another": lambda: Fused("feature_fusion", nn.ReLU, 5),
    "convolved": Convolved,
    "convolved by two": Convolved2,
}


def seeded(make, seed=0):
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        head = make()
        for name, tensor in head.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point() and tensor.ndim:
                tensor.copy_(torch.randn(tensor.shape) * 0.7 + (0.2 if tensor.ndim == 1 else 0))
    return head.eval()


def fork(folder, head, rename=lambda unet: unet, plans=None, folds=("0",), **checkpoint):
    """Write a model whose checkpoint has a U-Net under other names, and a head."""
    plans = plans or deep_plans()
    write_model(folder, plans=plans, folds=folds, checkpoint={"network_weights": {}, **checkpoint})
    for seed, fold in enumerate(folds):
        path = folder / f"fold_{fold}" / "checkpoint_final.pth"
        content = torch.load(path, weights_only=False)
        unet = random_weights(plans, dataset_json(), seed)
        content["network_weights"] = {**rename(unet), **({} if head is None else head.state_dict())}
        torch.save(content, path)
    return folder


def twin_answer(model, head, tiles, fold=0):
    """Run the U-Net and the plain head by themselves."""
    plain = parse_plan(deep_plans(), dataset_json(), "3d_fullres")
    unet = build_network(plain, random_weights(deep_plans(), dataset_json(), fold))
    with torch.inference_mode():
        features = unet.encoder(tiles)
        seg_logits = unet.decoder(features)
        return seg_logits, head(features, seg_logits)


def tiles_of(model, count=2):
    return torch.randn(count, 1, *model.plan.patch_size, generator=torch.Generator().manual_seed(1))
