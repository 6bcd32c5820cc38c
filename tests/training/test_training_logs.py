"""A line per epoch: in history.csv, for TensorBoard, and for what nnU-Net logs to, under the same names."""

import csv
import sys
import types
from pathlib import Path

import pytest
from nnturbo.training.history import open_events

from tests.training.tiny import TINY, make_trainer


class Recorder:
    """Stands for nnU-Net's W&B logger, which is in the trainer's list of loggers when it is switched on."""

    def __init__(self):
        self.logged = {}

    def log(self, key, value, step):
        self.logged[key, step] = value

    def update_config(self, config):
        self.logged[("config", *config)] = config


class Events(Recorder):
    """Stands for torch's writer of events, where TensorBoard is not installed."""

    def __init__(self, folder, purge_step):
        super().__init__()
        self.folder, self.first, self.closed = Path(folder), purge_step, False

    def add_scalar(self, name, value, epoch):
        self.log(name, value, epoch)

    def flush(self):
        pass

    def close(self):
        self.closed = True


def rows(folder):
    with (Path(folder) / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_all_get_the_same_numbers(tiny, environment, without_curves, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Events))
    trainer = make_trainer(tiny, TINY)
    recorder = Recorder()
    trainer.logger.loggers.append(recorder)
    trainer.run_training()
    table = {
        (name, int(row["epoch"])): float(value)
        for row in rows(trainer.output_folder)
        for name, value in row.items()
        if name != "epoch" and value
    }
    assert {name for name, _ in table} >= {
        "train_loss",
        "class_loss",
        "learning_rate",
        "macro_f1",
        "focus_dsc",
        "score",
    }
    assert trainer.events.logged == table
    assert (trainer.events.first, trainer.events.closed) == (0, True)
    assert trainer.events.folder == Path(trainer.output_folder) / "tensorboard"
    assert {key: value for key, value in recorder.logged.items() if key in table} == table
    assert recorder.logged["config", "recipe"] == {"recipe": TINY.describe()}
    said = capsys.readouterr().out
    assert said.count(": class_loss ") == 2  # beside nnU-Net's train_loss and val_loss


def test_without_tensorboard_the_table_has_them(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert open_events(tmp_path, 0) is None
    assert "pip install 'nnturbo[tensorboard]'" in caplog.text


def test_tensorboard_reads_the_events(tmp_path):
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, value in ((0, 0.25), (2, 0.5)):  # killed in epoch 3, and gone on from the end of epoch 1
        events = open_events(tmp_path, first)
        for epoch in range(first, 4):
            events.add_scalar("score", value, epoch)
        events.close()
    accumulator = EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    assert [(event.step, event.value) for event in accumulator.Scalars("score")] == [
        (0, 0.25),
        (1, 0.25),
        (2, 0.5),
        (3, 0.5),
    ]
