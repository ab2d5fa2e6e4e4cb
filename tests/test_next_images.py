"""The order in which photos are worth labelling, and the task that is made of the first ones in a CVAT over real HTTP."""

import csv
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import replace
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import cv2
import numpy as np
import pytest

from defectcam.feedback import cvat, next_images
from defectcam.feedback.next_images import AcquisitionStats, entropy_bits, mean_of_highest, photo_paths, ranked, window_means
from defectcam.predict import Predictor
from defectcam.weights import load_weights
from tests.conftest import DATA, dark_wall, dark_weights, tiny_weights

TOKEN = "0123456789abcdef0123456789abcdef01234567"
EXCHANGES = DATA / "cvat_exchanges"


def texture(seed, grain_px, size=(96, 96)):
    """(H, W, 3) uint8 of smooth noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (size[0] // grain_px + 1, size[1] // grain_px + 1, 3), np.uint8)
    return cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)


@pytest.fixture(scope="module")
def weights_dir(tmp_path_factory):
    """Weights that are sure there is nothing on a blank photo and in doubt on texture."""
    return dark_weights(tmp_path_factory.mktemp("weights"), platt=[5.0, 3.5])


@pytest.fixture(scope="module")
def photos_dir(tmp_path_factory):
    """Four walls, three copies of the first, two blank photos, a broken one; a mask and a text that are no photos."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "pier" / "masks").mkdir(parents=True)
    for i, grain_px in enumerate((4, 8, 12, 16)):
        cv2.imwrite(str(folder / "pier" / f"wall{i}.png"), texture(i, grain_px))
    for i in range(3):
        (folder / f"copy{i}.png").write_bytes((folder / "pier" / "wall0.png").read_bytes())
    for i, grey in enumerate((128, 131)):
        cv2.imwrite(str(folder / f"blank{i}.PNG"), np.full((96, 96, 3), grey, np.uint8))
    (folder / "broken.jpg").write_bytes((folder / "copy0.png").read_bytes()[:500])
    cv2.imwrite(str(folder / "pier" / "masks" / "wall0.png"), np.zeros((96, 96), np.uint8))
    (folder / "notes.txt").write_text("nothing")
    return folder


def run(weights_dir, photos, out, *more):
    next_images.main([str(part) for part in (photos, "--weights", weights_dir, "--out", out, *more)])
    with open(out / "next_images.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def ordered(weights_dir, photos_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("next")
    return out, run(weights_dir, photos_dir, out, "--top", 3)


def stems(rows):
    return [re.sub(r".*/(.*)\..*", r"\1", row["path"]) for row in rows]


def test_photos_in_doubt_come_before_blank_ones_and_copies_last(ordered):
    _, rows = ordered
    assert [row["rank"] for row in rows] == [str(rank) for rank in range(1, 10)]
    first, copies = stems(rows)[:4], stems(rows)[-3:]
    one_of_the_copies = set(first) - {"wall1", "wall2", "wall3"}
    assert len(one_of_the_copies) == 1 and {*one_of_the_copies, *copies} == {"wall0", "copy0", "copy1", "copy2"}
    assert set(stems(rows)[4:6]) == {"blank0", "blank1"}
    for row in rows[-3:]:
        assert float(row["diversity"]) == float(row["score"]) == 0
        assert stems([{"path": row["nearest"]}])[0] in one_of_the_copies and float(row["uncertainty"]) > 0.2
    for row in rows[4:6]:
        assert float(row["uncertainty"]) < 0.1 and float(row["disagreement"]) < 0.05
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True) and (rows[0]["diversity"], rows[0]["nearest"]) == ("1.0", "")


def test_the_page_shows_the_first_ones_and_what_was_skipped(ordered):
    out, rows = ordered
    page = (out / "index.html").read_text()
    assert sorted(path.name for path in (out / "pictures").iterdir()) == ["0001.jpg", "0002.jpg", "0003.jpg"]
    assert all(page.count(f"pictures/000{rank}.jpg") == 1 and rows[rank - 1]["path"] in page for rank in (1, 2, 3))
    assert "broken.jpg: broken image" in page
    assert cv2.imread(str(out / "pictures" / "0001.jpg")).shape == (320, 640, 3)


def test_the_same_photos_give_the_same_list(ordered, weights_dir, photos_dir, tmp_path):
    out, _ = ordered
    paths = photo_paths(photos_dir)
    (tmp_path / "list.txt").write_text("\n".join([*map(str, paths), "", str(paths[0]), str(tmp_path / "gone.jpg")]))
    run(weights_dir, tmp_path / "list.txt", tmp_path / "again", "--top", 1)
    assert (tmp_path / "again" / "next_images.csv").read_text() == (out / "next_images.csv").read_text()
    assert "gone.jpg: No such file" in (tmp_path / "again" / "index.html").read_text()


def test_only_photos_are_taken_from_a_folder(photos_dir):
    found = [path.relative_to(photos_dir).as_posix() for path in photo_paths(photos_dir)]
    assert len(found) == 10 and "notes.txt" not in found and not any("masks" in name for name in found)


@pytest.mark.parametrize(
    "name, content, reason",
    [("empty", None, "no photos .*empty"), ("list.txt", b"\n \n", "lists no photos"), ("photo.jpg", b"\xff\xd8", "is no text")],
)
def test_sources_without_photos_are_named(weights_dir, tmp_path, name, content, reason):
    (tmp_path / name).mkdir() if content is None else (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit, match=reason):
        run(weights_dir, tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_entropy_and_the_mean_of_highest():
    assert entropy_bits(np.array([0.0, 0.5, 1.0, 0.25])) == pytest.approx([0, 1, 0, 0.8113], abs=1e-4)
    assert mean_of_highest(np.arange(100)) == np.mean(range(90, 100)) and mean_of_highest(np.array([[0.25]])) == 0.25


def test_windows_are_means_over_64_px_around_every_32nd_pixel():
    values = np.random.default_rng(0).random((100, 140), np.float32)
    found = window_means(values)
    assert found.shape == (4, 5)
    assert found[1, 2] == pytest.approx(values[0:64, 32:96].mean(), abs=1e-5)
    assert window_means(np.full((1, 3), 0.25, np.float32)) == pytest.approx(0.25)


def test_a_sure_network_is_not_in_doubt_and_agrees_with_itself_on_the_mirror_image(tmp_path):
    """Inside and outside of what it knows its probabilities are near 1 and 0, at the edge half of a window is either."""
    photo, _ = dark_wall([(90, 60, 40)], 128, 192)
    sure, doubtful = (
        next_images.acquisition_stats(Predictor(load_weights(dark_weights(tmp_path / name, platt=platt))), None, photo)
        for name, platt in (("sure", [20.0, 0.0]), ("doubtful", [0.5, 0.0]))
    )
    assert sure.uncertainty < 0.1 and sure.disagreement < 0.05 and doubtful.uncertainty > 0.7
    assert sure.features == pytest.approx(doubtful.features), "what is on the photo has nothing to do with it"
    assert sure.entropies.shape == (4, 6)


def test_of_several_defects_the_one_with_most_counts(tmp_path):
    weights = load_weights(tiny_weights(tmp_path, ["crack", "rust"]))

    def stats(*defects):
        some = replace(weights, configs={name: weights.configs[name] for name in defects})
        return next_images.acquisition_stats(Predictor(some), None, texture(0, 8))

    both, alone = stats("crack", "rust"), [stats("crack"), stats("rust")]
    assert alone[0].information != alone[1].information
    best = max(alone, key=lambda one: one.information)
    assert (both.defect, both.information) == (best.defect, best.information)


def test_a_wall_seen_before_comes_after_another_one_that_is_less_uncertain():
    def stats(name, information, *features):
        return AcquisitionStats(name, "crack", information, information, np.array(features, float), np.zeros((1, 1)))

    photos = [stats("a", 0.9, 0, 0), stats("a again", 0.8, 0.1, 0), stats("b", 0.5, 9, 0), stats("c", 0.0, 0, 9)]
    order = ranked(photos)
    assert [one.stats.path for one in order] == ["a", "b", "a again", "c"]
    assert [one.nearest for one in order] == [None, "a", "a", "a"]
    assert order[0].score == 0.9 and order[1].score < 0.5
    same = ranked([stats(name, 0.5, 1, 1) for name in "ab"])
    assert [(one.stats.path, one.diversity) for one in same] == [("a", 1), ("b", 0)]


# ---------------------------------------------------------------- a CVAT over HTTP


class Cvat:
    """A CVAT that takes tasks, as recorded: of the newer kind, which answers the upload with a request, or the older."""

    def __init__(self, newer=True, status="finished", bodies=None):
        self.newer, self.status = newer, status
        self.bodies = bodies or {"task": {"id": 7, "name": "x"}, "finish": {"client_files": []}}
        self.stats = 0
        self.asked, self.task, self.finish, self.files = [], None, None, {}

    def __call__(self, method, path, headers, body):
        step = next((name for name in ("Upload-Start", "Upload-Multiple", "Upload-Finish") if name in headers), "")
        self.asked.append(f"{method} {path} {step}".strip())
        if headers["Authorization"] != f"Token {TOKEN}":
            return 401, {"detail": "Invalid token."}
        if (method, path) == ("POST", "/api/tasks"):
            self.task = json.loads(body)
            return 201, self.bodies["task"]
        if step == "Upload-Start":
            return 202, None
        if step == "Upload-Multiple":
            parts = message_from_bytes(f"Content-Type: {headers['Content-Type']}\r\n\r\n".encode() + body).get_payload()
            fields = {part.get_param("name", header="content-disposition"): part for part in parts}
            assert fields.pop("image_quality").get_payload() == "70"
            for part in fields.values():
                self.files[part.get_filename()] = part.get_payload(decode=True)
            return 200, None
        if step == "Upload-Finish":
            self.finish = json.loads(body)
            return 202, {"rq_id": "action=create&target=task&id=7"} if self.newer else self.bodies["finish"]
        if path == ("/api/requests/action=create&target=task&id=7" if self.newer else "/api/tasks/7/status"):
            self.stats += 1
            status = "started" if self.stats == 1 else self.status
            return 200, {"status" if self.newer else "state": status, "message": "no image in it"}
        return 404, "<html>not found</html>"


@contextmanager
def serving(answer):
    """URL of an HTTP server around `answer(method, path, headers, body)`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            content = self.rfile.read(int(self.headers["Content-Length"] or 0))
            status, body = answer(self.command, self.path, self.headers, content)
            body = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(cvat, "EVENTS_POLL_S", 0.01)
    monkeypatch.setenv("ADVCAM_CVAT_TOKEN", TOKEN)


@pytest.fixture
def two_photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(2):
        cv2.imwrite(str(folder / f"wall{i}.png"), texture(i, 8, (40, 48)))
    return folder


def make_task(weights_dir, photos, out, server, *more):
    with serving(server) as url:
        return run(weights_dir, photos, out, "--cvat-task", "pier 3", "--url", url, *more)


@pytest.mark.parametrize("newer", [True, False])
def test_a_task_holds_the_first_photos_in_their_order(weights_dir, two_photos, tmp_path, newer, capsys):
    server = Cvat(newer, status="finished" if newer else "Finished")
    rows = make_task(weights_dir, two_photos, tmp_path / "out", server)
    names = [f"{stem}.png" for stem in stems(rows)]
    assert server.finish["upload_file_order"] == names and server.finish["sorting_method"] == "predefined"
    assert server.files == {name: (two_photos / name).read_bytes() for name in names}
    assert server.task["name"] == "pier 3"
    labels = {label["name"]: label for label in server.task["labels"]}
    assert set(labels) == {"crack", "spalling", "rust", "unprocessed", "notice"}
    assert labels["unprocessed"]["type"] == labels["notice"]["type"] == "tag"
    for attribute in (attribute for label in labels.values() for attribute in label["attributes"]):
        assert attribute["default_value"] == attribute["values"][0] and attribute["mutable"] is False
    data = "POST /api/tasks/7/data/ Upload"
    assert server.asked[:5] == ["POST /api/tasks", f"{data}-Start", *[f"{data}-Multiple"] * 2, f"{data}-Finish"]
    assert "task 7: http://127.0.0.1" in capsys.readouterr().out and server.stats == 2


@pytest.mark.skipif(not EXCHANGES.exists(), reason="no recorded exchanges (../shared/data) on this machine")
def test_requests_have_the_recorded_form(weights_dir, two_photos, tmp_path):
    def recorded(number):
        (path,) = EXCHANGES.glob(f"{number}_*.json")
        return json.loads(path.read_text())

    (task, start, _, finish, status) = (recorded(f"0{number}") for number in range(1, 6))
    server = Cvat(newer=False, status=status["response"]["body"]["state"],
                  bodies={"task": task["response"]["body"], "finish": finish["response"]["body"]})  # fmt: skip
    make_task(weights_dir, two_photos, tmp_path / "out", server, "--top", "1")
    assert server.task.keys() == task["request"]["body"].keys()
    (wanted, *_), (label, *_) = task["request"]["body"]["labels"], server.task["labels"]
    assert label.keys() == wanted.keys() and label["attributes"][0].keys() == wanted["attributes"][0].keys()
    assert server.finish.keys() - {"upload_file_order"} == finish["request"]["body"].keys()
    assert list(server.files) == server.finish["upload_file_order"] and len(server.files) == 1
    steps = (task, start, start, finish)
    assert [asked.split()[:2] for asked in server.asked[:4]] == [[s["request"]["method"], s["request"]["path"]] for s in steps]


@pytest.mark.parametrize(
    "server, reason",
    [
        (Cvat(status="failed"), "task 7 was made but not filled: .*no image in it; delete it in CVAT"),
        (lambda method, path, headers, body: (403, {}), "403: give a valid token"),
        (lambda method, path, headers, body: (400, {"name": ["too long"]}), "answers 400: .*too long"),
    ],
)
def test_what_cvat_refuses_is_said(weights_dir, two_photos, tmp_path, server, reason):
    with pytest.raises(SystemExit, match=reason):
        make_task(weights_dir, two_photos, tmp_path / "out", server)
    assert (tmp_path / "out" / "next_images.csv").exists()  # the list is not lost


def test_two_photos_of_one_name_make_no_task(weights_dir, two_photos, tmp_path):
    (two_photos / "other").mkdir()
    (two_photos / "other" / "wall0.png").write_bytes((two_photos / "wall0.png").read_bytes())
    server = Cvat()
    with pytest.raises(SystemExit, match="two of the photos are called wall0.png"):
        make_task(weights_dir, two_photos, tmp_path / "out", server)
    assert server.asked == []
    with pytest.raises(SystemExit):  # before anything is looked at
        run(weights_dir, two_photos, tmp_path / "none", "--cvat-task", "pier 3", "--url", "")
    assert not (tmp_path / "none").exists()
