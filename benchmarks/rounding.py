"""Measures the rounding of each backend's float32 on deep networks with random weights, which amplify it.

    python -m nnturbo.benchmarks.rounding [--backends torch native openvino] [--json FILE]

The tiles hold noise; noise in a box surrounded by zeros, like a small scan; and nothing, like a slice outside the body.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from nnturbo.engine.backends.choose import backends
from nnturbo.engine.backends.openvino import OpenVinoRunner, _compiled, _convert
from nnturbo.engine.errors import EngineError
from nnturbo.engine.model.folder import Model
from nnturbo.engine.model.folds import inference_network
from nnturbo.engine.model.network import make_network
from nnturbo.engine.model.plans import parse_plan
from torch import Tensor, nn

from .report import write_report
from .stages import dataset_json
from .task_models import plans_json

CPU = torch.device("cpu")
OPENVINOS_NORMS = "openvino, its own norms"
"""The backend openvino with OpenVINO's own norms, as in bf16 and int8."""

NETWORKS: dict[str, dict[str, Any]] = {
    "2d residual, 8 stages, 512 x 512": {
        "class": "ResidualEncoderUNet",
        "patch": [512, 512],
        "features": [16, 32, 32, 64, 64, 64, 64, 64],
        "blocks": {"n_blocks_per_stage": [1, 3, 4, 6, 6, 6, 6, 6]},
    },
    "3d, 5 stages, 64 x 96 x 96": {
        "class": "PlainConvUNet",
        "patch": [64, 96, 96],
        "features": [16, 32, 64, 64, 64],
        "blocks": {"n_conv_per_stage": [2] * 5},
    },
}


def make_model(described: dict[str, Any]) -> Model:
    """Make a model with nnU-Net's initial weights, but with norms and biases other than 1 and 0."""
    plans, axes, stages = plans_json(described["class"]), len(described["patch"]), len(described["features"])
    configuration = plans["configurations"]["3d_fullres"]
    configuration |= {"patch_size": described["patch"], "spacing": configuration["spacing"][-axes:]}
    configuration["architecture"]["arch_kwargs"] |= {
        "n_stages": stages, "features_per_stage": described["features"], **described["blocks"],
        "conv_op": f"torch.nn.Conv{axes}d", "norm_op": f"torch.nn.InstanceNorm{axes}d",
        "kernel_sizes": [[3] * axes] * stages, "strides": [[1] * axes, *[[2] * axes] * (stages - 1)],
        "n_conv_per_stage_decoder": [1] * (stages - 1),
    }  # fmt: skip
    dataset = dataset_json(3)
    plan = parse_plan(plans, dataset, "3d_fullres")
    torch.manual_seed(0)
    network: Any = make_network(plan.architecture, 1, plan.labels.num_outputs).to_empty(device="cpu")
    network.apply(network.initialize)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, (nn.InstanceNorm2d, nn.InstanceNorm3d)):
                module.weight.copy_(1 + 0.3 * torch.randn_like(module.weight))
                module.bias.copy_(0.3 * torch.randn_like(module.bias))
            elif getattr(module, "bias", None) is not None:
                module.bias.copy_(0.1 * torch.randn_like(module.bias))
    return Model(
        plan=plan, weights=(dict(network.state_dict()),), folds=("0",), mirror_axes=(), trainer="nnUNetTrainer",
        source=Path(), plans=plans, dataset=dataset,
    )  # fmt: skip


def make_tiles(patch: list[int]) -> dict[str, Tensor]:
    """Make the tiles, (1, 1, *patch)."""
    noise = torch.randn(1, 1, *patch, generator=torch.Generator().manual_seed(1))
    boxed = torch.zeros_like(noise)
    middle = (..., *(slice(n // 3, n // 3 + n // 4) for n in patch))
    boxed[middle] = noise[middle]
    return {"noise": noise, "boxed": boxed, "blank": torch.zeros_like(noise)}


def runner_of(name: str, model: Model, folder: Path) -> Any:
    """Prepare a backend to run a model in float32."""
    tile = torch.zeros(2, 1, *model.plan.patch_size)
    if name == OPENVINOS_NORMS:
        converted = _convert(inference_network(model), tile[:1])
        return OpenVinoRunner(_compiled(converted, "fp32").create_infer_request())
    backend = backends()[name]
    if backend.compiles:
        backend.build(model, tile, "fp32", folder)
    return backend.load(model, folder if backend.compiles else None, CPU, "fp32")


def compare(logits: Tensor, exact: Tensor) -> dict[str, Any]:
    """Compare logits (1, K, *patch) with float64; a margin is the difference of the two greatest float64 logits."""
    differs = logits.argmax(1) != exact.argmax(1)
    best = exact.topk(2, dim=1).values
    margins = (best[:, 0] - best[:, 1])[differs]
    return {
        "error": float((logits - exact).abs().max()),
        "labels": int(differs.sum()),
        "voxels": differs.numel(),
        "margin": float(margins.max()) if len(margins) else 0.0,
    }


def measure(names: list[str]) -> list[dict[str, Any]]:
    """Run every network on every tile by every backend."""
    rows = []
    for network, described in NETWORKS.items():
        model = make_model(described)
        twin = copy.deepcopy(inference_network(model)).double()
        tiles = make_tiles(described["patch"])
        with torch.no_grad():
            exact = {content: twin(tile.double())[0] for content, tile in tiles.items()}
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    runner = runner_of(name, model, Path(folder))
                except EngineError as error:
                    print(f"{network}: {name} does not run it: {error}")
                    continue
                for content, tile in tiles.items():
                    found = compare(runner(tile).seg_logits, exact[content])
                    rows.append({"network": network, "tile": content, "backend": name, **found})
                    print(
                        f"{network}, {content}, {name}: logits off by up to {found['error']:.1e}, {found['labels']} of "
                        f"{found['voxels']} labels differ, with margins up to {found['margin']:.1e}"
                    )
    return rows


def main() -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=["torch", "native", "openvino", OPENVINOS_NORMS])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = measure(arguments.backends)
    write_report(arguments.json, {"benchmark": "rounding", "rows": rows})


if __name__ == "__main__":
    main()
