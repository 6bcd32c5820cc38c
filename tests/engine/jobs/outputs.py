"""What jobs leave in their output folder, and other engines and full disks for them."""

import json

import torch
from nnturbo.engine import Engine
from nnturbo.engine.files import written_atomically
from nnturbo.engine.pipeline import prediction

from tests.engine.factory import write_model


def read_records(folder):
    return {record["name"]: record for record in json.loads((folder / "predictions.json").read_text())["cases"]}


def other_engine(tmp_path):
    """A model of the same kind with other weights."""
    model = write_model(tmp_path / "other")
    checkpoint = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=False)
    checkpoint["network_weights"] = {name: 2 * of for name, of in checkpoint["network_weights"].items()}
    torch.save(checkpoint, model / "fold_0" / "checkpoint_final.pth")
    return Engine.load(model, device="cpu", mirror=False)


def fill_disk_at(monkeypatch, name):
    """Let the disk be full halfway through a segmentation."""
    write = prediction.write_segmentation

    def full(path, labels, geometry, **options):
        if path.name == f"{name}.nii.gz":
            with written_atomically(path) as temporary:
                temporary.write_bytes(b"half")
                raise OSError(28, "No space left on device")
        write(path, labels, geometry, **options)

    monkeypatch.setattr(prediction, "write_segmentation", full)


def label_files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.nii.gz"))}
