"""nnU-Net's predictor with nnturbo inside: the same calls, the same results, sooner and in less memory."""

# pyright: reportArgumentType=false, reportReturnType=false, reportAttributeAccessIssue=false
# nnU-Net's own annotations leave out None, and take a tuple of any length for one of a single element.

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..engine import Engine
from ..overlap import overlapped
from ..pipeline.loading import ExactLoader
from ..pipeline.sliding_window import predict_logits
from ..pipeline.steps import Prepared, Segmented, engine_errors
from ..pipeline.timing import Timings
from .cases import AnyCase, ArrayCase, Cases, FileCase, PreprocessedCase, case_of, lists_of_folder
from .progress import Progress
from .results import write_results
from .state import PredictorState, stock_module

from nnunetv2.configuration import default_num_processes  # isort: skip  # after what says how to install it
from nnunetv2.utilities.json_export import recursive_fix_for_json_export  # isort: skip


class nnUNetPredictor(PredictorState):  # noqa: N801  # nnU-Net's name
    """Stands in for nnU-Net's class of this name: takes the arguments of versions 2.3 to 2.8, and runs from 2.5 on.

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
        return self._predict_files(given)

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
        answers = self._predict_files(given)
        return None if answers is None else [answer for answer in answers if answer is not None]

    def _predict_files(self, given: dict[str, Any]) -> list[Any] | None:
        """Do what both ways to predict files have in common.

        Args:
            given: Arguments, by nnU-Net's names.
        """
        given = {name: os.fspath(value) if isinstance(value, Path) else value for name, value in given.items()}
        source = given["list_of_lists_or_source_folder"]
        given_lists: Any = (
            lists_of_folder(source, self.dataset_json["file_ending"]) if isinstance(source, str) else source
        )
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
            self._describe(folder, given)
        # Before 2.6 nnU-Net takes the part of the inputs alone, where outputs are a list.
        output = output[part::parts] if isinstance(output, list) else output
        lists, outputs, previous = self._manage_input_and_output_lists(
            given_lists[part::parts], output, before, given["overwrite"], 0, 1, given["save_probabilities"]
        )
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
        return Progress(self.allow_tqdm)


def _as_list(given: Any, kind: type) -> Any:
    return [given] if isinstance(given, kind) else given


nnUNetPredictor._own = {
    name: nnUNetPredictor.__dict__[name]
    for name in ("predict_logits_from_preprocessed_data", "predict_sliding_window_return_logits")
}
