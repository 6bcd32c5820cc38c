"""The properties that nnU-Net stores beside probabilities (`.pkl`), from which its tools write labels."""

from typing import Any

from ..scans.geometry import Geometry
from ..scans.volume import Volume
from .preprocessing import Case


def nnunet_properties(reader: str, original: Geometry, volume: Volume, case: Case) -> dict[str, Any]:
    """Describe a scan as one of nnU-Net's readers does, in plain types and numpy arrays.

    Args:
        reader: nnU-Net's reader class, as `Plan.reader` names it.
        original: Geometry of the scan as it is stored.
        volume: The scan as the reader gives it; some readers turn scans.
        case: The scan after preprocessing.

    Note:
        nnU-Net: nnunetv2/imageio, and DefaultPreprocessor.run_case_npy.
    """
    geometry = volume.geometry
    stuff: dict[str, Any] = {}
    if reader.startswith("SimpleITKIO"):
        stuff = {"sitk_stuff": geometry.in_simpleitk}
    elif reader.startswith("NibabelIO"):
        stuff = {"nibabel_stuff": {"original_affine": original.affine}}
    if reader == "SimpleITKIOWithReorient":
        import SimpleITK

        name_of = SimpleITK.DICOMOrientImageFilter_GetOrientationFromDirectionCosines
        stuff["sitk_stuff"]["original_orientation"] = name_of(original.direction)
    if reader == "NibabelIOWithReorient":
        stuff["nibabel_stuff"]["reoriented_affine"] = geometry.affine
    return {
        **stuff,
        "spacing": list(volume.spacing),
        "shape_before_cropping": case.full_shape,
        "bbox_used_for_cropping": [list(bounds) for bounds in case.box],
        "shape_after_cropping_and_before_resampling": case.logits_grid.shape,
    }
