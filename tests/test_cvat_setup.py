"""`defectcam cvat setup` and `set-iterations` against a CVAT that keeps its labels."""

import copy
import json

import pytest

from defectcam.cvat import set_iterations, setup
from defectcam.cvat.setup import is_pale
from defectcam.cvat_labels import COLOURS, labels_with, task_labels
from tests.conftest import DATA
from tests.cvat_state import KEY, CvatState, serving

OURS = task_labels(labels_with(["crack", "spalling", "rust"]))
EXCHANGES = DATA / "cvat_exchanges"


def own(cvat, label, attribute):
    return next(a for a in cvat.label(label)["attributes"] if a["name"] == attribute)


@pytest.fixture
def run(capsys, monkeypatch, shipped_weights):
    """Function (CvatState, command, arguments) -> (what is printed, exit status)."""
    monkeypatch.setenv("ADVCAM_CVAT_TOKEN", KEY)

    def call(cvat, command, *arguments):
        with serving(cvat) as url:
            end = 0
            try:
                command.main([*map(str, arguments), "--url", url])
            except SystemExit as stopped:
                end = stopped.code
        printed = capsys.readouterr()
        return f"{printed.out}{printed.err}{end if isinstance(end, str) else ''}", end

    return call


@pytest.mark.parametrize("project", [None, 3])
@pytest.mark.parametrize("is_new", [False, True])
def test_a_task_without_labels_gets_those_of_the_function(run, project, is_new):
    cvat = CvatState(project=project, is_new=is_new)
    place = "project:3" if project else "task:12"
    told, end = run(cvat, setup, place)
    assert end == 0 and "label 'crack' added (polygon, #00dc78)" in told
    assert [label["name"] for label in cvat.labels] == ["crack", "spalling", "rust", "unprocessed", "notice"]
    assert len({label["color"] for label in cvat.labels}) == 5 and not any(is_pale(label["color"]) for label in cvat.labels)
    assert own(cvat, "rust", "iterations")["default_value"] == "2" and not own(cvat, "rust", "iterations")["mutable"]
    assert own(cvat, "crack", "confidence")["values"] == ["0", "100", "1"]
    asked = len(cvat.asked)
    assert run(cvat, setup, place) == (f"{place.replace(':', ' ')}: all labels are right already\n", 0)
    assert not [method for method, _, _ in cvat.asked[asked:] if method == "PATCH"]


def test_labels_are_repaired_and_nothing_of_others_is_lost(run):
    severity = {"name": "severity", "input_type": "select", "values": ["low", "high"], "default_value": "low"}
    labels = copy.deepcopy(OURS)
    crack, spalling, rust, *_ = labels
    crack["attributes"] = [severity, *(a for a in crack["attributes"] if a["name"] != "proposal")]
    steps = next(a for a in spalling["attributes"] if a["name"] == "iterations")
    steps.update(values=["1", "16"], default_value="99")  # which CVAT's tab Raw takes
    crack["color"], spalling["color"], rust["color"] = "#a5ecdf", "#2a44fc", COLOURS[0]
    cvat = CvatState(labels=[{"name": "beam", "color": "#c1cec6"}, *labels])
    before = {a["id"] for label in cvat.labels for a in label["attributes"]}
    told, end = run(cvat, setup, "task:12")
    assert end == 0
    assert f"label 'crack': attribute 'proposal' added, colour #a5ecdf -> {COLOURS[1]}" in told
    assert "label 'spalling': iterations has the values 2, 0, 4, 8 as well, default of iterations '99' -> '2'" in told
    assert "rust" not in told and "beam" not in told
    assert before <= {a["id"] for label in cvat.labels for a in label["attributes"]}
    assert own(cvat, "crack", "severity")["values"] == ["low", "high"] and own(cvat, "crack", "proposal")
    assert own(cvat, "spalling", "iterations")["values"] == ["1", "16", "2", "0", "4", "8"]
    assert cvat.label("spalling")["color"] == "#2a44fc" and cvat.label("beam")["color"] == "#c1cec6"


def test_what_cannot_be_repaired_is_named(run):
    labels = copy.deepcopy(OURS)
    labels[0]["type"] = "rectangle"
    next(a for a in labels[1]["attributes"] if a["name"] == "confidence").update(input_type="text", values=[""])
    cvat = CvatState(labels=labels)
    told, end = run(cvat, setup, "task:12")
    assert end == 1
    assert "label 'crack' has the type rectangle, which cannot hold a polygon: rename it in CVAT, then run" in told
    assert "attribute 'confidence' of label 'spalling' is of the type text, but must be number" in told
    assert own(cvat, "spalling", "confidence")["input_type"] == "text" and cvat.label("crack")["type"] == "rectangle"


@pytest.mark.parametrize("command, arguments", [(setup, ()), (set_iterations, (4,))])
def test_a_task_of_a_project(run, command, arguments):
    cvat = CvatState(labels=OURS, project=3)
    told, _ = run(cvat, command, "task:12", *arguments)
    assert "task 12 has the labels of project 3: give project:3, which changes all of its tasks" in told
    assert {method for method, _, _ in cvat.asked} == {"GET"}


def test_what_was_done_is_told_even_if_cvat_stops_answering(run):
    labels = copy.deepcopy(OURS)
    labels[0]["color"] = "#a5ecdf"
    cvat = CvatState(labels=labels[:2])
    cvat.before = lambda method, path, query: (502, "Bad Gateway") if (method, path) == ("PATCH", "/api/tasks/12") else None
    told, end = run(cvat, setup, "task:12")
    assert "label 'crack': colour #a5ecdf ->" in told and "answers 502: Bad Gateway" in end


@pytest.mark.parametrize("colour, pale", [
    ("#a5ecdf", True), ("#2a44fc", False), ("", True), ("red", True), ("#ffffff", True),
])  # fmt: skip
def test_pale_colours(colour, pale):
    assert is_pale(colour) == pale and not any(map(is_pale, COLOURS))


# ---- T


def test_t_of_all_defect_labels_at_once(run):
    labels = copy.deepcopy(OURS)
    next(a for a in labels[2]["attributes"] if a["name"] == "iterations")["default_value"] = "16"
    cvat = CvatState(labels=[{"name": "beam"}, *labels])
    colours = [label["color"] for label in cvat.labels]
    told, end = run(cvat, set_iterations, 12, 16)
    assert end == 0 and told.splitlines() == [
        "task 12: label 'crack': T 2 -> 16, a new value of the select",
        "task 12: label 'spalling': T 2 -> 16, a new value of the select",
        "task 12: label 'rust': T 16 -> 16, a new value of the select",
    ]
    for label in ("crack", "spalling", "rust"):
        steps = own(cvat, label, "iterations")
        assert (steps["default_value"], steps["values"]) == ("16", ["2", "0", "1", "4", "8", "16"])
        assert own(cvat, label, "proposal") and own(cvat, label, "confidence")
    assert [label["color"] for label in cvat.labels] == colours and not cvat.label("beam")["attributes"]
    told, _ = run(cvat, set_iterations, "task:12", 16)
    assert told.count("T is 16 already") == 3
    assert len([method for method, _, _ in cvat.asked if method == "PATCH"]) == 3


@pytest.mark.parametrize("steps", ["51", "-1", "x", "2.0", "auto"])
def test_no_number_of_steps(run, steps):
    told, end = run(CvatState(labels=OURS), set_iterations, "12", "--", steps) if steps == "-1" else run(
        CvatState(labels=OURS), set_iterations, "12", steps)  # fmt: skip
    assert end == 2


def test_labels_that_have_no_t(run):
    assert "no label of task 12 has the attribute iterations: make the labels with defectcam cvat setup task:12" in run(
        CvatState(labels=[{"name": "crack"}]), set_iterations, 12, 4)[1]  # fmt: skip
    labels = copy.deepcopy(OURS)
    next(a for a in labels[1]["attributes"] if a["name"] == "iterations").update(input_type="text", values=[""])
    cvat = CvatState(labels=labels)
    assert "iterations of label 'spalling' of task 12 is of the type text, but must be select" in run(
        cvat, set_iterations, 12, 4)[1]  # fmt: skip
    assert own(cvat, "crack", "iterations")["default_value"] == "2", "nothing is changed before all labels are looked at"


@pytest.mark.skipif(not EXCHANGES.exists(), reason="no recorded exchanges (../shared/data) on this machine")
def test_the_server_of_these_tests_answers_as_the_recorded_one():
    """Keys of labels, jobs, shapes and of what is sent to change them."""

    def recorded(number):
        (path,) = EXCHANGES.glob(f"{number}_*.json")
        return json.loads(path.read_text())

    cvat = CvatState(labels=OURS)
    shape = cvat.add(0, "crack", [1, 2, 3, 4, 5, 6])
    label = recorded("08")["response"]["body"]["results"][0]
    assert set(cvat.labels[0]) == set(label) and set(cvat.labels[0]["attributes"][0]) == set(label["attributes"][0])
    assert set(cvat._job(7)) <= set(recorded("09")["response"]["body"]["results"][0])
    assert set(shape) == set(recorded("19")["response"]["body"]["shapes"][0])
    assert set(recorded("36")["request"]["body"]) <= {"name", "color", "attributes"}
    for number in ("22", "23"):
        assert set(recorded(number)["request"]["body"]) == {"version", "tags", "shapes", "tracks"}
