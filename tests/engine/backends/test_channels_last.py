"""Networks with the channels last against the same as torch runs them; on a CPU the kernel is its plain twin."""

import copy
import logging
import math

import nnturbo.kernels
import pytest
import torch
from dynamic_network_architectures.building_blocks.residual import BasicBlockD
from nnturbo.engine import BackendUnavailable
from nnturbo.engine.backends import torch as torch_backend
from nnturbo.engine.backends.channels_last import with_channels_last, without_lost_biases
from nnturbo.engine.backends.fused_layers import (
    FewChannels,
    FewChannelsUpsampling,
    FusedBlock,
    ProductUpsampling,
    channels_last,
)
from nnturbo.engine.backends.torch import DTYPES, OWN_CONVOLUTIONS, TorchRunner, network_for_gpu
from nnturbo.engine.model.folds import InferenceNetwork
from nnturbo.engine.model.network import build_network
from nnturbo.engine.model.plans import parse_plan
from nnturbo.kernels import device_layers, loader
from torch.nn import functional as F

from tests.engine.backends.live_bytes import LiveBytes
from tests.engine.factory import dataset_json, multi_task, plans_json, random_weights
from tests.kernels import host

LIBRARY = "dynamic_network_architectures.architectures.unet."
CONVOLUTIONS = {"n_conv_per_stage": [2, 1, 2], "n_conv_per_stage_decoder": [2, 1]}
RESIDUAL = {"n_blocks_per_stage": [1, 2, 2], "n_conv_per_stage_decoder": [1, 2]}
NETWORKS = ("PlainConvUNet", "ResidualEncoderUNet", "ResidualUNet")
PATCH = (8, 12, 16)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


def plans(network="PlainConvUNet", dimensions=3, **arguments):
    """Three stages of channels that come in packs, the last one with a stride along two axes."""
    made = plans_json(patch_size=list(PATCH[-dimensions:]), spacing=[2.0, 1.5, 1.5][-dimensions:])
    architecture = made["configurations"]["3d_fullres"]["architecture"]
    architecture["network_class_name"] = LIBRARY + network
    kwargs = architecture["arch_kwargs"]
    for name in ("n_conv_per_stage", "n_conv_per_stage_decoder"):
        del kwargs[name]
    kwargs |= {
        "n_stages": 3,
        "features_per_stage": [8, 16, 24],
        "kernel_sizes": [[1, 3, 3][-dimensions:], [3] * dimensions, [3] * dimensions],
        "strides": [[1] * dimensions, [2] * dimensions, [1, 2, 2][-dimensions:]],
        "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d",
        **(CONVOLUTIONS if network == "PlainConvUNet" else RESIDUAL),
        **arguments,
    }
    return made


def network_of(made, folds=1):
    plan = parse_plan(made, dataset_json(), "3d_fullres")
    built = [
        build_network(plan, {n: w.clone() for n, w in random_weights(made, dataset_json(), seed).items()})
        for seed in range(folds)
    ]
    for network in built:
        decoder = network.get_submodule("decoder")
        decoder.seg_layers = decoder.seg_layers[-1:]
    return InferenceNetwork(built).eval()


def tiles(dimensions=3, count=2):
    return torch.randn(count, 1, *PATCH[-dimensions:], generator=torch.Generator().manual_seed(1))


def furthest(found, expected):
    """Largest difference, as a part of the expected values' standard deviation."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.std())


VARIANTS = [
    *(("PlainConvUNet", dimensions, {}) for dimensions in (2, 3)),
    *((network, dimensions, {}) for network in ("ResidualEncoderUNet", "ResidualUNet") for dimensions in (2, 3)),
    ("PlainConvUNet", 3, {"conv_bias": False}),
    ("PlainConvUNet", 3, {"nonlin": "torch.nn.ReLU"}),
    ("PlainConvUNet", 3, {"norm_op_kwargs": {"eps": 1e-3, "affine": False}}),
    ("PlainConvUNet", 3, {"dropout_op": "torch.nn.Dropout3d", "dropout_op_kwargs": {"p": 0.5}}),
    (
        "ResidualEncoderUNet", 3,
        {"block": "dynamic_network_architectures.building_blocks.residual.BottleneckD", "bottleneck_channels": 8},
    ),
]  # fmt: skip


class TestTheNetworkIsTheSame:
    @pytest.mark.parametrize(("name", "dimensions", "arguments"), VARIANTS)
    def test_logits_differ_by_rounding(self, name, dimensions, arguments):
        made = plans(name, dimensions, **arguments)
        if "block" in arguments:
            architecture = made["configurations"]["3d_fullres"]["architecture"]
            architecture["_kw_requires_import"] = [*architecture["_kw_requires_import"], "block"]
        if "dropout_op" in arguments:
            assert any(isinstance(module, torch.nn.Dropout3d) for module in network_of(made).modules())
        network = network_of(made)
        (expected,) = network(tiles(dimensions))
        (found,) = with_channels_last(copy.deepcopy(network), torch.float32)(tiles(dimensions))
        assert furthest(found, expected) < 2e-4
        (unbiased,) = without_lost_biases(network)(tiles(dimensions))
        assert furthest(unbiased, expected) < 2e-4

    def test_folds_are_averaged(self):
        network = network_of(plans(), folds=2)
        (expected,) = network(tiles())
        assert furthest(with_channels_last(network, torch.float32)(tiles())[0], expected) < 2e-4

    def test_a_head_sees_the_features(self):
        network = network_of(multi_task(plans("ResidualEncoderUNet"), stages=[0, 1, 2]))
        expected = network(tiles())
        found = with_channels_last(copy.deepcopy(network), torch.float32)(tiles())
        assert furthest(found[0], expected[0]) < 2e-4
        assert torch.allclose(found[1], expected[1], atol=1e-4)

    @pytest.mark.parametrize("name", NETWORKS)
    def test_half_precision_is_no_further_off_than_torchs(self, name):
        """In bfloat16, which a CPU has, under autocast as on a GPU."""
        network = network_of(plans(name))
        (exact,) = network(tiles())
        runner = TorchRunner(copy.deepcopy(network), torch.device("cpu"), "bf16")
        usual = furthest(runner(tiles()).seg_logits.float(), exact)
        fused = TorchRunner(with_channels_last(network, torch.bfloat16), torch.device("cpu"), "bf16")
        logits = fused(tiles().bfloat16()).seg_logits
        assert logits.dtype == torch.bfloat16
        assert 1e-4 < furthest(logits.float(), exact) < 1.5 * usual


WIDE = {"features_per_stage": [32, 64, 48]}


class TestItsOwnConvolutions:
    """Of few channels, at full resolution."""

    @pytest.mark.parametrize(("name", "dimensions", "arguments"), VARIANTS[:-1])
    def test_logits_are_no_further_off_than_torchs(self, name, dimensions, arguments):
        network = network_of(plans(name, dimensions, **{**WIDE, **arguments}))
        (exact,) = network(tiles(dimensions))
        runner = TorchRunner(copy.deepcopy(network), torch.device("cpu"), "bf16")
        usual = furthest(runner(tiles(dimensions)).seg_logits.float(), exact)
        own = with_channels_last(network, torch.bfloat16, own=True)
        logits = TorchRunner(own, torch.device("cpu"), "bf16")(tiles(dimensions).bfloat16()).seg_logits
        assert logits.dtype == torch.bfloat16
        assert logits.is_contiguous()
        assert 1e-4 < furthest(logits.float(), exact) < 1.5 * usual

    @pytest.mark.parametrize("name", NETWORKS)
    def test_they_take_the_place_of_those_with_32_outputs(self, name):
        network = with_channels_last(network_of(plans(name, **WIDE)), torch.bfloat16, own=True)
        own = [name for name, module in network.named_modules() if isinstance(module, FewChannels)]
        others = [m for m in network.modules() if isinstance(m, torch.nn.Conv3d)]
        # Of the first stage, of the last one, and the logits; those with a stride go on to more channels.
        assert len(own) >= 4
        assert any("encoder" in name for name in own)
        assert any(name.endswith("logits.convolution") for name in own)
        assert all(m.out_channels > 32 or m.in_channels > 96 for m in others)
        left = [m for m in network.modules() if isinstance(m, FusedBlock) and m.leaves_unfinished]
        assert left

    def test_what_they_are_not_for_cudnn_does(self):
        for changes in ({"features_per_stage": [24, 40, 48]}, {"kernel_sizes": [[1, 5, 5], [3, 3, 3], [3, 3, 3]]}):
            network = with_channels_last(network_of(plans(**changes)), torch.bfloat16, own=True)
            blocks = [module for module in network.modules() if isinstance(module, FusedBlock)]
            assert not [block for block in blocks if isinstance(block.convolution, FewChannels)]
            assert TorchRunner(network, torch.device("cpu"), "bf16")(tiles()).seg_logits.isfinite().all()

    @pytest.mark.parametrize(
        ("features", "own", "few"),
        [
            ((32, 64, 48), True, [False, True]),
            ((32, 64, 48), False, [False, False]),
            ((32, 160, 96), True, [True, False]),
            ((40, 64, 128), True, [True, False]),
        ],
    )
    def test_upsamplings_of_few_channels_have_no_blocks(self, features, own, few):
        network = with_channels_last(network_of(plans(features_per_stage=list(features))), torch.bfloat16, own=own)
        kinds = [type(upward) for upward in network.networks[0].get_submodule("decoder.upward")]
        assert kinds == [FewChannelsUpsampling if each else ProductUpsampling for each in few]

    def test_a_decoders_memory_holds_no_blocks_of_the_last_upsampling(self, monkeypatch):
        def convolve(values, weight, factors, norm=None, bias=None):
            images, _, *grid = values.shape
            made = values.new_empty(images, *grid, len(weight)).movedim(-1, 1)
            return made, None if bias is not None else torch.zeros(images, 1, 3, len(weight), device="meta")

        module = "nnturbo.engine.backends.fused_layers."
        for name in ("instance_norm", "norm_apply"):
            monkeypatch.setattr(module + name, lambda values, *others: values)
        monkeypatch.setattr(module + "convolve", convolve)
        monkeypatch.setattr(module + "upsample", lambda *arguments: None)
        network = with_channels_last(network_of(plans(**WIDE)), torch.bfloat16, own=True).to("meta")
        features = network.networks[0].get_submodule("encoder")(torch.empty(2, 1, *PATCH, device="meta"))
        with LiveBytes() as counted:
            network.networks[0].get_submodule("decoder")(features)
        finest = 2 * 32 * math.prod(PATCH) * 2
        # The last stage's features, and what its first convolution reads: twice as much. Blocks would be 3.25 times.
        assert 3 <= counted.most / finest < 3.2

    @pytest.mark.thorough
    @pytest.mark.skipif(host.compiler is None, reason="g++ is not installed")
    @pytest.mark.parametrize(("name", "dimensions"), [("PlainConvUNet", 3), ("ResidualUNet", 2)])
    def test_the_kernels_do_what_their_twins_do(self, monkeypatch, name, dimensions):
        network = with_channels_last(network_of(plans(name, dimensions, **WIDE)), torch.bfloat16, own=True)
        runner = TorchRunner(network, torch.device("cpu"), "bf16")
        expected = runner(tiles(dimensions, 1).bfloat16()).seg_logits.float()
        launched = host.host_kernels()
        monkeypatch.setattr(loader, "launch", launched)
        monkeypatch.setattr(nnturbo.kernels, "_launches", lambda tensor: True)
        monkeypatch.setattr(device_layers, "CONVOLVED_ROWS", 2)
        monkeypatch.setattr(device_layers, "UPSAMPLED_ROWS", 2)
        found = runner(tiles(dimensions, 1).bfloat16()).seg_logits.float()
        assert furthest(found, expected) < 0.1


class TestHow:
    @pytest.mark.parametrize("name", NETWORKS)
    def test_nothing_is_concatenated_copied_to_another_layout_or_normalised_by_torch(self, monkeypatch, name):
        network = with_channels_last(network_of(plans(name)), torch.float32)
        layouts = []

        def convolution(of, values, weight, bias, original=torch.nn.Conv3d._conv_forward):
            layouts.append(values.is_contiguous(memory_format=torch.channels_last_3d))
            made = original(of, values, weight, bias)
            return made.contiguous(memory_format=torch.channels_last_3d)

        def refuse(*arguments, **named):
            raise AssertionError("not here")

        monkeypatch.setattr(torch.nn.Conv3d, "_conv_forward", convolution)
        for place, function in ((torch, "cat"), (F, "instance_norm"), (F, "leaky_relu"), (F, "avg_pool3d")):
            monkeypatch.setattr(place, function, refuse)
        network(tiles())
        assert layouts
        assert all(layouts)

    @pytest.mark.parametrize("of_head", [None, [2]])
    def test_memory_holds_nothing_that_is_not_read_again(self, monkeypatch, of_head):
        def norm(values, *others):
            if others[-1] is not None:
                others[-1].copy_(values)
            return values

        monkeypatch.setattr("nnturbo.engine.backends.fused_layers.instance_norm", norm)
        made = plans() if of_head is None else multi_task(plans(), stages=of_head)
        network = with_channels_last(network_of(made), torch.float32).to("meta")
        with LiveBytes() as counted:
            network(torch.empty(2, 1, *PATCH, device="meta"))
        finest = 2 * 8 * math.prod(PATCH) * 4
        # The last upsampling: what it reads, a quarter here, what it makes, and the decoder's place for twice as much.
        assert 3.25 <= counted.most / finest < 3.5

    def test_a_single_channel_lies_as_cudnn_wants_it(self):
        one = channels_last(torch.randn(3, 1, 4, 5, 6))
        assert one.stride() == (120, 1, 30, 6, 1)
        assert channels_last(torch.randn(3, 1, 5, 6)).stride() == (30, 1, 6, 1)
        several = torch.randn(3, 2, 4, 5, 6)
        assert channels_last(several).stride() == (240, 1, 60, 12, 2)
        assert torch.equal(channels_last(several), several)

    @pytest.mark.skipif(host.compiler is None, reason="g++ is not installed")
    @pytest.mark.parametrize(("name", "dimensions"), [("PlainConvUNet", 2), ("ResidualUNet", 3)])
    def test_the_kernels_do_what_their_twins_do(self, monkeypatch, name, dimensions):
        network = with_channels_last(network_of(plans(name, dimensions)), torch.float32)
        (expected,) = network(tiles(dimensions))
        launched = host.host_kernels()
        monkeypatch.setattr(loader, "launch", launched)
        monkeypatch.setattr(nnturbo.kernels, "_launches", lambda tensor: True)
        before = launched.launches
        (found,) = network(tiles(dimensions))
        assert furthest(found, expected) < 2e-4
        assert launched.launches > before + 20


class TestWhatItIsNotFor:
    @pytest.mark.parametrize(
        "changes",
        [
            {"features_per_stage": [8, 12, 24]},
            {"norm_op": "torch.nn.BatchNorm3d"},
            {"nonlin": "torch.nn.GELU", "nonlin_kwargs": {}},
            {"norm_op": None, "norm_op_kwargs": None},
            {"nonlin_first": True},
        ],
    )
    def test_it_is_refused_and_left_as_it_was(self, changes):
        network = network_of(plans(**changes))
        names = list(network.state_dict())
        with pytest.raises(BackendUnavailable, match="channels in multiples of 8 to run with the channels last"):
            with_channels_last(network, torch.float16)
        assert list(network.state_dict()) == names

    @pytest.mark.parametrize("name", NETWORKS[1:])
    def test_squeeze_and_excitation_is_refused(self, name):
        network = network_of(plans(name))
        next(module for module in network.modules() if isinstance(module, BasicBlockD)).apply_se = True
        with pytest.raises(BackendUnavailable, match="one of nnU-Net's U-Nets"):
            with_channels_last(network, torch.float16)

    def test_a_bias_that_no_norm_follows_is_kept(self):
        for changes in ({"norm_op": None, "norm_op_kwargs": None}, {"nonlin_first": True}):
            network = network_of(plans(**changes))
            (expected,) = network(tiles())
            assert torch.equal(without_lost_biases(network)(tiles())[0], expected)


class TestTheChoice:
    def chosen(self, monkeypatch, precision, cupy=True, capability=(9, 0), **changes):
        monkeypatch.setattr(torch_backend, "has_cupy", lambda: cupy)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        network = network_for_gpu(network_of(plans(**changes)), torch.device("cuda"), precision)
        return type(network.networks[0].encoder).__name__, network

    @pytest.mark.parametrize("precision", ["fp16", "bf16"])
    def test_half_precision_has_the_channels_last(self, monkeypatch, precision):
        name, network = self.chosen(monkeypatch, precision)
        assert name == "JoiningEncoder"
        weights = {
            p.dtype for n, p in network.named_parameters() if n.endswith("convolution.weight") and "logits" not in n
        }
        assert weights == {DTYPES[precision]}

    def test_older_devices_leave_all_convolutions_to_cudnn(self, monkeypatch):
        for capability, own in (((7, 5), False), ((8, 0), True)):
            _, network = self.chosen(monkeypatch, "fp16", capability=capability, features_per_stage=[32, 40, 48])
            assert own == any(isinstance(module, FewChannels) for module in network.modules())

    def test_float32_and_machines_without_cupy_run_as_torch_runs_them_but_for_the_biases(self, monkeypatch):
        for precision, cupy in (("fp32", True), ("fp16", False)):
            name, network = self.chosen(monkeypatch, precision, cupy)
            assert name == "PlainConvEncoder"
            assert not [n for n in network.state_dict() if n.endswith("conv.bias")]

    def test_a_network_that_it_is_not_for_runs_as_torch_runs_it_and_the_log_says_so(self, monkeypatch, caplog):
        caplog.set_level(logging.INFO)
        name, _ = self.chosen(monkeypatch, "fp16", features_per_stage=[8, 12, 24])
        assert name == "PlainConvEncoder"
        assert "channels in multiples of 8 to run with the channels last; it runs as torch runs it" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("name", "dimensions", "arguments"),
    [(*of[:2], {**of[2], **more}) for of in VARIANTS[:6] for more in ({}, WIDE)],
)
def test_on_a_gpu_half_precision_is_no_further_off_than_torchs(name, dimensions, arguments):
    pytest.importorskip("cupy")
    network = network_of(plans(name, dimensions, **arguments))
    (exact,) = network(tiles(dimensions))
    gpu = torch.device("cuda", 0)
    usual = TorchRunner(copy.deepcopy(network).to(gpu), gpu, "fp16")(tiles(dimensions)).seg_logits
    own = torch.cuda.get_device_capability(gpu) >= OWN_CONVOLUTIONS
    fused = TorchRunner(with_channels_last(network, torch.float16, own=own).to(gpu), gpu, "fp16")
    for _ in range(4):  # launched, timed, recorded, replayed
        found = fused(tiles(dimensions)).seg_logits
        assert furthest(found.cpu().float(), exact) < 1.5 * furthest(usual.cpu().float(), exact)
