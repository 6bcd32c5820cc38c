"""What several modules about scans use."""

import pytest
from nnturbo.engine.scans.geometry import Geometry

from tests.engine.scans.image_files import IDENTITY


@pytest.fixture
def geometry():
    return Geometry(spacing=(2.5, 0.75, 0.5), origin=(-10.5, 20.25, 30.125), direction=IDENTITY)
