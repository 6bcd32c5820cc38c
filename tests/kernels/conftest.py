"""What tests of the kernels share."""

from pathlib import Path

import pytest
from nnturbo.engine.files import cache_root
from nnturbo.kernels import library
from nnturbo.kernels.compilation import VARIANTS, compiler, here


@pytest.fixture(scope="session")
def compiled_kernels(own_cache):
    """The library of kernels as it is compiled here, once for all tests, which leave it as it is."""
    if compiler() is None or here()[1] not in VARIANTS:
        pytest.skip("needs a C++ compiler, and a processor that there are kernels for")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "INSTALLED", Path("nowhere"))
        return Path(library.load_library(cache_root() / "kernels")._name)
