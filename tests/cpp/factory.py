"""The C++ library's build, bundles to spoil, and scans with odd headers."""

import hashlib
import json
import subprocess

import nibabel
import numpy as np
import SimpleITK as sitk
import torch

from tests.paths import ROOT

SHAPE = (9, 24, 26)


def write_manifest(folder, **changes):
    """Change entries of a bundle's manifest, with the hashes of the files as they are now."""
    manifest = json.loads((folder / "engine.json").read_text())
    manifest["files"] = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
        if file.name != "engine.json"
    }
    (folder / "engine.json").write_text(json.dumps(manifest | changes))
    return folder


def write_scan(path, array, *, spacing=(1.2, 1.1, 3.0), **header):
    """Write (Z, Y, X) with a tilted direction; `header` sets fields afterwards."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    image.SetOrigin((-10.5, 20.25, 30.125))
    image.SetDirection((0.96, -0.28, 0, 0.28, 0.96, 0, 0, 0, 1))
    sitk.WriteImage(image, str(path))
    if header:
        image = nibabel.load(path)
        raw = np.asanyarray(image.dataobj)
        changed = nibabel.Nifti1Image(raw, None, image.header)
        for field, value in header.items():
            changed.header[field] = value
        changed.header.set_slope_inter(header.get("scl_slope", 1), header.get("scl_inter", 0))
        nibabel.save(changed, path)
    return path


SOURCE = ROOT / "examples" / "cpp"


def cmake(source, folder, *prefixes):
    prefix = ";".join([torch.utils.cmake_prefix_path, *map(str, prefixes)])
    for step in (
        ["cmake", "-S", source, "-B", folder, f"-DCMAKE_PREFIX_PATH={prefix}", "-DNNTURBO_WARNINGS_AS_ERRORS=ON"],
        ["cmake", "--build", folder],
    ):
        result = subprocess.run(step, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return folder
