"""Networks in int8, with as little kept in float as their labels need."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import BackendUnavailable

logger = logging.getLogger(__name__)

CONVOLUTIONS = ("Convolution", "ConvolutionBackpropData", "GroupConvolution", "GroupConvolutionBackpropData")
PASSIVE = ("Constant", "Parameter", "Result", "Concat", "Reshape", "Transpose")
"""Operations that only move values: int8 may pass through them."""

WANTED_DICE = 0.985
"""Of the worst label on the calibration tiles, at which no more is done. Whole scans agree better than single tiles."""

SMOOTHING = 0.15
"""Share of a channel's range that moves from activations to weights (SmoothQuant's alpha)."""

Tiles = Sequence[np.ndarray]
Labels = list[np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A way to quantise.

    Args:
        levels_in_float: How many of the finest resolutions stay in float; of 0, the first and the last convolution.
        smoothed: Whether channels are brought to similar ranges first, which costs a multiplication of activations.
    """

    levels_in_float: int
    smoothed: bool


RECIPES = (
    Recipe(levels_in_float=0, smoothed=False),
    Recipe(levels_in_float=0, smoothed=True),
    Recipe(levels_in_float=1, smoothed=True),
    Recipe(levels_in_float=2, smoothed=False),
)
"""The fastest first, and as measured the least accurate first."""


def quantize(model: Any, tiles: Tiles, compiled: Callable[[Any], Callable[[np.ndarray], np.ndarray]]) -> Any:
    """Quantise the convolutions of an OpenVINO model to int8.

    The first recipe whose labels agree well enough with float on the calibration tiles is taken, else the one that
    agrees best.

    Args:
        model: In float32, for one tile.
        tiles: To calibrate with, (1, C, *patch) float32 each.
        compiled: Makes a model ready to run: from a tile to segmentation logits (1, K, *patch).

    Returns:
        The quantised model.

    Raises:
        BackendUnavailable: Where NNCF is not installed.

    Note:
        NNCF by itself also quantises norms, sums, pooling and classification heads. On tiles of a multi-task model
        class logits were then off by 3.9 in the mean, and by 0.2 with convolutions alone.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of NNCF about the versions of others
            import nncf
    except ImportError as error:
        raise BackendUnavailable(f"int8 needs NNCF to build ({error}): pip install 'nnturbo[openvino]'") from error
    exact = _labels(compiled(model), tiles)
    best, best_dice = None, -1.0
    for recipe in RECIPES:
        with _quiet():
            quantized = nncf.quantize(
                model.clone(),
                nncf.Dataset(list(tiles)),
                preset=nncf.QuantizationPreset.MIXED,
                subset_size=len(tiles),
                # NNCF smooths for this type of model alone.
                model_type=nncf.ModelType.TRANSFORMER if recipe.smoothed else None,
                ignored_scope=nncf.IgnoredScope(names=_kept_in_float(model, recipe.levels_in_float)),
                advanced_parameters=nncf.AdvancedQuantizationParameters(
                    # Weights of 7 bits, since sums of two products overflow 16 bits on CPUs without VNNI.
                    overflow_fix=nncf.OverflowFix.ENABLE,
                    smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(convolution=SMOOTHING, matmul=-1),
                ),
            )
        dice = _lowest_dice(exact, _labels(compiled(quantized), tiles))
        logger.info("int8, %s: Dice %.4f on the calibration tiles", recipe, dice)
        if dice > best_dice:
            best, best_dice = quantized, dice
        if dice >= WANTED_DICE:
            break
    return best


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep NNCF's log, warnings and progress bars from the terminal."""
    log = logging.getLogger("nncf")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _kept_in_float(model: Any, levels: int) -> list[str]:
    """Names of all operations that compute, but for the convolutions to quantise; of these at least one remains."""
    operations = model.get_ordered_ops()
    convolutions = [node for node in operations if node.get_type_name() in CONVOLUTIONS]
    sizes = {node.get_friendly_name(): math.prod(list(node.output(0).shape)[2:]) for node in convolutions}
    names = list(sizes)
    finest = sorted(set(sizes.values()), reverse=True)
    # Shallow networks have no coarser level to leave to int8.
    kept_sizes = finest[: min(levels, len(finest) - 1)]
    kept = {name for name in names if sizes[name] in kept_sizes} | {names[0], names[-1]}
    others = [node for node in operations if node.get_type_name() not in (*CONVOLUTIONS, *PASSIVE)]
    return [node.get_friendly_name() for node in others] + sorted(kept)


def _labels(run: Callable[[np.ndarray], np.ndarray], tiles: Tiles) -> Labels:
    return [run(tile).argmax(1) for tile in tiles]


def _lowest_dice(exact: Labels, other: Labels) -> float:
    """Dice of the label that agrees least, over all tiles; of regions, that of their most probable channel."""
    present = np.unique(np.concatenate([np.unique(labels) for labels in (*exact, *other)]))
    scores = [1.0]
    for label in present[present > 0]:
        common = sum(np.count_nonzero((a == label) & (b == label)) for a, b in zip(exact, other, strict=True))
        sizes = sum(np.count_nonzero(labels == label) for labels in (*exact, *other))
        scores.append(2 * common / sizes)
    return min(scores)
