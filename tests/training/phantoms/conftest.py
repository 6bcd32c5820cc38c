"""Small phantoms that several modules look at."""

import pytest
from nnturbo.training.phantoms.phantom import SMALL_SETTINGS, generate_phantom

COUNT = 24


@pytest.fixture(scope="session")
def phantoms():
    return [generate_phantom(seed, subtype=seed % 3, settings=SMALL_SETTINGS) for seed in range(COUNT)]
