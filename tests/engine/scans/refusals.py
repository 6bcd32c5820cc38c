"""How scans that cannot be read are refused."""

import pytest
from nnturbo.engine.errors import VolumeError
from nnturbo.engine.scans.volume import read_volume


def refusal(path, content=None, **options):
    """Read what must be refused, and give the text, which must be one line that begins with the file's name."""
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(VolumeError) as error:
        read_volume(path, **options)
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith(f"{path.name}: ")
    return text
