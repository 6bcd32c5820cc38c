"""Quantises networks to int8, and keeps as few layers in float as the labels allow."""

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
"""Operations that only move values, so that int8 can pass through them."""

INT8_FLOOR = 0.98
"""Default of the least Dice with float32, of the label that agrees least."""

MARGIN = 0.005
"""Dice on calibration tiles must exceed the floor by this much, because other scans may agree less."""

SMOOTHING = 0.15
"""Share of a channel's range that moves from activations to weights (SmoothQuant's alpha)."""

Tiles = Sequence[np.ndarray]
Masks = list[np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A way to quantise.

    Args:
        levels_in_float: Number of the finest resolutions that stay in float; with 0, only the first and the last
            convolution stay.
        smoothed: Whether channels are first scaled to similar ranges, which costs a multiplication of activations.
    """

    levels_in_float: int
    smoothed: bool


RECIPES = (
    Recipe(levels_in_float=0, smoothed=False),
    Recipe(levels_in_float=0, smoothed=True),
    Recipe(levels_in_float=1, smoothed=True),
    Recipe(levels_in_float=2, smoothed=False),
)
"""In the order of speed, the fastest first; measured accuracy has the opposite order."""


def quantize(
    model: Any,
    tiles: Tiles,
    compiled: Callable[[Any], Callable[[np.ndarray], np.ndarray]],
    *,
    floor: float = INT8_FLOOR,
    of_regions: bool = False,
) -> Any:
    """Quantise the convolutions of an OpenVINO model to int8.

    It takes the first recipe whose labels agree well enough with float on the calibration tiles. If none does, it takes
    the one that agrees best. If the tiles show nothing to segment, it takes the last recipe.

    Args:
        model: OpenVINO model in float32, for one tile.
        tiles: Calibration tiles, (1, C, *patch) float32 each.
        compiled: Compiles a model to a function from a tile to segmentation logits (1, K, *patch).
        floor: Least Dice with float, for every label.
        of_regions: Whether logits are of regions, which may overlap, instead of background and labels.

    Returns:
        The quantised model.

    Raises:
        BackendUnavailable: Where NNCF is not installed.

    Note:
        NNCF by default also quantises norms, sums, pooling and classification heads. On tiles of a multi-task model,
        class logits then differed from float by 3.9 on average, and by 0.2 with convolutions alone.
    """
    nncf = _import_nncf()
    exact = _masks(compiled(model), tiles, of_regions)
    shown = any(masks.any() for masks in exact)
    best, best_dice = None, -1.0
    for recipe in RECIPES if shown else RECIPES[-1:]:
        quantized = _quantize_by(nncf, recipe, model, tiles)
        dice = _lowest_dice(exact, _masks(compiled(quantized), tiles, of_regions))
        logger.info("int8, %s: Dice %.4f on the calibration tiles", recipe, dice)
        if dice > best_dice:
            best, best_dice = quantized, dice
        if dice >= floor + MARGIN:
            break
    return best


def _import_nncf() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NNCF warns about versions of other packages
            import nncf
    except ImportError as error:
        raise BackendUnavailable(f"int8 needs NNCF to build ({error}): pip install 'nnturbo[openvino]'") from error
    return nncf


def _quantize_by(nncf: Any, recipe: Recipe, model: Any, tiles: Tiles) -> Any:
    """Quantise a copy of a model by one recipe."""
    with _quiet():
        return nncf.quantize(
            model.clone(),
            nncf.Dataset(list(tiles)),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(tiles),
            # NNCF smooths only for this type of model.
            model_type=nncf.ModelType.TRANSFORMER if recipe.smoothed else None,
            ignored_scope=nncf.IgnoredScope(names=_kept_in_float(model, recipe.levels_in_float)),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                # Weights of 7 bits, since sums of two products overflow 16 bits on CPUs without VNNI.
                overflow_fix=nncf.OverflowFix.ENABLE,
                smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(convolution=SMOOTHING, matmul=-1),
            ),
        )


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
    """Names of all operations that compute, except the convolutions to quantise, of which at least one remains."""
    operations = model.get_ordered_ops()
    convolutions = [node for node in operations if node.get_type_name() in CONVOLUTIONS]
    sizes = {node.get_friendly_name(): math.prod(list(node.output(0).shape)[2:]) for node in convolutions}
    names = list(sizes)
    ends = _first_convolutions(model) | _last_convolutions(model)
    finest = sorted(set(sizes.values()), reverse=True)
    # At least the coarsest level is for int8, also in shallow networks.
    kept_sizes = finest[: min(levels, len(finest) - 1)]
    kept = {name for name in names if sizes[name] in kept_sizes} | ends
    others = [node for node in operations if node.get_type_name() not in (*CONVOLUTIONS, *PASSIVE)]
    return [node.get_friendly_name() for node in others] + sorted(kept)


def _first_convolutions(model: Any) -> set[str]:
    """Names of the convolutions that read the tile, one in each fold."""

    def readers(node: Any) -> list[Any]:
        return [reader.get_node() for output in node.outputs() for reader in output.get_target_inputs()]

    return _nearest_convolutions(model.inputs, readers)


def _last_convolutions(model: Any) -> set[str]:
    """Names of the convolutions that give the segmentation logits, one in each fold."""

    def sources(node: Any) -> list[Any]:
        return [value.get_source_output().get_node() for value in node.inputs()]

    return _nearest_convolutions(model.outputs[:1], sources)


def _nearest_convolutions(ports: Sequence[Any], neighbours: Callable[[Any], list[Any]]) -> set[str]:
    found, pending = set(), [port.get_node() for port in ports]
    while pending:
        for node in neighbours(pending.pop()):
            if node.get_type_name() in CONVOLUTIONS:
                found.add(node.get_friendly_name())
            else:
                pending.append(node)
    return found


def _masks(run: Callable[[np.ndarray], np.ndarray], tiles: Tiles, of_regions: bool) -> Masks:
    """Masks of all labels or regions except the background, (labels, *patch) bool for each tile."""
    logits = [run(tile)[0] for tile in tiles]
    if of_regions:
        return [of_tile > 0 for of_tile in logits]
    return [
        of_tile.argmax(0) == np.arange(1, len(of_tile)).reshape(-1, *[1] * (of_tile.ndim - 1)) for of_tile in logits
    ]


def _lowest_dice(exact: Masks, other: Masks) -> float:
    """Dice of the label that agrees least, over all tiles; 1 if neither side has any label."""
    scores = [1.0]
    for label in range(len(exact[0])):
        common = sum(np.count_nonzero(a[label] & b[label]) for a, b in zip(exact, other, strict=True))
        size = sum(np.count_nonzero(masks[label]) for masks in (*exact, *other))
        scores += [2 * common / size] if size else []
    return min(scores)
