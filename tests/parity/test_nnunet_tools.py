"""What a job leaves behind is taken by nnU-Net's own commands, for models of each of its readers."""

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest

pytest.importorskip("nnunetv2", reason="runs nnU-Net's own commands")

from nnturbo.engine import Engine
from nnturbo.engine.jobs.cases import find_cases
from nnturbo.engine.jobs.job import Job
from nnturbo.engine.jobs.run import predict_cases
from nnunetv2.postprocessing.remove_connected_components import remove_all_but_largest_component_from_segmentation

from tests.parity import stock
from tests.parity.catalogue import PLAIN_CT
from tests.parity.fp32 import Fp32Predictor
from tests.parity.model_folders import build_model_folder
from tests.parity.scans import SCANS, write_channels

READERS = ("SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient")
THOROUGH = ("SimpleITKIO", "NibabelIOWithReorient")
"""Whose outputs are given to commands, which take half a minute, where thorough tests run."""
CASES = ("oblique", "one_flip", "sagittal")
MOST_DIFFERENT_VOXELS = 1
"""Of 10,560, where nnU-Net sums in fp32 too."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name in THOROUGH else pytest.mark.thorough) for name in READERS],
)
def outputs(request, tmp_path_factory) -> Path:
    """Predict the same scans, with probabilities, by nnturbo into `own`, by nnU-Net with fp32 sums into `stock`."""
    root = tmp_path_factory.mktemp(request.param)
    kind = replace(PLAIN_CT, name="tools", reader=request.param, transpose_forward=(2, 0, 1))
    model = build_model_folder(kind, root / "model").path
    for folder in ("scans", "own", "stock"):
        (root / folder).mkdir()
    for name in CASES:
        (written,) = write_channels(SCANS[name], kind.channels, root, ".nii.gz")
        written.rename(root / "scans" / f"{name}_0000.nii.gz")
    if request.param.startswith("Nibabel"):  # SimpleITK refuses sheared axes
        scan = nibabel.load(root / "scans" / "oblique_0000.nii.gz")
        sheared = scan.affine @ [[1, 0.2, 0, 0], [0, 1, 0, 0], [0, -0.1, 1, 0], [0, 0, 0, 1]]
        nibabel.save(nibabel.Nifti1Image(np.asanyarray(scan.dataobj), sheared), root / "scans" / "sheared_0000.nii.gz")
    engine = Engine.load(model, device="cpu", precision="fp32", backend="torch")
    outcome = predict_cases(
        engine, find_cases(root / "scans", ".nii.gz"), Job(output=root / "own", save_probabilities=True)
    )
    assert not outcome.failed
    predictor = stock.load_predictor(Fp32Predictor, model)
    with stock.quiet():
        predictor.predict_from_files_sequential(
            str(root / "scans"), str(root / "stock"), save_probabilities=True, overwrite=True
        )
    return root


def cases(outputs: Path) -> list[str]:
    return sorted(path.name.removesuffix("_0000.nii.gz") for path in (outputs / "scans").iterdir())


def test_files_beside_labels_are_those_of_nnunet(outputs):
    for name in cases(outputs):
        own, theirs = (np.load(outputs / folder / f"{name}.npz")["probabilities"] for folder in ("own", "stock"))
        assert own.dtype == theirs.dtype
        np.testing.assert_allclose(own, theirs, rtol=0, atol=2e-3)
        own, theirs = (pickle.loads((outputs / folder / f"{name}.pkl").read_bytes()) for folder in ("own", "stock"))
        assert own.keys() == theirs.keys()
        for key, value in theirs.items():
            if isinstance(value, dict):
                assert own[key].keys() == value.keys()
                for part, numbers in value.items():
                    if isinstance(numbers, str):
                        assert own[key][part] == numbers
                    else:
                        np.testing.assert_allclose(own[key][part], numbers, rtol=0, atol=1e-6)
            else:
                np.testing.assert_allclose(own[key], value, rtol=0, atol=1e-9)


def test_properties_are_read_without_nnturbo(outputs):
    """Nothing in them is of a type that nnU-Net's environment lacks."""
    code = (
        "import sys; sys.modules['nnturbo'] = None; "
        "from batchgenerators.utilities.file_and_folder_operations import load_pickle; "
        f"load_pickle({str(outputs / 'own' / 'oblique.pkl')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "outputs",
    [
        pytest.param(reader, marks=pytest.mark.thorough if reader in THOROUGH else pytest.mark.slow)
        for reader in READERS
    ],
    indirect=True,
)
def test_commands_give_what_they_give_for_nnunets_own_files(outputs, tmp_path):
    own, theirs = outputs / "own", outputs / "stock"
    keep_largest = [[remove_all_but_largest_component_from_segmentation], [{"labels_or_regions": [1, 2]}]]
    (tmp_path / "rules.pkl").write_bytes(pickle.dumps(keep_largest))
    described = ("-djfile", own / "dataset.json", "-pfile", own / "plans.json", "-np", "1")
    # This command takes the first of nnU-Net's readers that reads the first file: SimpleITK's, which refuses shear.
    upright = tmp_path / "upright"
    upright.mkdir()
    for name in CASES:
        (upright / f"{name}.nii.gz").symlink_to(own / f"{name}.nii.gz")
    results = {name: tmp_path / name for name in ("own", "mixed", "other", "reference", "processed", "theirs")}
    run(
        *(
            ("nnUNetv2_ensemble", "-i", *folders, "-o", results[name], "-np", "1")
            for name, folders in {
                "own": (own, own), "mixed": (own, theirs), "other": (theirs, own), "reference": (theirs, theirs),
            }.items()
        ),
        *(
            ("nnUNetv2_apply_postprocessing", "-i", folder, "-o", results[name], "-pp_pkl_file", tmp_path / "rules.pkl",
             "-plans_json", own / "plans.json", "-dataset_json", own / "dataset.json", "-np", "1")
            for name, folder in {"processed": own, "theirs": theirs}.items()
        ),
        ("nnUNetv2_evaluate_folder", theirs, upright, *described, "-o", tmp_path / "summary.json", "--chill"),
    )  # fmt: skip
    for name in cases(outputs):
        scan = nibabel.load(outputs / "scans" / f"{name}_0000.nii.gz")
        labels = {
            result: nibabel.load(folder / f"{name}.nii.gz")
            for result, folder in {**results, "predicted": own, "predicted by nnU-Net": theirs}.items()
        }
        for result, image in labels.items():
            np.testing.assert_allclose(image.affine, scan.affine, rtol=0, atol=1e-5, err_msg=result)
        values = {result: np.asanyarray(image.dataobj) for result, image in labels.items()}
        assert set(np.unique(values["predicted"])) == {0, 1, 2}
        np.testing.assert_array_equal(values["own"], values["predicted"])
        for one, other in (
            ("own", "reference"),
            ("mixed", "reference"),
            ("other", "reference"),
            ("processed", "theirs"),
        ):
            assert np.count_nonzero(values[one] != values[other]) <= MOST_DIFFERENT_VOXELS, (one, name)
    metrics = json.loads((tmp_path / "summary.json").read_text())
    assert len(metrics["metric_per_case"]) == len(CASES)
    assert min(case["metrics"][label]["Dice"] for case in metrics["metric_per_case"] for label in "12") > 0.99


def run(*commands) -> None:
    """Run commands side by side; each must end well."""
    unused = dict.fromkeys(("nnUNet_results", "nnUNet_raw", "nnUNet_preprocessed"), "none")
    running = [
        subprocess.Popen(
            [Path(sys.executable).parent / command[0], *command[1:]],
            env={**os.environ, **unused},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in commands
    ]
    said = [process.communicate()[0] for process in running]
    for command, process, text in zip(commands, running, said, strict=True):
        assert process.returncode == 0, f"{command[0]}: {text[-2000:]}"
