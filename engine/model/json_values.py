"""Takes values from nnU-Net's JSON files, and checks them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ModelError


def take(source: Mapping[str, Any], key: str, kinds: type | tuple[type, ...], where: str) -> Any:
    """Take a value of a given type from JSON.

    Args:
        source: Object of the file.
        key: Name of the value.
        kinds: Allowed types.
        where: Name of the object, for messages.

    Raises:
        ModelError: Where the value is missing or has another type.
    """
    if not isinstance(source, Mapping) or key not in source:
        has = ", ".join(sorted(map(str, source))) if isinstance(source, Mapping) else repr(source)
        raise ModelError(f"{where} must have {key!r}; it has {has or 'nothing':.300}")
    value = source[key]
    # In Python, True is an integer; in a plan it is not.
    if not isinstance(value, kinds) or isinstance(value, bool):
        names = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
        raise ModelError(f"{where}: {key!r} must be a {names}, got {value!r:.80}")
    return value
