"""Copies of plans and data sets with one entry replaced by another, or by anything."""

import json

from hypothesis import strategies as st


def changed(content, path, value):
    """Copy JSON with one entry replaced, or removed where the value is `...`."""
    content = json.loads(json.dumps(content))
    *parents, last = path
    place = content
    for key in parents:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return content


CONFIGURATION = ("configurations", "3d_fullres")
ARCHITECTURE = (*CONFIGURATION, "architecture")
ARGUMENTS = (*ARCHITECTURE, "arch_kwargs")

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)

values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(content, path=()):
    """Every path into nested JSON."""
    if path:
        yield path
    if isinstance(content, dict):
        for key, value in content.items():
            yield from places(value, (*path, key))
    elif isinstance(content, list):
        for index, value in enumerate(content):
            yield from places(value, (*path, index))
