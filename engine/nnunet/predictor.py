"""nnU-Net's predictor with nnturbo inside: the same calls, the same results, sooner and in less memory."""

# pyright: reportArgumentType=false, reportReturnType=false, reportAttributeAccessIssue=false
# nnU-Net's own annotations leave out None, and take a tuple of any length for one of a single element.

from __future__ import annotations

import copy
import inspect
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..engine import Engine
from ..errors import ModelError
from ..model.plans import Plan, parse_plan
from ..overlap import overlapped
from ..pipeline.loading import ExactLoader
from ..pipeline.sliding_window import predict_logits
from ..pipeline.steps import Prepared, Segmented, engine_errors
from ..pipeline.timing import Timings
from .cases import AnyCase, ArrayCase, Cases, FileCase, PreprocessedCase, case_of
from .engines import Settings, Source, folds_of, shared_engine
from .given import engine_around
from .results import write_results

try:
    from nnunetv2.configuration import default_num_processes
    from nnunetv2.inference import predict_from_raw_data as stock_module
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor as StockPredictor
    from nnunetv2.utilities.json_export import recursive_fix_for_json_export
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


class nnUNetPredictor(StockPredictor):  # noqa: N801  # nnU-Net's name
    """Stands in for nnU-Net's class of this name, versions 2.3 to 2.8.

    Arguments, results, files and attributes are nnU-Net's; `use_cropped_logits_resampling`, which some programs add to
    it, is taken, and has no effect: whole logits are resampled here without being kept.

    nnU-Net's own code runs, and a warning says so once, where a subclass or a caller has replaced a step of it, or has
    changed plans, and for models that nnturbo does not know. A network that a caller assigns or changes runs as it is,
    within nnturbo's sliding window.

    Raises:
        EngineError: In place of what nnU-Net raises for a scan or a model that cannot be used.
    """

    def __init__(
        self,
        tile_step_size: float = 0.5,
        use_gaussian: bool = True,
        use_mirroring: bool = True,
        perform_everything_on_device: bool = True,
        device: torch.device = torch.device("cuda"),  # noqa: B008  # as nnU-Net
        verbose: bool = False,
        verbose_preprocessing: bool = False,
        allow_tqdm: bool = True,
        *,
        perform_everything_on_gpu: bool | None = None,
    ) -> None:
        self._source: Source | None = None
        self._known: dict[str, Any] = {}  # FIELDS as they were loaded
        self._network: nn.Module | None = None
        self._parameters: Any = None
        self._as_loaded: tuple[Any, ...] | None = None  # network and parameters, when nnU-Net's own code made them
        self._is_supported = True  # whether nnturbo knows the model of the folder
        self._around: tuple[Any, Engine] | None = None
        self._stock_reasons: set[str] = set()
        super().__init__(
            tile_step_size,
            use_gaussian,
            use_mirroring,
            perform_everything_on_device if perform_everything_on_gpu is None else perform_everything_on_gpu,
            torch.device(device),
            verbose,
            verbose_preprocessing,
            allow_tqdm,
        )

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
            use_folds = self.auto_detect_available_folds(str(folder), checkpoint_name) or None
        self._forget()
        self._source = Source(folder=folder.resolve(), folds=folds_of(use_folds), checkpoint=checkpoint_name)
        try:
            model = shared_engine(self._source, self._settings()).model
        except ModelError as error:
            logger.warning("nnU-Net makes the network, which runs as it is: %s", error)
            self._is_supported = False
            self._load_network()
            return
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

    def predict_from_files(  # noqa: D102  # nnU-Net's
        self,
        list_of_lists_or_source_folder: str | list[list[str]],
        output_folder_or_list_of_truncated_output_files: str | list[str] | None,
        save_probabilities: bool = False,
        overwrite: bool = True,
        num_processes_preprocessing: int = default_num_processes,
        num_processes_segmentation_export: int = default_num_processes,
        folder_with_segs_from_prev_stage: str | None = None,
        num_parts: int = 1,
        part_id: int = 0,
        use_cropped_logits_resampling: bool = False,
    ) -> list[Any] | None:
        given = {
            "list_of_lists_or_source_folder": list_of_lists_or_source_folder,
            "output_folder_or_list_of_truncated_output_files": output_folder_or_list_of_truncated_output_files,
            "save_probabilities": save_probabilities,
            "overwrite": overwrite,
            "num_processes_preprocessing": num_processes_preprocessing,
            "num_processes_segmentation_export": num_processes_segmentation_export,
            "folder_with_segs_from_prev_stage": folder_with_segs_from_prev_stage,
            "num_parts": num_parts,
            "part_id": part_id,
        }
        return self._predict_files(given, StockPredictor.predict_from_files)

    def predict_from_files_sequential(  # noqa: D102  # nnU-Net's
        self,
        list_of_lists_or_source_folder: str | list[list[str]],
        output_folder_or_list_of_truncated_output_files: str | list[str] | None,
        save_probabilities: bool = False,
        overwrite: bool = True,
        folder_with_segs_from_prev_stage: str | None = None,
        use_cropped_logits_resampling: bool = False,
    ) -> list[Any] | None:
        given = {
            "list_of_lists_or_source_folder": list_of_lists_or_source_folder,
            "output_folder_or_list_of_truncated_output_files": output_folder_or_list_of_truncated_output_files,
            "save_probabilities": save_probabilities,
            "overwrite": overwrite,
            "folder_with_segs_from_prev_stage": folder_with_segs_from_prev_stage,
        }
        answers = self._predict_files(given, StockPredictor.predict_from_files_sequential)
        return None if answers is None else [answer for answer in answers if answer is not None]

    def _predict_files(self, given: dict[str, Any], stock: Any) -> list[Any] | None:
        """Do what both ways to predict files have in common.

        Args:
            given: Arguments, by nnU-Net's names.
            stock: nnU-Net's method.
        """
        given = {name: os.fspath(value) if isinstance(value, Path) else value for name, value in given.items()}
        parts, part = given.get("num_parts", 1), given.get("part_id", 0)
        if part >= parts:
            raise ValueError(f"part_id must be below num_parts, {parts}, got {part}; parts are counted from 0")
        output = given["output_folder_or_list_of_truncated_output_files"]
        before = given["folder_with_segs_from_prev_stage"]
        if self.configuration_manager.previous_stage_name is not None and before is None:
            raise ValueError(
                f"this model continues from the labels of {self.configuration_manager.previous_stage_name}; give their "
                "folder as folder_with_segs_from_prev_stage"
            )
        if output is not None:
            folder = output if isinstance(output, str) else os.path.dirname(output[0]) or os.curdir
            wanted = inspect.signature(stock).parameters
            self._describe(folder, {name: value for name, value in given.items() if name in wanted})
        lists, outputs, previous = self._manage_input_and_output_lists(
            given["list_of_lists_or_source_folder"], output, before, given["overwrite"], part, parts,
            given["save_probabilities"],
        )  # fmt: skip
        if not lists:
            return None
        cases = self._internal_get_data_iterator_from_lists_of_filenames(
            lists, previous, outputs, given.get("num_processes_preprocessing", 0)
        )
        return self.predict_from_data_iterator(
            cases, given["save_probabilities"], given.get("num_processes_segmentation_export", 0)
        )

    def _describe(self, folder: str, given: dict[str, Any]) -> None:
        """Leave what nnU-Net leaves beside predictions: the call, and the model's two JSON files."""
        os.makedirs(folder, exist_ok=True)
        given = copy.deepcopy(given)
        recursive_fix_for_json_export(given)
        stock_module.save_json(given, os.path.join(folder, "predict_from_raw_data_args.json"))
        stock_module.save_json(self.dataset_json, os.path.join(folder, "dataset.json"), sort_keys=False)
        stock_module.save_json(self.plans_manager.plans, os.path.join(folder, "plans.json"), sort_keys=False)

    def _internal_get_data_iterator_from_lists_of_filenames(
        self,
        input_list_of_lists: list[list[str]],
        seg_from_prev_stage_files: list[str] | None,
        output_filenames_truncated: list[str] | None,
        num_processes: int,
    ) -> Any:
        engine = self._engine()
        if engine is None:
            return super()._internal_get_data_iterator_from_lists_of_filenames(
                input_list_of_lists, seg_from_prev_stage_files, output_filenames_truncated, max(num_processes, 1)
            )
        count = len(input_list_of_lists)
        cases = [
            FileCase(files=files, previous=previous, output=output)
            for files, previous, output in zip(
                input_list_of_lists, seg_from_prev_stage_files or [None] * count,
                output_filenames_truncated or [None] * count, strict=True,
            )
        ]  # fmt: skip
        return Cases(cases, cast(ExactLoader, engine.loader), engine.model.plan, min(num_processes, 1))

    def get_data_iterator_from_raw_npy_data(  # noqa: D102  # nnU-Net's
        self,
        image_or_list_of_images: Any,
        segs_from_prev_stage_or_list_of_segs_from_prev_stage: Any,
        properties_or_list_of_properties: Any,
        truncated_ofname: Any,
        num_processes: int = 3,
    ) -> Any:
        images = _as_list(image_or_list_of_images, np.ndarray)
        previous = _as_list(segs_from_prev_stage_or_list_of_segs_from_prev_stage, np.ndarray)
        properties, outputs = _as_list(properties_or_list_of_properties, dict), _as_list(truncated_ofname, str)
        engine = self._engine()
        if engine is None:
            return super().get_data_iterator_from_raw_npy_data(
                images, previous, properties, outputs, max(num_processes, 1)
            )
        cases = [
            ArrayCase(image=image, properties=of_image, previous=labels, output=output)
            for image, of_image, labels, output in zip(
                images, properties, previous or [None] * len(images), outputs or [None] * len(images), strict=True
            )
        ]
        return Cases(cases, cast(ExactLoader, engine.loader), engine.model.plan, min(num_processes, 1))

    def predict_from_list_of_npy_arrays(  # noqa: D102  # nnU-Net's
        self,
        image_or_list_of_images: Any,
        segs_from_prev_stage_or_list_of_segs_from_prev_stage: Any,
        properties_or_list_of_properties: Any,
        truncated_ofname: Any,
        num_processes: int = 3,
        save_probabilities: bool = False,
        num_processes_segmentation_export: int = default_num_processes,
        use_cropped_logits_resampling: bool = False,
    ) -> list[Any]:
        cases = self.get_data_iterator_from_raw_npy_data(
            image_or_list_of_images, segs_from_prev_stage_or_list_of_segs_from_prev_stage,
            properties_or_list_of_properties, truncated_ofname, num_processes,
        )  # fmt: skip
        return self.predict_from_data_iterator(cases, save_probabilities, num_processes_segmentation_export)

    def predict_single_npy_array(  # noqa: D102  # nnU-Net's
        self,
        input_image: np.ndarray,
        image_properties: dict[str, Any],
        segmentation_previous_stage: np.ndarray | None = None,
        output_file_truncated: str | None = None,
        save_or_return_probabilities: bool = False,
        use_cropped_logits_resampling: bool = False,
    ) -> Any:
        if self._engine() is None:
            return super().predict_single_npy_array(
                input_image, image_properties, segmentation_previous_stage, output_file_truncated,
                save_or_return_probabilities,
            )  # fmt: skip
        case = ArrayCase(
            image=input_image, properties=image_properties, previous=segmentation_previous_stage,
            output=output_file_truncated,
        )  # fmt: skip
        (answer,) = self._predict([case], save_or_return_probabilities, readers=0, writers=0)
        return answer

    def predict_from_data_iterator(  # noqa: D102  # nnU-Net's
        self,
        data_iterator: Any,
        save_probabilities: bool = False,
        num_processes_segmentation_export: int = default_num_processes,
        use_cropped_logits_resampling: bool = False,
    ) -> list[Any]:
        if self._engine() is None or self._is_replaced("predict_logits_from_preprocessed_data"):
            return super().predict_from_data_iterator(
                data_iterator, save_probabilities, max(num_processes_segmentation_export, 1)
            )
        writers = min(num_processes_segmentation_export, 1)
        if isinstance(data_iterator, Cases):
            return self._predict(data_iterator.take(), save_probabilities, data_iterator.readers, writers)
        items = (PreprocessedCase.of_item(item) for item in data_iterator)
        return self._predict(items, save_probabilities, 0, writers)

    @torch.inference_mode()
    def predict_logits_from_preprocessed_data(self, data: Tensor) -> Tensor:  # noqa: D102  # nnU-Net's
        engine = None if self._is_replaced("predict_sliding_window_return_logits") else self._engine()
        if engine is None:
            return super().predict_logits_from_preprocessed_data(data)
        return self._logits(engine, data).cpu()

    @torch.inference_mode()
    def predict_sliding_window_return_logits(self, input_image: Tensor) -> Tensor:  # noqa: D102  # nnU-Net's
        engine = self._engine(with_all_folds=False)
        if engine is None:
            return super().predict_sliding_window_return_logits(input_image)
        return self._logits(engine, input_image)

    def _logits(self, engine: Engine, data: Tensor) -> Tensor:
        """Run the network over what is preprocessed; (K, Z, Y, X) in half precision, as nnU-Net gives them."""
        if data.ndim != 4:
            raise ValueError(f"preprocessed data must be (C, Z, Y, X), got {data.ndim} axes, {tuple(data.shape)}")
        segmenter, labels = engine.segmenter, engine.model.plan.labels
        case = case_of(torch.as_tensor(data), None, engine.model.plan).to(segmenter.placement.sums_device)
        with engine_errors(), self._progress() as progress:
            planes = predict_logits(
                case, segmenter.runner, segmenter.window, labels.num_outputs, timings=Timings(case.device),
                progress=progress,
            )  # fmt: skip
            return torch.cat([each.half() for each in planes], dim=1)

    def _predict(self, cases: Iterable[AnyCase], save_probabilities: bool, readers: int, writers: int) -> list[Any]:
        """Predict cases, the next one read and the last one written while the network runs.

        Returns:
            For each case None where it was written, else its labels (Z, Y, X) on the axes of nnU-Net's reader, with
            probabilities (K, Z, Y, X) where these are asked for.
        """
        engine = self._engine()
        assert engine is not None  # callers asked before

        def prepare(case: AnyCase) -> tuple[AnyCase, Prepared]:
            with engine_errors():
                return case, case.prepare(cast(ExactLoader, engine.loader), engine.model.plan)

        def segment(step: tuple[AnyCase, Prepared]) -> tuple[AnyCase, Segmented]:
            case, prepared = step
            with engine_errors(), self._progress() as progress:
                return case, engine.segmenter(prepared, save_probabilities, progress)

        def finish(step: tuple[AnyCase, Segmented]) -> Any:
            case, segmented = step
            segmentation = segmented.segmentation()
            if case.output is None:
                return (segmentation, segmented.probabilities) if save_probabilities else segmentation
            write_results(case, segmented, engine, self.plans_manager, self.dataset_json["file_ending"])
            return None

        prepared = overlapped(prepare, cases, threads=readers, name="nnturbo-read")
        segmented = overlapped(segment, prepared, threads=readers, name="nnturbo-compute")
        return list(overlapped(finish, segmented, threads=writers, name="nnturbo-write"))

    def _progress(self) -> Any:
        return _Progress(self.allow_tqdm)

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
        has_one_fold = len(self._source.folds or ()) == 1
        if not changed and self._is_network_untouched() and (with_all_folds or has_one_fold):
            return shared_engine(self._source, self._settings())
        return self._engine_around_network(with_all_folds)

    def _engine_around_network(self, with_all_folds: bool) -> Engine | None:
        network = self.network
        if network is None:
            raise ModelError("the predictor has no network: assign one, or call initialize_from_trained_model_folder")
        parameters = self.list_of_parameters if with_all_folds else None
        made_of = (with_all_folds, self._settings(), self.allowed_mirroring_axes, _content(self.plans_manager))
        if self._around is not None and self._around[0] == (made_of, _state(network), _versions(parameters or ())):
            return self._around[1]
        try:
            engine = self._make_engine_around(network, parameters)
        except ModelError as error:
            return self._use_stock(str(error))
        # Loading weights into the network changed its state.
        self._around = ((made_of, _state(network), _versions(parameters or ())), engine)
        return engine

    def _make_engine_around(self, network: nn.Module, parameters: Any) -> Engine:
        plan = self._plan()
        return engine_around(
            network, parameters, plan, self.allowed_mirroring_axes or (), self._settings(),
            plans=self.plans_manager.plans, dataset=self.dataset_json,
        )  # fmt: skip

    def _plan(self) -> Plan:
        plans, wanted = self.plans_manager.plans, self.configuration_manager.configuration
        for name in plans["configurations"]:
            if self.plans_manager.get_configuration(name).configuration == wanted:
                return parse_plan(plans, self.dataset_json, name)
        raise ModelError("the configuration is none of the plans'")

    def _use_stock(self, reason: str) -> None:
        """Say, once for each reason, that nnU-Net's own code runs."""
        if reason not in self._stock_reasons:
            self._stock_reasons.add(reason)
            logger.warning("nnU-Net's own code predicts, at its own speed: %s", reason)

    def _is_replaced(self, name: str) -> bool:
        original = _STOCK_STEPS.get(name) or _OWN_STEPS[name]
        return name in self.__dict__ or getattr(type(self), name) is not original

    def _forget(self) -> None:
        self._source, self._network, self._parameters, self._as_loaded = None, None, None, None
        self._known, self._is_supported, self._around = {}, True, None

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
        folds = source.folds or self.auto_detect_available_folds(str(source.folder), source.checkpoint)
        with torch.inference_mode(False):  # so that changes of weights are counted
            stock.initialize_from_trained_model_folder(str(source.folder), tuple(folds), source.checkpoint)
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


_OWN_STEPS = {
    name: nnUNetPredictor.__dict__[name]
    for name in ("predict_logits_from_preprocessed_data", "predict_sliding_window_return_logits")
}


class _Progress:
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


def _as_list(given: Any, kind: type) -> Any:
    return [given] if isinstance(given, kind) else given


def _content(value: Any) -> Any:
    """What makes two of nnU-Net's managers alike."""
    for name in ("plans", "configuration"):
        if hasattr(value, name):
            return getattr(value, name)
    return None if hasattr(value, "foreground_labels") else value


def _state(network: nn.Module) -> list[Any]:
    """Everything that somebody may have changed in a network, in a form to compare."""
    tensors = [*network.parameters(), *network.buffers()]
    modules = list(network.modules())
    return [
        *map(_version, tensors),
        *((id(module), type(module), len(module._forward_hooks), len(module._forward_pre_hooks)) for module in modules),
    ]


def _versions(parameters: Sequence[dict[str, Any]]) -> list[Any]:
    return [_version(tensor) for weights in parameters for tensor in weights.values() if torch.is_tensor(tensor)]


def _version(tensor: Tensor) -> Any:
    """What changes when a tensor does; torch does not count the changes of one made in inference mode."""
    return object() if tensor.is_inference() else (id(tensor), tensor._version)
