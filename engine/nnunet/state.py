# pyright: reportArgumentType=false, reportReturnType=false, reportAttributeAccessIssue=false
# nnU-Net's own annotations leave out None, and take a tuple of any length for one of a single element.

"""What a predictor of nnU-Net's has loaded, what callers have changed since, and so what has to predict."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..engine import Engine
from ..errors import ModelError
from ..model.plans import Plan, parse_plan
from .engines import Settings, Source, engine_around, folds_of, shared_engine

try:
    from nnunetv2.inference import predict_from_raw_data as stock_module
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor as StockPredictor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
except ImportError as error:
    raise ImportError(
        f"nnUNetPredictor stands in for nnU-Net's class and needs nnU-Net ({error}): pip install nnunetv2; "
        "nnturbo.engine.Engine runs the same models without it"
    ) from error

logger = logging.getLogger(__name__)

FIELDS = (
    "plans_manager",
    "configuration_manager",
    "dataset_json",
    "label_manager",
    "trainer_name",
    "allowed_mirroring_axes",
)
"""What a predictor knows of its model beside the network, by nnU-Net's names."""

STEPS = (
    "_internal_maybe_mirror_and_predict",
    "_internal_get_sliding_window_slicers",
    "_internal_predict_sliding_window_return_logits",
)
"""Methods that nnturbo does not call. Where somebody has put others in their place, nnU-Net's own code runs."""

EXPORTS = ("export_prediction_from_logits", "convert_predicted_logits_to_segmentation_with_correct_shape")

_STOCK_STEPS = {name: getattr(StockPredictor, name) for name in STEPS}
_STOCK_EXPORTS = {name: getattr(stock_module, name) for name in EXPORTS}


class PredictorState(StockPredictor):
    """A predictor of nnU-Net's that notices changes, and chooses the engine that predicts as it is now."""

    _own: ClassVar[dict[str, Any]] = {}
    """Methods of nnturbo's that call each other, by name; another one in their place counts as a replaced step."""

    def __init__(self, *arguments: Any) -> None:
        self._source: Source | None = None
        self._known: dict[str, Any] = {}  # FIELDS as they were loaded
        self._network: nn.Module | None = None
        self._parameters: Any = None
        self._as_loaded: tuple[Any, ...] | None = None  # network and parameters, when nnU-Net's own code made them
        self._is_supported = True  # whether nnturbo knows the model of the folder
        self._shared: Engine | None = None  # held, so that it stays in memory for as long as this does
        self._around: tuple[Any, Engine] | None = None
        self._stock_reasons: set[str] = set()
        super().__init__(*arguments)

    @property
    def network(self) -> nn.Module | None:
        """The network as nnU-Net makes it, when somebody asks for it."""
        self._load_network()
        return self._network

    @network.setter
    def network(self, value: nn.Module | None) -> None:
        self._load_network()
        self._network = value

    @property
    def list_of_parameters(self) -> Any:
        """Weights of each fold."""
        self._load_network()
        return self._parameters

    @list_of_parameters.setter
    def list_of_parameters(self, value: Any) -> None:
        self._load_network()
        self._parameters = value

    def initialize_from_trained_model_folder(  # noqa: D102  # nnU-Net's
        self,
        model_training_output_dir: str,
        use_folds: Sequence[int | str] | int | str | None,
        checkpoint_name: str = "checkpoint_final.pth",
    ) -> None:
        folder = Path(model_training_output_dir)
        if use_folds is None:
            use_folds = self.auto_detect_available_folds(str(folder), checkpoint_name) or "all"
        self._forget()
        self._source = Source(folder=folder.resolve(), folds=folds_of(use_folds), checkpoint=checkpoint_name)
        try:
            self._shared = shared_engine(self._source, self._settings())
        except ModelError as error:
            logger.warning("nnU-Net makes the network, which runs as it is: %s", error)
            self._is_supported = False
            self._load_network()
            return
        model = self._shared.model
        plans = PlansManager(dict(model.plans))
        self.plans_manager = plans
        self.configuration_manager = plans.get_configuration(model.plan.configuration)
        self.dataset_json = dict(model.dataset)
        self.trainer_name = model.trainer
        self.allowed_mirroring_axes = tuple(model.mirror_axes) or None
        self.label_manager = plans.get_label_manager(self.dataset_json)
        self._remember()

    def manual_initialization(self, *arguments: Any, **named: Any) -> None:  # noqa: D102  # nnU-Net's
        self._forget()
        super().manual_initialization(*arguments, **named)
        self._remember()

    def _settings(self) -> Settings:
        return Settings(
            device=self.device,
            tile_step_size=self.tile_step_size,
            use_gaussian=bool(self.use_gaussian),
            use_mirroring=bool(self.use_mirroring),
            sums_on_device=bool(self.perform_everything_on_device) or self.device.type == "cpu",
        )

    def _engine(self, with_all_folds: bool = True) -> Engine | None:
        """What predicts as this predictor is now; None where nnU-Net's own code has to.

        Args:
            with_all_folds: Whether to average folds; else with the weights that the network has.
        """
        if any(map(self._is_replaced, STEPS)):
            return self._use_stock("a step of its sliding window was replaced")
        if any(getattr(stock_module, name) is not of_stock for name, of_stock in _STOCK_EXPORTS.items()):
            return self._use_stock("its export was replaced")
        if self.plans_manager is None:
            raise ModelError("the predictor has no model yet: call initialize_from_trained_model_folder first")
        if self._source is None or not self._is_supported:
            return self._engine_around_network(with_all_folds)
        changed = [name for name in FIELDS if not self._is_known(name)]
        if changed and changed != ["allowed_mirroring_axes"]:
            return self._use_stock(f"{', '.join(changed)} changed")
        has_one_fold = len(self._source.folds) == 1
        if not changed and self._is_network_untouched() and (with_all_folds or has_one_fold):
            self._shared = shared_engine(self._source, self._settings())
            return self._shared
        return self._engine_around_network(with_all_folds)

    def _engine_around_network(self, with_all_folds: bool) -> Engine | None:
        network = self.network
        if network is None:
            raise ModelError("the predictor has no network: assign one, or call initialize_from_trained_model_folder")
        if not isinstance(network, nn.Module):
            return self._use_stock(f"its network is no torch.nn.Module, but a {type(network).__name__}")
        parameters = self.list_of_parameters if with_all_folds else None
        described = (self.plans_manager.plans, self.configuration_manager.configuration, self.dataset_json)
        settings = (with_all_folds, self._settings(), self.allowed_mirroring_axes)
        if self._around is not None:
            made_of, engine = self._around
            if made_of == (settings, described, _state(network), _versions(parameters or ())):
                return engine
        try:
            engine = engine_around(
                network, parameters, self._plan(), self.allowed_mirroring_axes or (), self._settings(),
                plans=self.plans_manager.plans, dataset=self.dataset_json,
            )  # fmt: skip
        except ModelError as error:
            return self._use_stock(str(error))
        # A network that cannot be copied has other weights now; a caller may change what describes it in place.
        self._around = ((settings, copy.deepcopy(described), _state(network), _versions(parameters or ())), engine)
        return engine

    def _plan(self) -> Plan:
        plans, wanted = self.plans_manager.plans, self.configuration_manager.configuration
        fresh = PlansManager(copy.deepcopy(plans))  # the predictor's own keeps what it gave out, which may be changed
        for name in plans["configurations"]:
            if fresh.get_configuration(name).configuration == wanted:
                return parse_plan(plans, self.dataset_json, name)
        raise ModelError("the configuration is not one of the plans'")

    def _use_stock(self, reason: str) -> None:
        """Say, once for each reason, that nnU-Net's own code runs."""
        if reason not in self._stock_reasons:
            self._stock_reasons.add(reason)
            logger.warning("nnU-Net's own code predicts, at its own speed: %s", reason)

    def _is_replaced(self, name: str) -> bool:
        original = _STOCK_STEPS.get(name) or self._own[name]
        return name in self.__dict__ or getattr(type(self), name) is not original

    def _forget(self) -> None:
        self._source, self._network, self._parameters, self._as_loaded = None, None, None, None
        self._known, self._is_supported, self._shared, self._around = {}, True, None, None

    def _remember(self) -> None:
        self._known = {name: (getattr(self, name), copy.deepcopy(_content(getattr(self, name)))) for name in FIELDS}

    def _is_known(self, name: str) -> bool:
        """Whether a field is the object that was loaded, with what it had then."""
        if name not in self._known:
            return False
        was, content = self._known[name]
        value = getattr(self, name)
        return (value is was or name in ("trainer_name", "allowed_mirroring_axes")) and _content(value) == content

    def _load_network(self) -> None:
        """Let nnU-Net make its network, where somebody wants it."""
        if self._source is None or self._as_loaded is not None:
            return
        source, stock = self._source, object.__new__(StockPredictor)
        StockPredictor.__init__(stock, device=torch.device("cpu"), allow_tqdm=False)
        with torch.inference_mode(False):  # so that changes of weights are counted
            stock.initialize_from_trained_model_folder(str(source.folder), source.folds, source.checkpoint)
        self._network, self._parameters = stock.network, stock.list_of_parameters
        self._as_loaded = (stock.network, stock.list_of_parameters, _state(stock.network), _versions(self._parameters))
        if not self._known:
            for name in FIELDS:
                setattr(self, name, getattr(stock, name))
            self._remember()

    def _is_network_untouched(self) -> bool:
        if self._as_loaded is None:
            return self._source is not None
        network, parameters, state, versions = self._as_loaded
        return (
            self._network is network
            and self._parameters is parameters
            and _state(network) == state
            and _versions(parameters) == versions
        )


def _content(value: Any) -> Any:
    """What makes two of nnU-Net's managers alike."""
    for name in ("plans", "configuration"):
        if hasattr(value, name):
            return getattr(value, name)
    return None if hasattr(value, "foreground_labels") else value


def _state(network: nn.Module) -> list[Any]:
    """Everything that somebody may have changed in a network, in a form to compare."""
    tensors = [*network.parameters(), *network.buffers()]
    return [*map(_version, tensors), *map(_code, network.modules())]


def _code(module: nn.Module) -> tuple[Any, ...]:
    """What changes when somebody makes a module compute something else."""
    own = vars(module).get("forward")
    return id(module), type(module), id(own), len(module._forward_hooks), len(module._forward_pre_hooks)


def _versions(parameters: Sequence[dict[str, Any]]) -> list[Any]:
    return [_version(tensor) for weights in parameters for tensor in weights.values() if torch.is_tensor(tensor)]


def _version(tensor: Tensor) -> Any:
    """What changes when a tensor does; torch does not count the changes of one made in inference mode."""
    return object() if tensor.is_inference() else (id(tensor), tensor._version)
