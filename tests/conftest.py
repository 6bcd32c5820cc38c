"""What tests of several folders share."""

import os
from pathlib import Path

import pytest

TRAINERS = Path(__file__).parents[1] / "training" / "nnunet_trainers"


@pytest.fixture
def found_by_nnunet(monkeypatch: pytest.MonkeyPatch):
    """Let nnU-Net find its trainers outside of itself alone; gives its search.

    It would import every built-in one first, for seconds; one needs torchvision, which beside a CPU build of torch
    cannot be imported. The search of external folders, which follows it, is nnU-Net's own.
    """
    from nnunetv2.utilities import find_objects

    search = find_objects.recursive_find_python_class

    def search_outside(folder, class_name, current_module, *arguments, **options):
        return None if current_module else search(folder, class_name, current_module, *arguments, **options)

    monkeypatch.setattr(find_objects, "recursive_find_python_class", search_outside)
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join(["/nowhere", str(TRAINERS)]))
    return find_objects.recursive_find_trainer_class_by_name
