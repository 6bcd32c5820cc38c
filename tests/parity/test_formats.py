"""Models of pictures, TIFF stacks and 2D images: files in, files out, against nnU-Net itself and its own tools."""

import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

pytest.importorskip("nnunetv2", reason="compares with nnU-Net itself, which is not installed")
pytest.importorskip("imageio", reason="writes pictures")

import imageio.v3 as imageio
import tifffile
from nnturbo.engine.cli import main
from nnunetv2.ensembling.ensemble import merge_files
from nnunetv2.evaluation.evaluate_predictions import compute_metrics

from tests.parity.catalogue import TWO_DIMENSIONAL
from tests.parity.fp32 import Fp32Predictor
from tests.parity.kinds import ModelKind
from tests.parity.model_folders import build_model_folder
from tests.parity.scans import intensities, smooth_field
from tests.parity.stock import finish, load_predictor, predict_logits, preprocess, quiet, write_labels

FLAT = {"scans": (), "configuration": "2d", "network": TWO_DIMENSIONAL, "patch_size": (20, 28), "mirror_axes": (0, 1)}
PICTURES = FLAT | {"reader": "NaturalImage2DIO", "spacing": (1.0, 1.0)}
COLOUR = {"channels": ("R", "G", "B"), "normalization": ("RGBTo01",) * 3, "masked": (False,) * 3}
GREY = {"channels": ("R",), "normalization": ("ZScore",)}
KINDS = {
    kind.name: kind
    for kind in (
        ModelKind(name="png_colour", file_ending=".png", **PICTURES, **COLOUR),
        ModelKind(name="bmp_colour", file_ending=".bmp", **PICTURES, **COLOUR),
        ModelKind(name="tif_colour", file_ending=".tif", **PICTURES, **COLOUR),
        ModelKind(name="png_grey", file_ending=".png", **PICTURES, **GREY),
        ModelKind(name="tif_grey", file_ending=".tif", **PICTURES, **GREY),
        ModelKind(name="png_files", file_ending=".png", **PICTURES, **COLOUR),
        ModelKind(
            name="png_regions",
            file_ending=".png",
            labels={"background": 0, "whole": [1, 2], "core": 2},
            regions_class_order=(1, 2),
            **PICTURES,
            **GREY,
        ),
        *(
            ModelKind(name=f"2d{ending}", file_ending=ending, spacing=(1.0, 1.2), **FLAT)
            for ending in (".nii.gz", ".nrrd", ".mha", ".mhd")
        ),
        ModelKind(name="2d_transposed", spacing=(1.0, 1.2), transpose_forward=(0, 2, 1), **FLAT),
        ModelKind(name="tiff3d", scans=(), reader="Tiff3DIO", file_ending=".tif"),
        ModelKind(name="tiff3d_no_side", scans=(), reader="Tiff3DIO", file_ending=".tiff"),
        ModelKind(name="tiff3d_slices", reader="Tiff3DIO", file_ending=".tif", spacing=(1.0, 1.2), **FLAT),
        ModelKind(name="gipl", scans=(), file_ending=".gipl"),
        ModelKind(name="nhdr", scans=(), file_ending=".nhdr"),
    )
}


def write_scan(kind: ModelKind, folder: Path, seed: int) -> list[Path]:
    """Write a scan of a kind as `case_0000`, in the form that its reader takes."""
    flat = kind.reader == "NaturalImage2DIO" or kind.name.startswith("2d")
    shape, spacing = ((44, 50), (1.1, 0.9)) if flat else ((14, 24, 26), (2.0, 1.25, 1.25))
    channels = [intensities(smooth_field(shape, spacing, seed + i), name) for i, name in enumerate(kind.channels)]
    first = folder / f"case_0000{kind.file_ending}"
    if kind.name == "png_files":
        paths = [folder / f"case_{i:04d}.png" for i in range(3)]
        for path, channel in zip(paths, channels, strict=True):
            imageio.imwrite(path, channel)
        return paths
    if kind.reader == "NaturalImage2DIO":
        picture = channels[0] if len(channels) == 1 else np.stack(channels, axis=-1)
        tifffile.imwrite(first, picture) if kind.file_ending == ".tif" else imageio.imwrite(first, picture)
    elif kind.reader == "Tiff3DIO":
        tifffile.imwrite(first, channels[0], photometric="minisblack")
        if kind.name != "tiff3d_no_side":
            (folder / "case.json").write_text(json.dumps({"spacing": spacing}))
    else:
        image = sitk.GetImageFromArray(channels[0])
        image.SetSpacing(spacing[::-1])
        image.SetOrigin((-31.5, 12.25, 107.0)[: len(shape)])
        if flat:
            image.SetDirection((0.96, -0.28, 0.28, 0.96))
        sitk.WriteImage(image, first, useCompression=True)
    return [first]


def label_file(kind: ModelKind, folder: Path) -> Path:
    return folder / f"case{kind.file_ending}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    kind: ModelKind
    predictor: Fp32Predictor
    ours: Path
    stock: Path
    properties: dict
    probabilities: np.ndarray


@pytest.fixture(scope="module", params=KINDS)
def compared(request, tmp_path_factory) -> Compared:
    kind, root = KINDS[request.param], tmp_path_factory.mktemp("formats")
    model = build_model_folder(kind, root)
    scans, ours, stock = root / "scans", root / "of_nnturbo", root / "of_stock"
    for folder in (scans, stock):
        folder.mkdir()
    files = write_scan(kind, scans, seed=1)
    predictor = load_predictor(Fp32Predictor, model.stock_path)
    case = preprocess(predictor, files)
    finished = finish(predictor, case, predict_logits(predictor, case))
    write_labels(predictor, case, finished.segmentation, label_file(kind, stock))
    given = ["-i", str(scans), "-o", str(ours), "-m", str(model.path), "-device", "cpu", "--backend", "torch"]
    assert main(["predict", *given, "--precision", "fp32", "--save_probabilities"]) == 0
    return Compared(
        kind=kind,
        predictor=predictor,
        ours=ours,
        stock=stock,
        properties=case.properties,
        probabilities=finished.probabilities,
    )


def read_labels(compared: Compared, path: Path) -> tuple[np.ndarray, dict]:
    with quiet():
        return compared.predictor.plans_manager.image_reader_writer_class().read_seg(str(path))


def test_labels_are_those_of_nnunet(compared: Compared):
    ours, stock = (
        read_labels(compared, label_file(compared.kind, folder)) for folder in (compared.ours, compared.stock)
    )
    assert ours[0].shape == stock[0].shape
    assert len(np.unique(stock[0])) > 1
    assert np.count_nonzero(ours[0] != stock[0]) <= 1
    assert ours[1] == stock[1]  # spacing, origin, direction


def test_files_are_of_nnunets_form(compared: Compared):
    """The same files beside each other, with the same shape and type; ITK reads all but stacks with their spacing."""
    beside = {path.name for path in compared.ours.iterdir()} - {"dataset.json", "plans.json", "predictions.json"}
    beside = {name for name in beside if name.startswith("case") and not name.endswith((".npz", ".pkl"))}
    assert beside == {path.name for path in compared.stock.iterdir()}
    ours, stock = (sitk.ReadImage(label_file(compared.kind, folder)) for folder in (compared.ours, compared.stock))
    for get in ("GetDimension", "GetSize", "GetSpacing", "GetOrigin", "GetDirection", "GetPixelIDTypeAsString"):
        assert getattr(ours, get)() == getattr(stock, get)()


def test_all_files_of_a_case_are_recorded(compared: Compared):
    (record,) = json.loads((compared.ours / "predictions.json").read_text())["cases"]
    assert set(record["results"]) == {path.name for path in compared.ours.iterdir() if path.name.startswith("case")}


def test_probabilities_are_those_of_nnunet(compared: Compared):
    with np.load(compared.ours / "case.npz") as stored:
        assert stored["probabilities"].shape == compared.probabilities.shape
        np.testing.assert_allclose(stored["probabilities"], compared.probabilities, rtol=0, atol=2e-3)


def test_properties_are_those_of_nnunet(compared: Compared):
    properties = pickle.loads((compared.ours / "case.pkl").read_bytes())
    assert list(properties["spacing"]) == list(compared.properties["spacing"])
    if "sitk_stuff" in compared.properties:
        assert properties["sitk_stuff"] == compared.properties["sitk_stuff"]


def test_nnunets_own_tools_take_the_output(compared: Compared, tmp_path: Path):
    rw = compared.predictor.plans_manager.image_reader_writer_class()
    probabilities = str(compared.ours / "case.npz")
    with quiet():
        merge_files(
            [probabilities, probabilities],
            str(tmp_path / "case"),
            compared.kind.file_ending,
            rw,
            compared.predictor.label_manager,
        )
        labels = [1] if compared.kind.regions_class_order is None else [(1, 2)]
        metrics = compute_metrics(
            str(label_file(compared.kind, compared.ours)), str(label_file(compared.kind, tmp_path)), rw, labels
        )
    assert metrics["metrics"][labels[0]]["Dice"] > 0.999
    assert (
        read_labels(compared, label_file(compared.kind, tmp_path))[1]
        == read_labels(compared, label_file(compared.kind, compared.stock))[1]
    )
