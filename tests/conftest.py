"""What tests of several folders share."""

import os

import pytest
from nnturbo.engine.backends import choose

from tests.paths import ROOT

TRAINERS = ROOT / "training" / "nnunet_trainers"


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Keep what tests compile out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NNTURBO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def nothing_is_compiled_unasked():
    """Run networks as they are unless a test asks for more: compiling takes seconds, and few are about that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(choose.AUTOMATIC, "cpu", ("torch",))
        yield


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
