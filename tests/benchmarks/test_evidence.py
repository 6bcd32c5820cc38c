"""Parts of the benchmarks that compute something of their own."""

import pytest
import torch
from nnturbo.benchmarks import waterfall as waterfall_module
from nnturbo.benchmarks.growth import fit, lines
from nnturbo.benchmarks.guard import too_slow
from nnturbo.benchmarks.peers import monai, openvino_naive
from nnturbo.benchmarks.waterfall import Waterfall
from nnturbo.engine.backends.choose import backends
from nnturbo.engine.model.folder import read_model
from nnturbo.engine.model.folds import inference_network
from nnturbo.engine.model.mirroring import mirror_views

from tests.engine.factory import plans_json, write_model, write_scan


class TestGrowth:
    def test_a_line_is_found(self):
        assert fit([1, 2, 4], [5.5, 8.5, 14.5]) == pytest.approx({"slope": 3, "intercept": 2.5, "r2": 1})

    def test_what_no_line_explains(self):
        assert fit([1, 2, 3, 4], [1, -1, -1, 1])["r2"] == pytest.approx(0)
        assert fit([1, 2], [7, 7]) == pytest.approx({"slope": 0, "intercept": 7, "r2": 1})

    def test_each_side_and_each_size_has_its_own(self):
        rows = [
            {"what": what, what: size, **{side: {"seconds": size * by, "peak_bytes": 5} for side, by in sides.items()}}
            for what, sides in {"planes": {"stock": 3, "nnturbo": 2}, "cases": {"stock": 9, "nnturbo": 1}}.items()
            for size in (1, 2, 4)
        ]
        found = lines(rows)
        assert found["planes"]["stock"]["seconds"]["slope"] == pytest.approx(3)
        assert found["cases"]["nnturbo"]["seconds"]["slope"] == pytest.approx(1)
        assert found["cases"]["stock"]["peak_bytes"]["slope"] == pytest.approx(0)


def test_only_large_regressions_are_told():
    kept = {"stages": 30.0, "network": 1.8}
    assert too_slow({"stages": 16.0, "network": 0.95}, kept) == []
    assert too_slow({"stages": 14.0, "network": 0.95}, kept) == ["stages: 14.00 times nnU-Net's speed, kept are 30.00"]


def test_the_floor_counts_what_has_to_be_done(tmp_path, monkeypatch):
    # Compiling the steps and measuring what a machine can do takes a minute, and the count needs neither.
    monkeypatch.setattr(waterfall_module, "build", lambda *arguments: None)
    monkeypatch.setattr(waterfall_module, "peak_operations", lambda device: 1e9)
    monkeypatch.setattr(waterfall_module, "copy_bandwidth", lambda device: 2e9)
    model = write_model(tmp_path / "model", plans=plans_json())
    scan = write_scan(tmp_path / "scan_0000.nii.gz")
    waterfall = Waterfall(tmp_path, model, scan, "cpu", mirror=True)
    found = waterfall.floor()
    tiles = [len(of) for of in waterfall.window.positions(waterfall.window.patch_size)]
    assert found["forwards"] % len(waterfall.window.views) == 0
    assert found["forwards"] >= len(waterfall.window.views) * tiles[0] * tiles[1] * tiles[2]
    network, of_tile = inference_network(waterfall.found), []

    def count(layer, given, made):
        voxels = given[0] if isinstance(layer, torch.nn.ConvTranspose3d) else made
        of_tile.append(2 * layer.weight[..., 0, 0, 0].numel() * layer.weight[0, 0].numel() * voxels[0, 0].numel())

    for layer in network.modules():
        if isinstance(layer, (torch.nn.Conv3d, torch.nn.ConvTranspose3d)):
            layer.register_forward_hook(count)
    network(torch.zeros(1, 1, *waterfall.found.plan.patch_size))
    assert found["operations"] == found["forwards"] * sum(of_tile)
    unmirrored = Waterfall(tmp_path / "again", model, scan, "cpu", mirror=False).floor()
    assert found["operations"] == len(waterfall.window.views) * unmirrored["operations"]
    assert found["bytes"] == unmirrored["bytes"]
    assert found["network_s"] == pytest.approx(found["operations"] / 1e9)
    assert found["rest_s"] == pytest.approx(found["bytes"] / 2e9)


@pytest.mark.filterwarnings("ignore")  # of MONAI about torch
def test_peers_give_the_logits_of_one_tile(tmp_path):
    model = read_model(write_model(tmp_path / "model", plans=plans_json()), folds=["0"])
    network, patch = inference_network(model), model.plan.patch_size
    scan = torch.randn(1, *patch, generator=torch.Generator().manual_seed(0))
    views = mirror_views((0, 1, 2))
    with torch.inference_mode():
        flips = [[axis + 2 for axis in view] for view in views]
        expected = torch.stack([network(scan[None].flip(axes))[0].flip(axes)[0] for axes in flips]).mean(0)
    for batched in (False, True):
        torch.testing.assert_close(monai(network, patch, views, batched)(scan), expected, atol=1e-4, rtol=1e-4)
    takes_bf16 = backends()["openvino"].unavailable(torch.device("cpu"), "bf16") is None
    close = 5e-2 if takes_bf16 else 1e-4
    torch.testing.assert_close(openvino_naive(network, patch, 1, views)(scan), expected, atol=close, rtol=close)
