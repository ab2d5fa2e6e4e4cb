"""A CVAT over real HTTP that keeps state: labels, jobs, annotations with ids, pages; its answers have the recorded form.

A task can also be made: POST /api/tasks, then its photos. `is_new` gives the form of CVAT 2.73 where it differs from 2.15:
group 0 in place of null, a score, further keys. Behind a proxy it serves below a path and names hosts in its links that only
it knows.
"""

import base64
import copy
import json
import random
import re
import threading
from contextlib import contextmanager
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import cv2
import httpx
import numpy as np

from defectcam.proposals import Component
from defectcam.regions import run_lengths

KEY, ACCESS_TOKEN = "0123456789abcdef0123456789abcdef01234567", "t0ken.of-a-person"
PAGE = 2  # results of a page


class CvatState:
    """Task 12 with one photo a frame; its jobs have `job_frames` frames each, the first is job 7.

    Args:
        photos: image_rgb of each frame.
        labels: name, type, color, attributes with name, input_type, values, default_value.
        is_new: answers as CVAT 2.73.
        project: id of the project whose the task and its labels are.
        prefix: path below which a proxy serves it.
    """

    def __init__(self, photos=(), labels=(), is_new=False, project=None, prefix="", job_frames=100):
        self.photos, self.is_new, self.project, self.prefix = list(photos), is_new, project, prefix
        self.names = [f"{number}.png" for number in range(len(self.photos))]
        self.labels, self.shapes, self.next_id, self.clock = [], [], 200, 0
        for label in labels:
            self.add_label(copy.deepcopy(label))
        starts = range(0, max(len(self.photos), 1), job_frames)
        last = len(self.photos) - 1
        self.jobs = {
            7 + n: {"first": s, "last": min(s + job_frames - 1, last), "state": "new"} for n, s in enumerate(starts)
        }
        self.user = {"id": 1, "username": "robot", "is_superuser": False, "groups": ["user"]}
        self.access_token = {"name": "function", "expiry_date": None, "read_only": False}
        self.functions = {}  # id -> what the list of models says of it, and its address
        self.asked, self.headers, self.uploads = [], [], {}
        self.before = lambda method, path, query: None  # may answer in its place: (status, text)
        self.lock = threading.Lock()

    # ---- what people and runs do

    def new_id(self):
        self.next_id += 1
        return self.next_id

    def add_label(self, label):
        number = self.new_id()
        attributes = [{"mutable": False, **a, "id": self.new_id()} for a in label.get("attributes", [])]
        self.labels.append({
            "id": number, "name": label["name"], "color": label.get("color") or "#a5ecdf", "attributes": attributes,
            "type": label.get("type", "any"), "sublabels": [], "parent_id": None, "has_parent": False,
            **({"project_id": self.project} if self.project else {"task_id": 12}),
        })  # fmt: skip

    def label(self, name):
        return next(label for label in self.labels if label["name"] == name)

    def add(self, frame, label, points, kind="polygon", source="manual", **values):
        """A shape as it is stored; attributes not given have their label's defaults."""
        specs = self.label(label)["attributes"]
        shape = {
            "id": self.new_id(), "label_id": self.label(label)["id"], "type": kind, "frame": frame,
            "group": 0 if self.is_new else None, "source": source, "occluded": False, "outside": False, "z_order": 0,
            "rotation": 0.0, "points": [float(value) for value in points],
            "attributes": [{"spec_id": s["id"], "value": values.get(s["name"], s["default_value"])} for s in specs],
            "elements": [], **({"score": 1.0} if self.is_new else {}),
        }  # fmt: skip
        self.shapes.append(shape)
        return shape

    def automatic_annotation(self, frame, answer, source="auto"):
        """What a run of the function stores."""
        for element in answer:
            points = element["points"]
            if element["type"] == "mask":
                *pixels, left, top, right, bottom = element["mask"]
                points = run_lengths(Component(np.reshape(pixels, (bottom - top + 1, right - left + 1)) > 0, left, top))
            values = {a["name"]: a["value"] for a in element["attributes"]}
            self.add(frame, element["label"], points, element["type"], source, **values)

    def value(self, shape, name):
        names = {a["id"]: a["name"] for label in self.labels for a in label["attributes"]}
        return next((a["value"] for a in shape["attributes"] if names[a["spec_id"]] == name), "")

    def set_value(self, shape, name, value):
        ids = {a["id"] for label in self.labels for a in label["attributes"] if a["name"] == name}
        next(a for a in shape["attributes"] if a["spec_id"] in ids)["value"] = value

    def of(self, frame, label=None):
        """The shapes of a frame, by their proposal's name."""
        found = [s for s in self.shapes if s["frame"] == frame and label in (None, self.name_of(s))]
        return sorted(found, key=lambda shape: (self.value(shape, "proposal"), shape["id"]))

    def name_of(self, shape):
        return next(label["name"] for label in self.labels if label["id"] == shape["label_id"])

    def edit(self, shape, dx=3.0):
        """A person drags a shape in CVAT's page."""
        shape["points"] = [value + dx * (1 - n % 2) for n, value in enumerate(shape["points"])]
        shape["source"] = "semi-auto"

    def relabel(self, shape, label):
        """A person changes the label: attributes of the same names stay, and so does the source."""
        own, values = self.label(label), {a["name"]: self.value(shape, a["name"]) for a in self.label(label)["attributes"]}
        shape["label_id"] = own["id"]
        shape["attributes"] = [{"spec_id": a["id"], "value": values[a["name"]]} for a in own["attributes"]]

    # ---- REST

    def __call__(self, method, path, query, body):
        self.asked.append((method, path, query))
        if early := self.before(method, path, query):
            return early
        if method == "POST" and path.startswith("/api/lambda/functions/"):
            return self._call(path.rpartition("/")[2], body)  # the function may ask this CVAT meanwhile
        with self.lock:
            return self._answer(method, path, query, body)

    def _call(self, name, body):
        """A function's proposals for a single frame, with the labels and attributes that are mapped."""
        if name not in self.functions:
            return 404, {"detail": "Not found."}
        model, address = self.functions[name]
        if not body["mapping"] and any(label["attributes"] for label in model["labels_v2"]):
            return 500, "<h1>Server Error (500)</h1>"
        reply = httpx.post(address, json={"image": base64.b64encode(self._png(body["frame"])).decode()}, timeout=60)
        if reply.status_code != 200:
            return reply.status_code, f"{reply.status_code} Error: {reply.reason_phrase} for url: {address}"
        shapes = [shape for shape in reply.json() if shape["label"] in body["mapping"]] or reply.json()
        for shape in shapes:
            mapped = body["mapping"].get(shape["label"], {}).get("attributes", {})
            shape["attributes"] = [one for one in shape["attributes"] if one["name"] in mapped]
        return 200, shapes

    def _png(self, frame):
        return cv2.imencode(".png", cv2.cvtColor(self.photos[frame], cv2.COLOR_RGB2BGR))[1].tobytes()

    def _answer(self, method, path, query, body):
        if path == "/api/server/about":
            return 200, {"name": "CVAT", "description": "", "version": "2.73.0" if self.is_new else "2.15.0.dev20240702"}
        if path == "/api/server/plugins":
            return 200, {"ANALYTICS": False, "MODELS": True}
        if path == "/api/users/self":
            return 200, self.user
        if path.startswith("/api/auth/access_tokens") and self.is_new:
            return 200, self.access_token if path.endswith("/self") else {"count": 0, "next": None, "results": []}
        if path == "/api/lambda/functions":
            return 200, [model for model, _ in self.functions.values()]
        if path == "/api/lambda/requests":
            return 200, []
        if path == "/api/tasks/12/data":
            return 200, self._png(int(query["number"]))
        if path == "/api/labels":
            owner = "project_id" if self.project and "project_id" in query else "task_id"
            mine = str(self.project if owner == "project_id" else 12) == query[owner]
            return self._page(path, query, self.labels if mine else [])
        if method == "POST" and path in ("/api/tasks", "/api/tasks/12/data/"):
            return self._make(path, body)
        if path == "/api/requests/making":
            return 200, {"status": "finished"}
        if found := re.fullmatch(r"/api/labels/(\d+)", path):
            return 200, self._patch_label(next(label for label in self.labels if label["id"] == int(found[1])), body)
        if path in ("/api/tasks/12", f"/api/projects/{self.project}"):
            if method == "PATCH":
                if self.project and "tasks" in path:
                    return 400, ["Project tasks can't have custom labels"]
                for label in body["labels"]:
                    self.add_label(label)
            of_task = {"id": 12, "project_id": self.project, "size": len(self.photos), "organization": None}
            of_task |= {"owner": {"id": 1, "username": "robot"}, "assignee": None}
            return 200, of_task if "tasks" in path else {"id": self.project}
        if path == "/api/jobs":
            mine = query.get("task_id") == "12"
            return self._page(path, query, [self._job(number) for number in self.jobs if mine])
        if path == "/api/tasks/12/data/meta":
            return 200, self._meta()
        if found := re.fullmatch(r"/api/jobs/(\d+)(/.*|)", path):
            number, rest = int(found[1]), found[2]
            if rest == "":
                return 200, self._job(number)
            if rest == "/data/meta":
                return 200, self._meta()
            if rest == "/data":
                return 200, self._png(int(query["number"]))
            if rest == "/annotations":
                return 200, self._annotations(self.jobs[number], method, query, body)
        return 404, {"detail": "Not found."}

    def _make(self, path, body):
        """The task with its labels; its photos, one a request; at the end their order, and the only job."""
        headers = self.headers[-1]
        if path == "/api/tasks":
            for label in body["labels"]:
                self.add_label(label)
            return 201, {"id": 12}
        if "Upload-Multiple" in headers:
            for part in message_from_bytes(f"Content-Type: {headers['Content-Type']}\r\n\r\n".encode() + body).get_payload():
                if part.get_filename():
                    image = cv2.imdecode(np.frombuffer(part.get_payload(decode=True), np.uint8), cv2.IMREAD_COLOR)
                    self.uploads[part.get_filename()] = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
            return 200, None
        if "Upload-Finish" in headers:
            self.names = body["upload_file_order"]
            self.photos = [self.uploads[name] for name in self.names]
            self.jobs = {7: {"first": 0, "last": len(self.photos) - 1, "state": "new"}}
        return 202, {"rq_id": "making"}

    def _page(self, path, query, results):
        number = int(query.get("page", 1))
        more = {name: value for name, value in query.items() if name != "page"}
        link = "&".join(f"{name}={value}" for name, value in {**more, "page": number + 1}.items())
        here = results[PAGE * (number - 1) : PAGE * number]
        following = f"http://inside:8080{path}?{link}" if PAGE * number < len(results) else None
        return 200, {"count": len(results), "next": following, "previous": None, "results": copy.deepcopy(here)}

    def _patch_label(self, label, body):
        label["name"], label["color"] = body.get("name", label["name"]), body.get("color") or "#c1cec6"
        for attribute in body.get("attributes", []):
            own = next((a for a in label["attributes"] if a["id"] == attribute.get("id")), None)
            if own:
                own.update(attribute)
            else:
                label["attributes"].append({**attribute, "id": self.new_id()})
        return copy.deepcopy(label)

    def _job(self, number):
        job = self.jobs[number]
        newer = {"consensus_replicas": 0, "parent_job_id": None} if self.is_new else {}
        return {
            "url": f"http://inside:8080/api/jobs/{number}", "id": number, "task_id": 12, "project_id": self.project,
            "assignee": None, "stage": "annotation", "state": job["state"], "mode": "annotation", "type": "annotation",
            "frame_count": job["last"] - job["first"] + 1, "start_frame": job["first"], "stop_frame": job["last"],
            "created_date": "2020-01-01T00:00:00.0Z", "updated_date": f"2099-11-22T20:50:{self.clock % 60:02}.0Z", **newer,
        }  # fmt: skip

    def _meta(self):
        frames = [{"width": p.shape[1], "height": p.shape[0], "name": name} for name, p in zip(self.names, self.photos)]
        return {"size": len(frames), "start_frame": 0, "stop_frame": len(frames) - 1, "frames": frames,
                "deleted_frames": [], "included_frames": None}  # fmt: skip

    def _annotations(self, job, method, query, body):
        own = [shape for shape in self.shapes if job["first"] <= shape["frame"] <= job["last"]]
        if method == "GET":
            found = [{**shape, "attributes": shape["attributes"][::-1]} for shape in own]
            random.Random(len(self.asked)).shuffle(found)
            return {"version": 0, "tags": [], "shapes": copy.deepcopy(found), "tracks": []}
        assert set(body) == {"version", "tags", "shapes", "tracks"}
        self.clock += 1
        if query["action"] == "create":
            created = [{**shape, "id": self.new_id()} for shape in body["shapes"]]
            assert all(job["first"] <= shape["frame"] <= job["last"] and "id" not in body["shapes"][0] for shape in created)
            self.shapes += created
            return {**body, "shapes": created}
        assert query["action"] == "delete"
        assert all({"id", "type", "frame", "label_id"} <= set(shape) for shape in body["shapes"]), "it takes the full shapes"
        gone = {shape["id"] for shape in body["shapes"]}
        self.shapes = [shape for shape in self.shapes if shape["id"] not in gone]
        return body


@contextmanager
def serving(cvat, context=None):
    """URL of the CVAT; with `context` of ssl by HTTPS. `cvat` is a CvatState, or gives (status, body) as one does."""
    prefix = getattr(cvat, "prefix", "")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            parts = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            getattr(cvat, "headers", []).append(dict(self.headers))
            if self.headers["Authorization"] not in (f"Token {KEY}", f"Bearer {ACCESS_TOKEN}"):
                status, answer = 401, {"detail": "Invalid token."}
            elif not parts.path.startswith(f"{prefix}/api/"):
                status, answer = 200, "<!doctype html><html>CVAT</html>"
            else:
                path = parts.path.removeprefix(prefix)
                is_json = body and "json" in self.headers["Content-Type"]
                status, answer = cvat(self.command, path, query, json.loads(body) if is_json else body)
            content = answer if isinstance(answer, (bytes, str)) else json.dumps(answer)
            content = content.encode() if isinstance(content, str) else content
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("Location", answer)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_PATCH = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"{'https' if context else 'http'}://127.0.0.1:{server.server_port}{prefix}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
