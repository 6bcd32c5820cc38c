"""The record of one case as JSON, also as other versions write it."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nnturbo.engine import Classification
from nnturbo.engine.jobs.case_record import DONE, FAILED, KEPT, WRITING, Fingerprint, Record
from nnturbo.engine.jobs.made_of import FileStamp, MadeOf

from tests.engine.factory import provenance

MADE_OF = MadeOf(models=(provenance().settings,), inputs={"a": (FileStamp("a", 1, 2),), "b": None})
ANSWER = Classification.from_logits([-1.0, 2.0], ["low", "high"])

text = st.text(max_size=8)
records = st.builds(
    Record,
    name=text,
    status=st.sampled_from([WRITING, DONE, FAILED, KEPT]),
    images=st.lists(text, max_size=3).map(tuple),
    results=st.dictionaries(text, st.builds(Fingerprint, bytes=st.integers(0), sha256=text), max_size=3),
    replaces=st.dictionaries(text, st.builds(Fingerprint, bytes=st.integers(0), sha256=text), max_size=3),
    made_of=st.none() | st.just(MADE_OF),
    error=st.none() | text.filter(bool),
    transient=st.just(False),
    kept=st.none() | text.filter(bool),
    classification=st.none() | st.just(ANSWER),
    volumes_ml=st.none() | st.just({"lesion": 0.0}),
    timings_ms=st.dictionaries(text, st.floats(0, 1e6), max_size=2),
    warnings=st.lists(text, max_size=2).map(tuple),
    provenance=st.sampled_from([(), (provenance(),), (provenance(), provenance(backend="openvino")), {"torch": "2"}]),
)


@given(record=records)
def test_a_record_comes_back_from_its_json(record):
    assert Record.from_json(json.loads(json.dumps(record.to_json()))) == record


@pytest.mark.parametrize(
    "written", [{"torch": "1.13", "gpu": "of another version"}, {"models": [{"torch": "1.13"}]}, {"models": 3}]
)
def test_what_another_version_says_of_its_models_stays_as_it_is(written):
    content = {"name": "a", "status": DONE, "provenance": written, "classification": {"label": 0}}
    record = Record.from_json(content)
    assert record.classification is None
    assert record.to_json()["provenance"] == written


def test_a_record_keeps_no_note_of_what_matters_only_while_the_job_runs():
    record = Record(name="a", status=FAILED, error="busy", transient=True)
    assert Record.from_json(record.to_json()) == replace(record, transient=False)
