"""Takes values from JSON files, and checks them."""

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
    if not _is_of(value, kinds):
        raise ModelError(f"{where}: {key!r} must be a {_in_words(kinds)}, got {value!r:.80}")
    return value


def check_object(content: Any, kinds: Mapping[str, type | tuple[type, ...]], what: str) -> None:
    """Check that a JSON object has certain values and no others.

    Args:
        content: The object.
        kinds: Allowed types of each value, by name.
        what: Name of the object, for messages.

    Raises:
        ValueError: Where it is no object, or a value is missing, unknown or of another type.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{what} must be a JSON object, got {content!r:.80}")
    if wrong := sorted(kinds.keys() ^ content.keys()):
        raise ValueError(f"{what} must have {', '.join(kinds)}; missing or unknown are {', '.join(wrong):.120}")
    for name, allowed in kinds.items():
        if not _is_of(content[name], allowed):
            raise ValueError(f"{what}: {name} must be a {_in_words(allowed)}, got {content[name]!r:.80}")


def _is_of(value: Any, kinds: type | tuple[type, ...]) -> bool:
    # In Python, True is an integer; in JSON it is not.
    return isinstance(value, kinds) and not isinstance(value, bool)


def _in_words(kinds: type | tuple[type, ...]) -> str:
    return " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
