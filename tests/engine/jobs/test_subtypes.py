"""Classes of cases in tables, and cases whose class is lost."""

import json
import shutil

import pytest
import torch
from nnturbo.engine import Engine, Ensemble, Volume
from nnturbo.engine.files import write_json
from nnturbo.engine.jobs.cases import find_cases
from nnturbo.engine.jobs.job import Job
from nnturbo.engine.jobs.run import predict_cases

from tests.engine.factory import (
    dataset_json,
    multi_task,
    plans_json,
    random_weights,
    smooth_scan,
    write_model,
    write_scan,
)
from tests.engine.jobs.outputs import fill_disk_at, read_records


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A model that does not say the same of all scans: its logits are centred on them."""
    folder = tmp_path_factory.mktemp("classifier") / "m"
    plans = multi_task(plans_json(), class_names=["benign", "low", "high"])
    weights = random_weights(plans, dataset_json())
    engine = Engine.load(
        write_model(folder, plans=plans, checkpoint={"network_weights": weights}), device="cpu", mirror=False
    )
    volumes = [Volume.from_array(smooth_scan((8, 14, 16), seed), (2.0, 1.5, 1.5)) for seed in range(3)]
    logits = torch.tensor([engine.predict(volume).classification.logits for volume in volumes])
    last_bias = [name for name in weights if name.startswith("head.") and name.endswith(".bias")][-1]
    weights[last_bias] -= logits.mean(0)
    write_model(folder, plans=plans, checkpoint={"network_weights": weights})
    return Engine.load(folder, device="cpu", mirror=False)


class TestSubtypes:
    def answers(self, engine, scans):
        """Rows as they must be, from predictions of their own; the cases do not all have the same class."""
        rows = {
            name: f"{name}.nii.gz,{engine.predict(scans / f'{name}_0000.nii.gz').classification.label}"
            for name in "abc"
        }
        assert len({row[-1] for row in rows.values()}) > 1
        return rows

    def rows(self, folder, name="subtype_results.csv"):
        header, *rows = (folder / name).read_text().splitlines()
        assert header == "Names,Subtype"
        return rows

    def test_every_case_has_a_row_and_a_record(self, classifier, scans, tmp_path):
        cases = find_cases(scans, ".nii.gz")[::-1]
        predict_cases(classifier, cases, Job(output=tmp_path / "out"))
        assert self.rows(tmp_path / "out") == list(self.answers(classifier, scans).values())
        for name, record in read_records(tmp_path / "out").items():
            answer = classifier.predict(scans / f"{name}_0000.nii.gz").classification
            assert record["classification"] == {
                "label": answer.label,
                "name": ("benign", "low", "high")[answer.label],
                "probabilities": dict(zip(("benign", "low", "high"), answer.probabilities, strict=True)),
                "logits": list(answer.logits),
            }

    def test_classes_that_are_numbers_are_written_as_they_are(self, scans, tmp_path):
        engine = Engine.load(
            write_model(tmp_path / "m", plans=multi_task(plans_json(), class_names=["1", "2", "7"])),
            device="cpu",
            mirror=False,
        )
        predict_cases(engine, find_cases(scans, ".nii.gz"), Job(output=tmp_path / "out"))
        names = [engine.predict(scans / f"{name}_0000.nii.gz").classification.name for name in "abc"]
        assert [row.split(",")[1] for row in self.rows(tmp_path / "out")] == names

    def test_a_model_without_classification_has_no_table(self, engine, scans, tmp_path):
        predict_cases(engine, find_cases(scans, ".nii.gz"), Job(output=tmp_path / "out"))
        assert not (tmp_path / "out" / "subtype_results.csv").exists()
        assert "classification" not in read_records(tmp_path / "out")["a"]

    def test_continuing_keeps_earlier_rows(self, classifier, scans, tmp_path):
        out, cases, rows = tmp_path / "out", find_cases(scans, ".nii.gz"), self.answers(classifier, scans)
        predict_cases(classifier, cases[:2], Job(output=out))
        assert self.rows(out) == [rows["a"], rows["b"]]
        outcome = predict_cases(classifier, cases[1:], Job(output=out, skip_existing=True))
        assert (outcome.skipped, outcome.done) == (["b"], ["c"])
        assert self.rows(out) == list(rows.values())
        (out / "subtype_results.csv").unlink()
        outcome = predict_cases(classifier, cases, Job(output=out, skip_existing=True))
        assert (outcome.skipped, outcome.done) == (["a", "b", "c"], [])
        assert self.rows(out) == list(rows.values())

    @pytest.mark.parametrize("loss", ["no records", "no record", "no class", "other classes", "no such class"])
    def test_a_result_without_its_class_is_predicted_again(self, classifier, scans, tmp_path, loss):
        out, cases = tmp_path / "out", find_cases(scans, ".nii.gz")
        predict_cases(classifier, cases, Job(output=out))
        path = out / "records" / "b.json"
        record = json.loads(path.read_text())
        if loss == "no class":
            del record["classification"]
        elif loss == "other classes":
            record["classification"]["probabilities"] = {"x": 1.0}
        elif loss == "no such class":
            record["classification"]["label"] = 3
        write_json(path, record)
        if loss == "no record":
            path.unlink()
        elif loss == "no records":
            shutil.rmtree(out / "records")
        outcome = predict_cases(classifier, cases, Job(output=out, skip_existing=True))
        rows = self.answers(classifier, scans)
        if loss in ("no record", "no records"):  # labels of unknown origin are not touched, and have no class
            lost = "b" if loss == "no record" else "abc"
            assert (outcome.done, list(outcome.kept)) == ([], list(lost))
            assert self.rows(out) == [rows[name] for name in "abc" if name not in lost]
            outcome = predict_cases(classifier, cases, Job(output=out))
        else:
            assert outcome.done == ["b"]
        assert self.rows(out) == list(rows.values())

    def test_failed_cases_have_no_row(self, classifier, scans, tmp_path):
        rows = self.answers(classifier, scans)
        (scans / "a_0000.nii.gz").write_bytes(b"")
        outcome = predict_cases(classifier, find_cases(scans, ".nii.gz"), Job(output=tmp_path / "out"))
        assert list(outcome.failed) == ["a"]
        assert self.rows(tmp_path / "out") == [rows["b"], rows["c"]]
        write_scan(scans / "a_0000.nii.gz", 0)
        again = predict_cases(
            classifier, find_cases(scans, ".nii.gz"), Job(output=tmp_path / "out", skip_existing=True)
        )
        assert again.done == ["a"]
        assert self.rows(tmp_path / "out") == list(rows.values())

    def test_a_case_whose_labels_cannot_be_written_has_no_row(self, classifier, scans, tmp_path, monkeypatch):
        rows = self.answers(classifier, scans)
        fill_disk_at(monkeypatch, "b")
        outcome = predict_cases(classifier, find_cases(scans, ".nii.gz"), Job(output=tmp_path / "out"))
        assert self.rows(tmp_path / "out") == [rows[name] for name in outcome.done]
        assert "b" not in outcome.done

    def test_the_table_is_there_from_the_start(self, classifier, scans, tmp_path):
        out, seen = tmp_path / "out", []

        def on_event(event):
            if seen or event.kind == "tiles":
                seen.append((event.kind, len(self.rows(out))))

        predict_cases(classifier, find_cases(scans, ".nii.gz"), Job(output=out), on_event=on_event)
        assert seen[0] == ("tiles", 0)
        assert len(self.rows(out)) == 3

    def test_an_ensemble_writes_its_own_answer(self, engine, classifier, scans, tmp_path):
        ensemble = Ensemble([engine, classifier])
        predict_cases(ensemble, find_cases(scans, ".nii.gz"), Job(output=tmp_path / "out"))
        assert self.rows(tmp_path / "out") == list(self.answers(ensemble, scans).values())
        assert len(read_records(tmp_path / "out")["a"]["provenance"]["models"]) == 2
