"""Values of nnU-Net's JSON files, checked as they are taken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ModelError


def take(source: Mapping[str, Any], key: str, kinds: type | tuple[type, ...], where: str) -> Any:
    """Take a value of a given type from JSON, or say what is wrong with it."""
    if not isinstance(source, Mapping) or key not in source:
        has = ", ".join(sorted(map(str, source))) if isinstance(source, Mapping) else repr(source)
        raise ModelError(f"{where} must have {key!r}; it has {has or 'nothing':.300}")
    value = source[key]
    # To Python True is an integer; to a plan it is not.
    if not isinstance(value, kinds) or isinstance(value, bool):
        names = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
        raise ModelError(f"{where}: {key!r} must be a {names}, got {value!r:.80}")
    return value
