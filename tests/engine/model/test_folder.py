"""Model folders and exported zips: folds, checkpoints, and what is missing or damaged in them."""

import io
import pickle
import re
import zipfile

import pytest
import torch
from nnturbo.engine import CheckpointError, ModelError
from nnturbo.engine.model.folder import read_model
from nnturbo.engine.model.network import build_network
from nnturbo.engine.model.plans import parse_plan

from tests.engine.factory import dataset_json, plans_json, random_weights, write_model, zipped


def test_a_model_folder_is_read(tmp_path):
    model = read_model(write_model(tmp_path / "m", folds=("0", "1", "all")))
    assert model.folds == ("0", "1")
    assert model.mirror_axes == (0, 1, 2)
    assert model.trainer == "nnUNetTrainer"
    assert model.plan.channels[0].low == -150
    assert model.plan.labels.foreground == (1, 2)
    network = build_network(model.plan, model.weights[0])
    assert sum(p.numel() for p in network.parameters()) == model.num_parameters
    assert network(torch.zeros(1, 1, 8, 12, 16)).shape == (1, 3, 8, 12, 16)


@pytest.mark.parametrize(
    ("folds", "chosen"), [(None, ("0", "2")), (("all",), ("all",)), ((2,), ("2",)), (("2", "0"), ("2", "0"))]
)
def test_folds_are_chosen(tmp_path, folds, chosen):
    assert read_model(write_model(tmp_path / "m", folds=("2", "0", "all")), folds=folds).folds == chosen


def test_fold_all_is_taken_where_it_is_the_only_one(tmp_path):
    assert read_model(write_model(tmp_path / "m", folds=("all",))).folds == ("all",)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_prefixes_are_taken_off(tmp_path, prefix):
    weights = random_weights(plans_json(), dataset_json())
    plain = read_model(write_model(tmp_path / "a", checkpoint={"network_weights": weights}))
    wrapped = {prefix + name: tensor for name, tensor in weights.items()}
    model = read_model(write_model(tmp_path / "b", checkpoint={"network_weights": wrapped}))
    tiles = torch.randn(1, 1, 8, 12, 16)
    outputs = [build_network(m.plan, m.weights[0])(tiles) for m in (plain, model)]
    assert torch.equal(*outputs)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


def test_nothing_in_a_checkpoint_is_run(tmp_path):
    fired = tmp_path / "fired"
    folder = write_model(tmp_path / "m", checkpoint={"logging": Bomb(fired)})
    with pytest.raises(
        CheckpointError, match="must hold weights and plain values only; it names .*exec.*Nothing in it was run"
    ):
        read_model(folder)
    (folder / "fold_0" / "checkpoint_final.pth").write_bytes(pickle.dumps({"network_weights": Bomb(fired)}))
    with pytest.raises(CheckpointError):
        read_model(folder)
    assert not fired.exists()


@pytest.mark.parametrize(
    ("reader", "ending"),
    [
        *(("SimpleITKIO", ending) for ending in (".png", ".tif", "nii.gz", "/../../evil.nii.gz", "")),
        ("SimpleITKIOWithReorient", ".png"),
        ("NibabelIO", ".nrrd"),
        ("NibabelIOWithReorient", ".mha"),
        ("NaturalImage2DIO", ".jpg"),
        ("NaturalImage2DIO", ".nii.gz"),
        ("Tiff3DIO", ".png"),
    ],
)
def test_a_file_ending_that_the_reader_does_not_write_is_refused(reader, ending):
    with pytest.raises(ModelError, match=f"file_ending must be one of .* for {reader}, got '{re.escape(ending)}'"):
        parse_plan({**plans_json(), "image_reader_writer": reader}, dataset_json(file_ending=ending), "3d_fullres")


@pytest.mark.parametrize(
    ("reader", "endings"),
    [
        ("SimpleITKIO", ".nii.gz .nii .nrrd .nhdr .mha .mhd .gipl .NII.GZ .Nii.gz .NRRD .GIPL"),
        ("SimpleITKIOWithReorient", ".nii.gz .nrrd .mha .gipl"),
        ("NibabelIO", ".nii.gz .nii .NII.GZ"),
        ("NibabelIOWithReorient", ".nii.gz .nii"),
        ("NaturalImage2DIO", ".png .bmp .tif .PNG"),
        ("Tiff3DIO", ".tif .tiff .TIF"),
    ],
)
def test_every_file_ending_that_the_reader_writes_is_kept_as_it_is(reader, endings):
    for ending in endings.split():
        plans = {**plans_json(), "image_reader_writer": reader}
        assert parse_plan(plans, dataset_json(file_ending=ending), "3d_fullres").file_ending == ending


def test_missing_pieces_of_a_folder_are_named(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        read_model(tmp_path / "nowhere")
    folder = write_model(tmp_path / "m")
    for name in ("plans.json", "dataset.json"):
        content = (folder / name).read_text()
        (folder / name).unlink()
        with pytest.raises(ModelError, match=f"must have {name}"):
            read_model(folder)
        (folder / name).write_text("{oops")
        with pytest.raises(ModelError, match="must be JSON"):
            read_model(folder)
        (folder / name).write_text("[1]")
        with pytest.raises(ModelError, match="must hold a JSON object"):
            read_model(folder)
        (folder / name).write_text(content)
    with pytest.raises(ModelError, match="fold 7 has none, found are 0"):
        read_model(folder, folds=[7])
    with pytest.raises(ModelError, match=r"fold with checkpoint_best\.pth.*it has fold_0/checkpoint_final\.pth"):
        read_model(folder, checkpoint="checkpoint_best.pth")
    with pytest.raises(ModelError, match="must be of configuration '2d', it is of '3d_fullres'"):
        read_model(folder, configuration="2d")
    with pytest.raises(ValueError, match="different folds"):
        read_model(folder, folds=[0, 0])
    with pytest.raises(ValueError, match="file name"):
        read_model(folder, checkpoint="../checkpoint_final.pth")


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ({"network_weights": None}, "tensors under 'network_weights'"),
        ({"network_weights": {"a": 1}}, "tensors under 'network_weights'"),
        ({"init_args": {}}, "must name its configuration"),
        ({"inference_allowed_mirroring_axes": (0, 5)}, "must be among 0, 1, 2"),
        ({"inference_allowed_mirroring_axes": 3}, "must be among 0, 1, 2"),
        ({"inference_allowed_mirroring_axes": torch.tensor([0, 1])}, "must be among 0, 1, 2"),
        ({"inference_allowed_mirroring_axes": [torch.tensor([0, 1])]}, "must be among 0, 1, 2"),
        ({"network_weights": {3: torch.zeros(1)}}, "plain, dense weights, which 3 is not"),
        ({"network_weights": {"a": torch.zeros(2).to_sparse()}}, "plain, dense weights"),
        ({"network_weights": {"a": torch.zeros(2, dtype=torch.complex64)}}, "plain, dense weights"),
        ({"network_weights": {"a": torch.zeros(1).expand(10**9)}}, "plain, dense weights"),
        ({"network_weights": {"a": torch.tensor([0, float("inf")])}}, "finite weights, 'a'"),
    ],
)
def test_what_is_wrong_with_a_checkpoint_is_named(tmp_path, checkpoint, message):
    with pytest.raises(CheckpointError, match=message):
        read_model(write_model(tmp_path / "m", checkpoint=checkpoint))


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "no dictionary"])
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    folder = write_model(tmp_path / "m")
    path = folder / "fold_0" / "checkpoint_final.pth"
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "text": b"hello", "empty": b""}.get(damage, b""))
    if damage == "no dictionary":
        torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match=str(path)):
        read_model(folder)


def test_an_export_zip_is_read_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    folder = write_model(tmp_path / "m", folds=("0", "1"))
    archive = zipped(folder, tmp_path / "model.zip")
    model = read_model(archive)
    assert model.folds == ("0", "1")
    assert list((tmp_path / "tmp").iterdir()) == []
    zipped(folder, archive, "Dataset900_Test/nnUNetTrainer__nnUNetPlans__2d")
    with pytest.raises(ModelError, match="exactly one model; name a configuration; it holds .*2d, .*3d_fullres"):
        read_model(archive)
    assert read_model(archive, configuration="3d_fullres").folds == ("0", "1")


@pytest.mark.parametrize("member", ["m/../../escaped.json", "m/fold_0/..\\..\\escaped.json"])
def test_a_zip_cannot_write_outside_its_folder(tmp_path, member):
    archive = tmp_path / "model.zip"
    with zipfile.ZipFile(archive, "w") as writer:
        writer.writestr("m/plans.json", "{}")
        writer.writestr(member, "{}")
    with pytest.raises(ModelError, match="must not hold paths that leave its folder"):
        read_model(archive)
    assert not list(tmp_path.rglob("escaped*"))


@pytest.mark.parametrize("damage", ["truncated", "text", "flipped", "clash"])
def test_a_damaged_zip_is_refused(tmp_path, damage):
    archive = zipped(write_model(tmp_path / "m"), tmp_path / "model.zip")
    whole = bytearray(archive.read_bytes())
    if damage == "clash":
        with zipfile.ZipFile(archive, "a") as writer:
            writer.writestr("Dataset900_Test/nnUNetTrainer__nnUNetPlans__3d_fullres/a.json", "{}")
            writer.writestr("Dataset900_Test/nnUNetTrainer__nnUNetPlans__3d_fullres/a.json/b.json", "{}")
    elif damage == "flipped":
        start = whole.index(b"checkpoint_final.pth") + 2000
        whole[start : start + 64] = bytes(64)
        archive.write_bytes(whole)
    else:
        archive.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"hello")
    with pytest.raises(ModelError, match="no whole zip|must be a whole zip"):
        read_model(archive)


def test_a_zip_with_the_model_at_its_top_is_read(tmp_path):
    folder = write_model(tmp_path / "m")
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        for path in folder.rglob("*.*"):
            archive.write(path, path.relative_to(folder))
    assert read_model(tmp_path / "model.zip").folds == ("0",)


def test_legacy_checkpoints_without_a_zip_container_are_read(tmp_path):
    folder = write_model(tmp_path / "m")
    path = folder / "fold_0" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=False)
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    path.write_bytes(buffer.getvalue())
    assert read_model(folder).folds == ("0",)
