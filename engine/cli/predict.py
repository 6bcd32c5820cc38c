"""`nnturbo predict`: nnU-Net's own flags, and ours."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..options import EngineOptions, ModelChoice
from .output import DONE, SOME_FAILED, say
from .predict_flags import add_flags, refuse_flags_beside_choice

if TYPE_CHECKING:
    from ..jobs.cases import CaseFiles
    from ..jobs.events import Event
    from ..jobs.job import Job
    from ..jobs.outcome import Outcome

MOST_NAMES = 10


def add_predict(commands: Any) -> None:
    """Declare nnU-Net's own flags, with nnU-Net's meaning, and ours."""
    predict = commands.add_parser(
        "predict",
        help="segment scans; takes the flags of nnUNetv2_predict and nnUNetv2_predict_from_modelfolder",
        description="Exit status: 0 all cases done, 1 some failed (named on stderr and in predictions.json), "
        "2 wrong usage or unusable model.",
    )
    add_flags(predict)
    predict.set_defaults(run=_predict)


def _predict(options: argparse.Namespace) -> int:
    _check_flags(options)  # before torch is imported, so that a wrong flag or path is answered at once
    models, choice = _models(options)
    source = _source(options.i)

    from ..errors import EngineError
    from ..jobs.report import require_packages, write_report

    if options.report:
        require_packages()
    job = _job(options)
    with contextlib.ExitStack() as stack:
        stopping = stack.enter_context(_stopping())
        try:
            outcome = _run(options, models, choice, source, job, stack)
        except KeyboardInterrupt:
            say(
                "nnturbo: interrupted; all results are kept. --continue_prediction does what is missing, and with "
                "--redo_outdated what this run would have replaced",
                error=True,
            )
            return 128 + stopping.get("signal", signal.SIGINT)
    status = _say_outcome(outcome, options.o)
    if options.report:
        try:
            write_report(job.output, job.output / "report.html")
        except EngineError as error:
            say(f"nnturbo: no report: {error}", error=True)
            return SOME_FAILED
    return status


def _check_flags(options: argparse.Namespace) -> None:
    if not 0 <= options.part_id < options.num_parts:
        raise ValueError(f"-part_id must be from 0 to -num_parts - 1, got {options.part_id} of {options.num_parts}")
    if options.redo_outdated and not options.continue_prediction:
        raise ValueError("--redo_outdated goes with --continue_prediction; without it, everything is made again")
    for flag, threads in (("-npp", options.npp), ("-nps", options.nps)):
        if threads < 0:
            raise ValueError(f"{flag} must be 0 or more, got {threads}")


def _source(given: str) -> Path:
    source = Path(given).absolute()
    if not source.exists():
        what = f"is a broken link to {os.readlink(source)}" if source.is_symlink() else "does not exist"
        raise ValueError(f"-i: {given} {what}")
    return source


def _job(options: argparse.Namespace) -> Job:
    from ..jobs.job import Job

    return Job(
        output=Path(options.o).absolute(),
        save_probabilities=options.save_probabilities,
        class_probabilities=options.class_probabilities,
        dicom_seg=options.dicom_seg,
        skip_existing=options.continue_prediction,
        redo_outdated=options.redo_outdated,
        previous_stage=Path(options.prev_stage_predictions).absolute() if options.prev_stage_predictions else None,
        readers=options.npp,
        writers=options.nps,
    )


def _run(
    options: argparse.Namespace,
    models: Sequence[str],
    choice: ModelChoice,
    source: Path,
    job: Job,
    stack: contextlib.ExitStack,
) -> Outcome:
    """Find the cases of this part, load the models, and predict."""
    from ..jobs.cases import find_cases
    from ..jobs.run import run_job

    on_event = _listeners(options, stack)

    def cases_of(file_ending: str) -> list[CaseFiles]:
        return find_cases(source, file_ending, job.output)[options.part_id :: options.num_parts]

    workers = stack.enter_context(contextlib.closing(_workers(options, models, choice, job, cases_of)))
    _check_cascade(workers.info.previous_stage, options.prev_stage_predictions)
    return run_job(workers, cases_of(workers.info.file_ending), job, on_event=on_event)


def _say_outcome(outcome: Outcome, output: str) -> int:
    for name, reason in outcome.failed.items():
        say(f"nnturbo: {name} failed: {reason}", error=True)
    if outcome.stopped is not None:
        say(
            f"nnturbo: stopped with {len(outcome.left)} cases left, since {outcome.stopped}; --continue_prediction "
            "goes on with them",
            error=True,
        )
    _say_kept(outcome.kept)
    left = f", {len(outcome.left)} left" if outcome.left else ""
    there = len(outcome.skipped) + len(outcome.kept)
    say(f"{len(outcome.done)} done, {there} already there, {len(outcome.failed)} failed{left}; results in {output}")
    return SOME_FAILED if outcome.failed or outcome.stopped is not None else DONE


def _say_kept(kept: Mapping[str, str]) -> None:
    """Name cases whose labels this job did not make and did not replace; a few names for each reason."""
    names: dict[str, list[str]] = {}
    for name, reason in kept.items():
        names.setdefault(reason, []).append(name)
    for reason, cases in names.items():
        more = f" and {len(cases) - MOST_NAMES} more" if len(cases) > MOST_NAMES else ""
        say(f"nnturbo: {len(cases)} kept as they are ({reason}): {', '.join(cases[:MOST_NAMES])}{more}", error=True)


def _workers(
    options: argparse.Namespace,
    models: Sequence[str],
    choice: ModelChoice,
    job: Job,
    cases_of: Callable[[str], list[Any]],
) -> Any:
    """Load the models in this process, in several processes, or on a cluster."""
    from ..jobs.worker import ModelArguments, local_places

    model_arguments = ModelArguments(models=tuple(models), choice=choice)
    if options.ray is not None:
        from ..jobs.ray_workers import RayWorkers

        _check_loader(options)
        return RayWorkers(
            options.ray, model_arguments, job, device=options.device, workers=options.workers, cores=options.cores
        )
    places = local_places(options.device, options.workers)
    if len(places) > 1:
        from ..jobs.job import file_ending_of

        # No more processes than cases.
        places = places[: max(1, len(cases_of(file_ending_of(models[0], model_arguments.choice))))]
    if len(places) > 1:
        from ..jobs.local_workers import LocalWorkers

        _check_loader(options)
        return LocalWorkers(model_arguments, job, places)
    from ..jobs.job import load_predictor
    from ..jobs.run import InProcess

    return InProcess(load_predictor(model_arguments.models, model_arguments.choice, places[0].device), job)


def _choice(options: argparse.Namespace) -> ModelChoice:
    """Give what the flags choose of a model."""
    return ModelChoice(
        folds=options.f,
        checkpoint=options.chk,
        configuration=options.c if options.m else None,
        backend=options.backend,
        precision=options.precision,
        tile_step_size=options.step_size,
        mirror=not options.disable_tta,
        options=EngineOptions(
            sums_on_device=not options.not_on_device,
            classifier=options.classifier or "auto",
            aggregation=options.aggregation or "foreground",
            loader=options.loader,
        ),
    )


def _check_loader(options: argparse.Namespace) -> None:
    if options.loader != "exact":
        raise ValueError(
            f"--loader {options.loader} has processes of its own that read ahead, and must know all cases before: use "
            "it with --workers 1, or use the exact loader"
        )


@contextlib.contextmanager
def _stopping() -> Iterator[dict[str, int]]:
    """Let SIGTERM, which schedulers send, end a job like Ctrl-C; gives the signal that came."""
    came: dict[str, int] = {}

    def stop(number: int, frame: object) -> None:
        came["signal"] = number
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread, where signals do not arrive either
        yield came
        return
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


def _listeners(options: argparse.Namespace, stack: contextlib.ExitStack) -> Callable[[Event], None]:
    """Make the listeners that show the progress of the job."""
    from ..jobs.progress import JsonLog, ProgressLine

    listeners: list[Callable[[Event], None]] = []
    if not options.disable_progress_bar and sys.stderr is not None:
        listeners.append(ProgressLine(sys.stderr))
    if options.log is not None:
        try:
            listeners.append(stack.enter_context(contextlib.closing(JsonLog(options.log))))
        except OSError as error:
            raise ValueError(f"--log: {options.log} cannot be written: {error.strerror or error}") from error

    def on_event(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return on_event


def _check_cascade(wanted: str | None, given: str | None) -> None:
    if wanted and not given:
        raise ValueError(
            f"this model continues from the labels of {wanted}; give their folder as -prev_stage_predictions"
        )
    if given and not Path(given).is_dir():
        raise ValueError(f"-prev_stage_predictions must be a folder, {given} is not one")


def _models(options: argparse.Namespace) -> tuple[Sequence[str], ModelChoice]:
    """Find the models, and what is chosen of them by flags or by a choice that is given as the model."""
    from ..model.choice import follow_choice

    models = _named_models(options)
    refuse_flags_beside_choice(options)
    models, choice = follow_choice(models, _choice(options))
    return [str(model) for model in models], choice


def _named_models(options: argparse.Namespace) -> list[str]:
    """Find the models of -m, or the one of -d, -tr, -p and -c, as nnU-Net does."""
    if bool(options.m) == bool(options.d):
        raise ValueError("give the model as -m FOLDER, or as -d DATASET with -c CONFIGURATION")
    if options.m:
        return options.m
    if not options.c:
        raise ValueError("-d needs -c, the configuration, such as 3d_fullres")
    results = os.environ.get("nnUNet_results")  # noqa: SIM112 - nnU-Net's own spelling
    if not results:
        raise ValueError(
            "-d looks the model up in the folder that the environment variable nnUNet_results names; "
            "set it, or give the model folder as -m"
        )
    pattern = f"Dataset{int(options.d):03d}_*" if options.d.isdecimal() else options.d
    datasets = sorted(path for path in Path(results).glob(pattern) if path.is_dir())
    if len(datasets) != 1:
        raise ValueError(
            f"-d {options.d} must name one dataset in {results}; found "
            f"{', '.join(path.name for path in datasets) or 'none'}"
        )
    return [str(datasets[0] / f"{options.tr}__{options.p}__{options.c}")]
