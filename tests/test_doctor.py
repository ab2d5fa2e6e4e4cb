"""`defectcam doctor` against a CVAT over real HTTP that calls the real function."""

import copy
import json
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace

import pytest

from defectcam import __main__
from defectcam.cvat import doctor
from defectcam.cvat_answers import Label
from defectcam.cvat_labels import COLOURS, labels_with, task_labels
from tests.conftest import DATA, dark_wall, running_function, tiny_weights
from tests.cvat_state import ACCESS_TOKEN, KEY, CvatState, serving

SPEC = labels_with([])
LABELS = [label | {"color": colour} for label, colour in zip(task_labels(SPEC), COLOURS)]
for attribute in (attribute for label in LABELS for attribute in label["attributes"] if attribute["name"] == "iterations"):
    attribute["default_value"] = "0"
TOKEN_END = datetime.now(timezone.utc) + timedelta(days=3)
SPOTS = [(30, 30, 14), (100, 26, 12)]
EXCHANGES = DATA / "cvat_exchanges"
OF_TASK = ("labels", "megapixels", "request size", "a photo")
CHECKS = ("CVAT", "token", "function", "time limit", "list of models", "task", *OF_TASK, "T")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Addresses of a CVAT whose state is `now`, and of the function, which asks it for T."""
    weights, state = tiny_weights(tmp_path_factory.mktemp("weights"), ["crack", "rust"]), SimpleNamespace(now=None)
    environ = {"ADVCAM_WEIGHTS": str(weights), "ADVCAM_DEVICE": "cpu", "ADVCAM_MAX_MEGAPIXELS": "0.02"}
    environ |= {"ADVCAM_CVAT_TOKEN": KEY, "NUCLIO_FUNCTION_NAME": "advcam-defects", "ADVCAM_ITERATIONS": "0", "ADVCAM_THRESHOLD": "0"}
    with serving(lambda *asked: state.now(*asked)) as url, running_function(**environ, ADVCAM_CVAT_URL=url) as function:
        state.url, state.function = url, function
        yield state


@pytest.fixture
def make(server):
    """Function (arguments of CvatState) -> a CVAT in which all is well, and which answers from now on."""

    def cvat(is_new=True, **options):
        server.now = CvatState([dark_wall(SPOTS)[0], dark_wall(SPOTS, 100, 180)[0]], LABELS, is_new=is_new, **options)
        model = {"id": "advcam-defects", "kind": "detector", "name": "AdvCAM defects", "version": 1, "description": ""}
        server.now.functions["advcam-defects"] = model | {"labels_v2": copy.deepcopy(SPEC)}, server.function
        fixed = server.now.fixed = {}
        server.now.before = lambda method, path, query: fixed.get(f"{method} {path}")
        return server.now

    return cvat


@pytest.fixture
def run(server, capsys, monkeypatch):
    """Function (arguments) -> what each check says, and the exit status."""

    def call(*options, token=ACCESS_TOKEN, url=server.url, function=server.function):
        monkeypatch.setenv("ADVCAM_CVAT_TOKEN", token)
        monkeypatch.setattr("sys.argv", ["defectcam", "doctor", "--url", url, "--function", function, *options])
        end = 0
        try:
            __main__.main()
        except SystemExit as stopped:
            end = stopped.code
        printed = capsys.readouterr()
        assert not printed.err and token not in printed.out
        lines = [(line[:12].strip(), *line[13:].split(": ", 1)) for line in printed.out.splitlines()]
        assert [name for _, name, _ in lines] == [name for name in CHECKS if "--task" in options or name not in OF_TASK]
        return {name: (status, text) for status, name, text in lines}, end

    return call


def iterations(cvat, label):
    return next(a for a in cvat.label(label)["attributes"] if a["name"] == "iterations")


@pytest.mark.parametrize("project", [None, 3])
@pytest.mark.parametrize("is_new, token, kind", [
    (False, KEY, "a key of the login of robot; CVAT 2.15.0.dev20240702 has no personal access tokens. Never sign in"),
    (True, ACCESS_TOKEN, "a personal access token of robot, without an end"),
])  # fmt: skip
def test_all_is_well(make, run, is_new, token, kind, project):
    cvat = make(is_new, project=project)
    iterations(cvat, "rust")["default_value"] = "4"
    told, end = run("--task", "12", token=token)
    assert end == 0 and {status for status, _ in told.values()} == {"ok"}, told
    assert kind in told["token"][1] and "version 0.1.0 with weights" in told["function"][1]
    assert "photos: 2; the largest is frame 1 (1.png, 180 x 100 px)" in told["task"][1]
    assert "0.018 of 0.02" in told["megapixels"][1] and "of 256 MiB" in told["request size"][1]
    assert " of 100 s for frame 1 (1.png" in told["a photo"][1] and not told["a photo"][1].startswith("0 proposals")
    assert told["T"][1].startswith("0 for crack, 4 for rust; the largest photo takes at most about")
    changes = [(method, path) for method, path, _ in cvat.asked if method != "GET"]
    assert changes == [("POST", "/api/lambda/functions/advcam-defects")] and not cvat.shapes
    assert "/api/lambda/requests" in [path for _, path, _ in cvat.asked], "the function asked for the task's T"


def answers(path, status, body):
    """A change that lets CVAT answer so."""
    return lambda cvat: cvat.fixed.update({path: (status, body)})


def without_attribute(cvat):
    cvat.label("crack")["attributes"] = [a for a in cvat.label("crack")["attributes"] if a["name"] != "proposal"]
    cvat.label("rust")["type"] = "rectangle"


def ends(cvat):
    cvat.access_token["expiry_date"] = TOKEN_END.isoformat()


def other_function(cvat):
    cvat.functions["pth-sam"] = cvat.functions.pop("advcam-defects")
    cvat.functions["pth-sam"][0]["id"] = "pth-sam"


def old_click_tool(cvat):
    cvat.functions["advcam-click"] = {"id": "advcam-click", "kind": "interactor", "name": "AdvCAM click", "version": 1}, ""


def unseen_runs(cvat):
    cvat.user = cvat.user | {"id": 2}
    iterations(cvat, "crack")["default_value"] = "8"


TAG = {"label": "unprocessed", "type": "tag", "attributes": [{"name": "reason", "value": "too slow 130>100 s; T=1 would fit"}]}
FUNCTIONS, FUNCTION = "GET /api/lambda/functions", "POST /api/lambda/functions/advcam-defects"
NEEDS = ("a photo", "labels")  # the checks that need the list of models
FAULTS = {
    "token ends": (ends, "token", f"ends on {TOKEN_END:%Y-%m-%d}: set ADVCAM_CVAT_TOKEN", ()),
    "no serverless part": (
        answers("GET /api/server/plugins", 200, {"MODELS": False}), "list of models", "start CVAT with its serverless file", NEEDS,
    ),
    "malformed spec": (answers(FUNCTIONS, 500, "Server Error"), "list of models", "has a malformed spec: find it with curl", NEEDS),
    "no Nuclio": (answers(FUNCTIONS, 503, "refused"), "list of models", "503: refused; CVAT does not reach Nuclio: start", NEEDS),
    "a web page": (answers(FUNCTIONS, 200, "<html>CVAT"), "list of models", "a web page and no JSON ('<html>CVAT')", NEEDS),
    "no list": (answers(FUNCTIONS, 200, {}), "list of models", "answers {} (must be a valid array, not {}): is this CVAT's address?", NEEDS),
    "another name": (other_function, "list of models", "advcam-defects is not among pth-sam. Deploy it in the Nuclio", NEEDS),
    "click tool": (old_click_tool, "list of models", "'AdvCAM click' is version 1, but must be 2", ()),
    "no such task": (
        answers("GET /api/tasks/12", 404, {"detail": "Not found."}), "task", "answers 404",
        (*OF_TASK, "T"),
    ),
    "labels": (
        without_attribute, "labels", "run defectcam cvat setup task:12, which does: label 'crack': attribute 'proposal' added; "
        "defectcam cvat setup task:12 cannot repair: label 'rust' has the type rectangle, which cannot hold a polygon: rename", (),
    ),
    "time-out": (answers(FUNCTION, 504, "Read timed out. (read timeout=120)"), "a photo", "timeout=120); use fewer iterations", ()),
    "request too large": (answers(FUNCTION, 400, "400 Client Error"), "a photo", "raise maxRequestBodySize in function.yaml", ()),
    "unprocessed": (answers(FUNCTION, 200, [TAG]), "a photo", "100 s for frame 1 (1.png, 180 x 100 px): too slow 130>100 s; T=1", ()),
    "no T": (
        lambda cvat: iterations(cvat, "rust").update(default_value="many"), "T",
        "T=0 used: bad T 'many' on label rust of task 12, must be 0 to 50", (),
    ),
    "runs not seen": (unseen_runs, "T", "ask for 8 for crack, 0 for rust, but robot does not see the task's runs", ()),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_wrong_is_told_with_its_remedy_and_the_rest_is_checked(name, make, run):
    change, check, text, dependent = FAULTS[name]
    cvat = make()
    answers(FUNCTION, 200, [])(cvat)  # in place of the function's, which take longer
    change(cvat)
    told, end = run("--task", "12")
    assert end == 1 and told[check][0] == "wrong" and text in told[check][1], told[check]
    others = {other: status for other, (status, _) in told.items() if other != check}
    if name == "no T":
        assert others.pop("labels") == "wrong", "it is none of the select's values"
    assert others == {other: "not checked" if other in dependent else "ok" for other in others}, told


def test_a_function_whose_own_token_is_refused(make, run):
    cvat = make()
    answers("GET /api/lambda/requests", 401, {})(cvat)
    told, end = run("--task", "12")
    assert end == 1 and {name for name, (status, _) in told.items() if status != "ok"} == {"T"}
    assert ": T=0 used: CVAT 401: the function's token is not valid any more" in told["T"][1]
    assert "; T=0 used: CVAT 401" in told["a photo"][1], "as an annotator sees it"
    cvat.fixed.clear()
    assert run("--task", "12")[1] == 0


def test_photos_beyond_the_limits(make, run, monkeypatch):
    cvat = make()
    cvat.photos.append(dark_wall(SPOTS, 200, 200)[0])
    cvat.names.append("2.png")
    monkeypatch.setattr(doctor, "MAX_BODY_BYTES", 1 << 14)
    told, end = run("--task", "12")
    assert end == 1 and told["megapixels"][0] == told["request size"][0] == "wrong"
    assert "1 of 3 photos have more than 0.02 megapixels, such as frame 2 (2.png, 200 x 200 px)" in told["megapixels"][1]
    assert "raise it in function.yaml, and MAX_BODY_BYTES in defectcam/request.py" in told["request size"][1]
    assert told["a photo"][0] == "ok" and "frame 1 (1.png" in told["a photo"][1], "the largest that the function takes"


def test_tokens_that_do_not_last_or_may_only_read(make, run, server):
    cvat = make()
    answers(FUNCTION, 200, [])(cvat)
    told, end = run("--task", "12", token=KEY)
    assert end == 1 and "deleted when robot signs out of the web page: set ADVCAM_CVAT_TOKEN to a personal" in told["token"][1]
    answers(FUNCTION, 403, {})(cvat)
    cvat.access_token["read_only"] = True
    told, end = run("--task", "12")
    assert end == 0 and told["a photo"] == ("not checked", "the token is read-only: it suffices for T, but CVAT lets it call no function")
    told, end = run("--task", "12", token="0ld-t0ken")
    assert end == 1 and told["CVAT"] == ("ok", f"{server.url} answers; it tells its version to a valid token only")
    assert told["function"][0] == "ok" and told["list of models"] == ("not checked", "needs the token, see above")
    assert "answers 401: give a valid token (ADVCAM_CVAT_TOKEN)" in told["token"][1] and "the token has ended, or" in told["token"][1]


def test_a_cvat_or_a_function_that_is_not_there(make, run, server, monkeypatch):
    make()
    told, end = run("--task", "12", url="http://127.0.0.1:9")
    assert end == 1 and told["CVAT"][0] == "wrong" and "http://127.0.0.1:9 cannot be reached" in told["CVAT"][1]
    assert told["token"] == ("not checked", "needs CVAT, see above") and told["function"][0] == "ok"
    with serving(lambda *_: (302, f"{server.url}/api/server/about")) as other:
        told, end = run(url=other)
    assert end == 1 and told["CVAT"] == ("wrong", f"{other} sends to {server.url}: give that address as --url (or ADVCAM_CVAT_URL)")
    told, end = run(function=server.url)
    assert end == 1 and "is something else than the function" in told["function"][1] and "./deploy.sh status" in told["function"][1]
    assert told["T"] == told["time limit"] == ("not checked", "needs the function, see above")
    monkeypatch.setattr(doctor, "IN_CONTAINER", "http://127.0.0.1:9")
    told, end = run(function="")  # as without --function, where this is not the function's container
    assert end == 0 and told["function"][0] == "not checked" and "run this in the function's container" in told["function"][1]
    told, end = run()
    assert end == 0 and told["task"][0] == "not checked" and "give one with --task" in told["task"][1] and told["list of models"][0] == "ok"


@pytest.mark.skipif(not EXCHANGES.exists(), reason="no recorded exchanges (../shared/data) on this machine")
def test_the_server_of_these_tests_takes_and_gives_what_the_recorded_one_does(make):
    def recorded(number):
        (path,) = EXCHANGES.glob(f"{number}_*.json")
        return json.loads(path.read_text())

    cvat = make(False)
    models = recorded("12")["response"]["body"]
    assert set(cvat.functions["advcam-defects"][0]) == set(models[0])
    body = recorded("14")["request"]["body"]
    labels = [Label.model_validate(label) for label in recorded("08")["response"]["body"]["results"]]
    mapping = doctor.mapping_of(models[0]["labels_v2"], labels)
    assert {name: {"attributes": {}} | own for name, own in body["mapping"].items()} == mapping
    assert {"owner", "assignee", "organization", "project_id"} <= set(recorded("06")["response"]["body"])
