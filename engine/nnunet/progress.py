"""A bar of tiles, where nnU-Net shows one."""

from __future__ import annotations

from typing import Any


class Progress:
    """A bar of tiles, where nnU-Net shows one."""

    def __init__(self, is_wanted: bool) -> None:
        self._bar: Any = None
        self._is_wanted = is_wanted

    def __enter__(self) -> Any:
        return self._advance if self._is_wanted else None

    def _advance(self, done: int, total: int) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=total)
        self._bar.update(done - self._bar.n)

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
