"""Models trained through nibabel, on scans whose headers nibabel and ITK understand differently, against nnU-Net."""

import gzip
from dataclasses import replace

import nibabel
import numpy as np
import pytest

pytest.importorskip("nnunetv2", reason="compares with nnU-Net itself, which is not installed")

from nnturbo.engine import Engine
from nnturbo.engine.scans.nifti import NIBABEL_READERS

from tests.parity import stock
from tests.parity.catalogue import PLAIN_CT
from tests.parity.fp32 import Fp32Predictor
from tests.parity.model_folders import build_model_folder
from tests.parity.scans import SCANS, channel_array

SCAN = SCANS["oblique"]
QFORM = np.array([[-1.3, 0, 0, 31.5], [0, -1.2, 0, -12.25], [0, 0, 1.5, 107], [0, 0, 0, 1]])
FLIPPED = QFORM * [[-1, 1, 1, -1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
TURNED = FLIPPED[:, [2, 0, 1, 3]]  # a sagittal scan; its pixdim below stays that of an axial one
SHEARED = QFORM @ [[1, 0.3, 0, 0], [0, 1, 0, 0], [0.05, -0.1, 1, 0], [0, 0, 0, 1]]


def scan(kind=nibabel.Nifti1Image, *, sform=QFORM, codes=(1, 1), **fields) -> nibabel.Nifti1Image:
    """Make a scan with these forms and codes (qform, sform); `fields` are put into its header as they are."""
    image = kind(channel_array(SCAN, 0, "CT").transpose(2, 1, 0), None)
    image.header.set_zooms(SCAN.spacing[::-1])
    image.set_qform(QFORM, int(codes[0]))
    image.set_sform(sform, int(codes[1]))
    image.header["vox_offset"] = image.header.sizeof_hdr + 4
    for name, value in fields.items():
        image.header[name] = value
    return image


SCANS_OF_NIFTI = {
    "sform_is_qform": scan(),
    "sform_flipped": scan(sform=FLIPPED, codes=(1, 2)),
    "sform_turned": scan(sform=TURNED, codes=(0, 2)),
    "qform_alone": scan(sform=FLIPPED, codes=(1, 0)),
    "no_codes": scan(codes=(0, 0)),
    "sheared": scan(sform=SHEARED, codes=(0, 1)),
    "negative_pixdim": scan(pixdim=[1, 1.3, -1.2, 1.5, 1, 1, 1, 1]),
    "other_pixdim": scan(pixdim=[1, 1.0, 2.0, 1.5, 1, 1, 1, 1]),
    "nifti_2": scan(nibabel.Nifti2Image),
    "metres": scan(xyzt_units=1),
    "micrometres": scan(xyzt_units=3),
}


@pytest.fixture(scope="module", params=NIBABEL_READERS)
def models(request, tmp_path_factory):
    kind = replace(PLAIN_CT, name="nibabel_geometry", reader=request.param, transpose_forward=(1, 0, 2))
    folder = build_model_folder(kind, tmp_path_factory.mktemp("model")).path
    engine = Engine.load(folder, device="cpu", precision="fp32", backend="torch")
    return engine, stock.load_predictor(Fp32Predictor, folder)


@pytest.mark.parametrize("name", SCANS_OF_NIFTI)
def test_labels_and_their_place_are_those_of_nnunet(models, tmp_path, name):
    engine, predictor = models
    path = tmp_path / "scan.nii.gz"
    image = SCANS_OF_NIFTI[name]
    # `nibabel.save` would mend the header.
    path.write_bytes(gzip.compress(image.header.binaryblock + bytes(4) + np.asarray(image.dataobj).tobytes("F")))
    case = stock.preprocess(predictor, [path])
    exact = stock.finish(predictor, case, stock.predict_logits(predictor, case))
    stock.write_labels(predictor, case, exact.segmentation, tmp_path / "stock.nii.gz")
    prediction = engine.predict(path, save_probabilities=True)
    prediction.save(tmp_path / "own.nii.gz")

    own, theirs, given = (nibabel.load(tmp_path / f"{name}.nii.gz") for name in ("own", "stock", "scan"))
    assert np.count_nonzero(np.asanyarray(own.dataobj) != np.asanyarray(theirs.dataobj)) <= 1
    assert set(np.unique(own.dataobj)) == {0, 1, 2}
    np.testing.assert_array_equal(own.affine, given.affine.astype(np.float32))
    np.testing.assert_allclose(theirs.affine, given.affine, rtol=1e-5, atol=1e-5)
    for field in ("sform_code", "qform_code", "dim", "datatype", "bitpix"):
        np.testing.assert_array_equal(own.header[field], theirs.header[field], err_msg=field)
    np.testing.assert_allclose(own.header.get_zooms(), theirs.header.get_zooms(), rtol=1e-6)
    np.testing.assert_allclose(prediction.reader_probabilities, exact.probabilities, rtol=0, atol=2e-3)
