"""Check a CVAT, the function in it and a task of it, and say what to do about what is wrong.

Run it in the function's container, which may reach another CVAT than your machine does, or none. There it takes address and
token that the function has. On another machine give the function's address, which ./deploy.sh status shows, as --function.

Every check prints a line: ok, wrong and what to do, or not checked and why. Nothing is stored in CVAT. With --task the
function proposes for the task's largest photo, as it does for "AI tools"; its log (ADVCAM_LOG_DIR) has this answer too.

Exit status: 0 if nothing is wrong, 1 if something is, 2 for a wrong command.

Example:
    docker exec nuclio-nuclio-advcam-defects python -m defectcam doctor --task 12
    export ADVCAM_CVAT_URL=http://localhost:8080 ADVCAM_CVAT_TOKEN=...
    defectcam doctor --task 12 --function http://localhost:32768
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

import httpx

from defectcam import __version__
from defectcam.command_line import command_parser
from defectcam.credentials import TOKEN, checked_url
from defectcam.cvat.client import TIMEOUT_S, CvatClient, CvatError, add_server_options, client_of
from defectcam.cvat.setup import LABEL_TYPES, Setup
from defectcam.cvat.target import Target, task_id
from defectcam.cvat_answers import About, AccessToken, Data, Label, Task, User
from defectcam.cvat_labels import NOTICE, UNPROCESSED, task_labels
from defectcam.cvat_runs import Defaults, Run, iterations_of
from defectcam.throughput import climb_passes
from defectcam.request import MAX_BODY_BYTES
from defectcam.settings import RequestError

NAME, CLICK_TOOL = "advcam-defects", "advcam-click"  # in function.yaml and interactor.yaml
IN_CONTAINER = "http://127.0.0.1:8080"  # where Nuclio's processor serves the function
CVAT_WAITS_S = 120  # CVAT_NUCLIO_DEFAULT_TIMEOUT of a CVAT as it comes, which no CVAT tells
TRAVEL_S = 20  # of an answer, which CVAT must wait beyond the function's own limit
ENDS_SOON = timedelta(days=30)
CLICK_VERSION = 2  # from which on newer versions of CVAT offer a click tool
DEPLOY_AGAIN = "run ./deploy.sh again"
LIST_REMEDIES = {
    404: "start CVAT with its serverless file; where the answer names a function, delete that one",
    500: "some function has a malformed spec: find it with curl http://localhost:8070/api/functions and delete it",
    503: "CVAT does not reach Nuclio: start CVAT with its serverless file",
    504: "CVAT does not reach Nuclio: start CVAT with its serverless file",
}
FRAME_REMEDIES = {
    400: "if the photo is large, raise maxRequestBodySize in function.yaml; otherwise the function's log says why",
    500: "the function's log says why (docker logs nuclio-nuclio-{function})",
    502: "the function's log says why (docker logs nuclio-nuclio-{function})",
    503: "CVAT does not reach the function: ./deploy.sh status; look for a firewall between CVAT's containers and the host",
    504: "use fewer iterations, a GPU, or a larger CVAT_NUCLIO_DEFAULT_TIMEOUT; a proxy before CVAT may have given up as well, "
    "which does no harm to runs over whole tasks",
}


class NotChecked(Exception):
    """A check cannot be made; the message says why."""


@dataclass(frozen=True)
class Photo:
    """A photo of a task: its frame number, name and size in px."""

    frame: int
    name: str
    width: int
    height: int

    @property
    def megapixels(self) -> float:
        return self.width * self.height / 1e6

    def __str__(self) -> str:
        return f"frame {self.frame} ({self.name}, {self.width} x {self.height} px)"


class Doctor:
    """The checks. Each returns what is right, or raises CvatError with what is wrong and what to do, or NotChecked.

    What a check finds out and later ones need is None until then.

    Args:
        client: the connection.
        function: the name under which CVAT lists the function.
        address: of the function; None for the one in its container.
        task: id of a task, None for none.
    """

    def __init__(self, client: CvatClient, function: str, address: str | None, task: int | None) -> None:
        self.client, self.function, self.address, self.task = client, function, address, task
        self.version: str | None = None  # of CVAT; "" where it is not told
        self.user: User | None = None  # whose the token is
        self.has_read_only_token = False
        self.said: dict | None = None  # what the function says of itself
        self.model: dict | None = None  # what CVAT says of the function
        self.record: Task | None = None  # of the task
        self.labels: list[Label] | None = None  # of the task
        self.photos: list[Photo] | None = None  # of the task, the largest first
        self.photo_s: float | None = None  # that the largest photo took

    def run(self) -> Iterator[tuple[str, str]]:
        """(ok, wrong or not checked; what was checked and its result) of all checks, those of a task only where there is one."""
        checks = {
            "CVAT": self.check_cvat,
            "token": self.check_token,
            "function": self.check_function,
            "time limit": self.check_time_limit,
            "list of models": self.check_model,
            "task": self.check_task,
        }
        if self.task is not None:
            checks |= {
                "labels": self.check_labels,
                "megapixels": self.check_megapixels,
                "request size": self.check_request_size,
                "a photo": self.check_photo,
            }
        checks["T"] = self.check_iterations
        for name, check in checks.items():
            try:
                status, text = "ok", check()
            except CvatError as error:
                status, text = "wrong", str(error)
            except NotChecked as reason:
                status, text = "not checked", str(reason)
            yield status, f"{name}: {text}"

    def check_cvat(self) -> str:
        """CVAT answers, at this address: the function follows no redirection."""
        about = "/api/server/about"
        answer = self.client.request("GET", about)
        if answer.history:
            elsewhere = f"{answer.url.scheme}://{answer.url.netloc.decode()}"
            raise CvatError(f"{self.client.url} sends to {elsewhere}: give that address as --url (or ADVCAM_CVAT_URL)")
        if answer.status_code in (401, 403):
            self.version = ""
            return f"{self.client.url} answers; it tells its version to a valid token only"
        self.version = self.client.json(about, About).version
        return f"version {self.version} at {self.client.url}"

    def check_token(self) -> str:
        """The token is valid, and does not end by itself."""
        known(self.version, "CVAT")
        with remedies({401: "the token has ended, or its user signed out of the web page, which deletes keys of the login"}):
            self.user = self.client.json("/api/users/self", User)
        name = self.user.username
        if self.client.has_login_key:
            if self.client.request("GET", "/api/auth/access_tokens").status_code == 404:
                return (
                    f"a key of the login of {name}; CVAT {self.version} has no personal access tokens. Never sign in to its "
                    f"web page as {name}: signing out deletes the key"
                )
            raise CvatError(
                f"it is a key of the login of {name}, which is deleted when {name} signs out of the web page: set {TOKEN} to a "
                "personal access token of that user (web page: Profile, Security)"
            )
        token = self.client.json("/api/auth/access_tokens/self", AccessToken)
        self.has_read_only_token = token.read_only
        if token.expiry_date is None:
            return f"a personal access token of {name}, without an end"
        what = f"a personal access token of {name} that ends on {token.expiry_date:%Y-%m-%d}"
        if token.expiry_date - datetime.now(timezone.utc) < ENDS_SOON:
            raise CvatError(f"it is {what}: set {TOKEN} to a new one")
        return what

    def check_function(self) -> str:
        """The function answers, and is of this version."""
        said = self.ask_function()
        where, version = self.address or IN_CONTAINER, said.get("version")
        if version != __version__ or not {"weights", "device", "defects", "defaults", "limits", "cvat"} <= set(said):
            raise CvatError(f"{where} is version {version}, but this command is version {__version__}: {DEPLOY_AGAIN}")
        self.said = said
        return f"version {version} with weights {said['weights']} on {said['device']} at {where}"

    def ask_function(self) -> dict:
        """The function's answer to GET."""
        where = self.address or IN_CONTAINER
        try:  # without a proxy, as CVAT calls it
            said = httpx.get(where, timeout=TIMEOUT_S, trust_env=False).json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            said, why = None, f"{where} does not answer as the function does ({error or type(error).__name__})"
        else:
            why = f"{where} is something else than the function"
        if isinstance(said, dict) and said.get("function") == NAME:
            return said
        if self.address:
            raise CvatError(f"{why}: give the address that ./deploy.sh status shows as --function")
        raise NotChecked(f"{why}: run this in the function's container, or give the function's address as --function")

    def check_time_limit(self) -> str:
        """CVAT waits longer than the function may take."""
        limit_s = known(self.said, "the function")["limits"]["time_limit_s"]
        if limit_s + TRAVEL_S > CVAT_WAITS_S:
            raise NotChecked(
                f"the function may take {limit_s:g} s (ADVCAM_TIME_LIMIT): set CVAT_NUCLIO_DEFAULT_TIMEOUT of cvat_server and "
                f"cvat_worker_annotation to at least {limit_s + TRAVEL_S:g}; CVAT does not tell it"
            )
        return f"{limit_s:g} s (ADVCAM_TIME_LIMIT); CVAT waits {CVAT_WAITS_S} s if CVAT_NUCLIO_DEFAULT_TIMEOUT is not changed"

    def check_model(self) -> str:
        """CVAT lists the function, with a label for each of its defects."""
        known(self.user, "the token")
        if self.client.json("/api/server/plugins").get("MODELS") is False:
            raise CvatError("CVAT's web page shows no models: start CVAT with its serverless file (CVAT_SERVERLESS: 1)")
        with remedies(LIST_REMEDIES):
            models = {model.get("id"): model for model in self.client.json("/api/lambda/functions", list[dict])}
        model = models.get(self.function)
        if model is None:
            raise CvatError(
                f"{self.function} is not among {', '.join(map(str, models)) or 'them: there are none'}. Deploy it in the "
                "Nuclio namespace in which CVAT looks: ./deploy.sh --namespace; for another name set NUCLIO_FUNCTION_NAME"
            )
        if model.get("kind") != "detector" or "labels_v2" not in model:
            raise CvatError(f"{self.function} is of the kind {model.get('kind')}, but must be a detector: {DEPLOY_AGAIN}")
        self.model, labels = model, [label["name"] for label in model["labels_v2"]]
        lacking = [defect for defect in (self.said or {"defects": ()})["defects"] if defect not in labels]
        if lacking:
            raise CvatError(f"{model['name']!r} has no label for {', '.join(lacking)}: {DEPLOY_AGAIN}")
        click_tool = models.get(CLICK_TOOL)
        if click_tool and click_tool["version"] < CLICK_VERSION:
            raise CvatError(
                f"{click_tool['name']!r} is version {click_tool['version']}, but must be {CLICK_VERSION}, or newer versions of "
                f'CVAT keep its button "Interact" grey: {DEPLOY_AGAIN}'
            )
        return f"{model['name']!r} with the labels {', '.join(labels)}"

    def check_task(self) -> str:
        """The token's user may see the task, and it has photos."""
        if self.task is None:
            raise NotChecked("give one with --task, for its labels, its photos and an answer to one of them")
        known(self.user, "the token")
        place = Target("task", self.task)
        record = self.client.json(place.path, Task)
        data = self.client.json(f"{place.path}/data/meta", Data)
        photos = [
            Photo(number, frame.name, frame.width, frame.height)
            for number, frame in enumerate(data.frames)
            if number not in data.deleted_frames
        ]
        if not photos:
            raise CvatError(f"{place} has no photos: give another one")
        self.labels = self.place_of(record).labels(self.client)
        self.record, self.photos = record, sorted(photos, key=lambda photo: -photo.megapixels)
        return f"photos: {len(photos)}; the largest is {self.photos[0]}"

    def place_of(self, record: Task) -> Target:
        """Whose the labels of a task are: its own, or its project's."""
        return Target("task", record.id) if record.project_id is None else Target("project", record.project_id)

    def check_labels(self) -> str:
        """The task's labels are those that `defectcam cvat setup` would make."""
        place = self.place_of(known(self.record, "the task"))
        model = known(self.model, "the list of models")
        setup = Setup(Unchanged(self.client), place)
        setup.run(task_labels(label for label in model["labels_v2"] if label["type"] in LABEL_TYPES))
        command = f"defectcam cvat setup {place.kind}:{place.id}"
        doable = [f"run {command}, which does: {'; '.join(setup.done)}"] if setup.done else []
        others = [f"{command} cannot repair: {'; '.join(setup.left)}"] if setup.left else []
        if doable or others:
            raise CvatError("; ".join(doable + others))
        return f"those of {place} fit"

    def check_megapixels(self) -> str:
        """No photo is larger than the function takes."""
        photos = known(self.photos, "the task")
        most = known(self.said, "the function")["limits"]["max_megapixels"]
        larger = [photo for photo in photos if photo.megapixels > most]
        if larger:
            raise CvatError(
                f"{len(larger)} of {len(photos)} photos have more than {most:g} megapixels, such as {larger[0]}, and would get "
                "the tag unprocessed: set ADVCAM_MAX_MEGAPIXELS in function.yaml and deploy again, or use smaller photos"
            )
        return f"{photos[0].megapixels:.3g} of {most:g} (ADVCAM_MAX_MEGAPIXELS)"

    def check_request_size(self) -> str:
        """What CVAT sends for the largest photo is no more than Nuclio takes."""
        photo = known(self.photos, "the task")[0]
        path = f"/api/tasks/{self.task}/data?type=frame&quality=original&number={photo.frame}"
        file_bytes = len(self.client.checked("GET", path, 200).content)
        request_bytes = len('{"image": ""}') + (file_bytes + 2) // 3 * 4  # in base64
        text = f"{request_bytes / 2**20:.3g} of {MAX_BODY_BYTES >> 20} MiB (maxRequestBodySize) for {photo}"
        if request_bytes > MAX_BODY_BYTES:
            raise CvatError(f"{text}: raise it in function.yaml, and MAX_BODY_BYTES in defectcam/request.py with it")
        return text

    def check_photo(self) -> str:
        """CVAT gets an answer for the largest photo that the function takes."""
        photos, model = known(self.photos, "the task"), known(self.model, "the list of models")
        limits = self.said and self.said["limits"]
        fitting = [photo for photo in photos if not limits or photo.megapixels <= limits["max_megapixels"]]
        if not fitting:
            raise NotChecked("all photos are too large")
        photo, path = fitting[0], f"/api/lambda/functions/{self.function}"
        body = {"task": self.task, "frame": photo.frame, "mapping": mapping_of(model["labels_v2"], self.labels)}
        wait_s = (limits["time_limit_s"] if limits else CVAT_WAITS_S) + CVAT_WAITS_S
        started_s = time.monotonic()
        response = self.client.request("POST", path, json=body, timeout=wait_s)
        took_s = time.monotonic() - started_s
        if response.status_code == 403 and self.has_read_only_token:
            raise NotChecked("the token is read-only: it suffices for T, but CVAT lets it call no function")
        with remedies({status: text.format(function=self.function) for status, text in FRAME_REMEDIES.items()}):
            answer = self.client.read(path, response, list[dict])
        reasons = {shape["label"]: value_of(shape) for shape in answer if shape.get("type") == "tag"}
        took = f"{took_s:.3g}{' of {time_limit_s:g}'.format(**limits) if limits else ''} s for {photo}"
        if UNPROCESSED in reasons:
            raise CvatError(f"no proposals after {took}: {reasons[UNPROCESSED]}")
        self.photo_s = took_s
        proposals = sum(shape.get("type") != "tag" for shape in answer)
        return f"{proposals} proposals in {took}{f'; {reasons[NOTICE]}' if NOTICE in reasons else ''}"

    def check_iterations(self) -> str:
        """T of the task's labels is one, the function can ask for it, and it is not too slow."""
        known(self.said, "the function")
        cvat = self.ask_function()["cvat"]  # a single photo from CVAT has made it ask
        problem = cvat and cvat["last_problem"]
        if problem and not problem["over"] and "unknown photo" not in problem["reason"]:
            raise CvatError(f"the function asked {cvat['url']} for a task's T at {problem['until']}: {problem['reason']}")
        record = known(self.record, "the task")
        default = {defect: own["iterations"] for defect, own in self.said["defaults"].items()}
        in_force = Defaults(default)
        run = Run(self.task, iterations_of(self.labels), len(self.photos), frozenset(), range(0))
        if wrong := run.wrong(in_force):
            raise CvatError(wrong)
        wanted = {defect: own["iterations"] for defect, own in run.wanted(in_force).items() if "iterations" in own}
        steps = default | wanted
        text = ", ".join(f"{number} for {defect}" for defect, number in steps.items())
        if not wanted:
            return text
        if cvat is None:
            raise CvatError(
                f"the task's labels ask for {text}, but the function cannot see them: deploy it with ADVCAM_CVAT_URL and "
                f"{TOKEN}, or choose an entry of the list of models that has this T"
            )
        if not self.sees_runs(record):
            raise CvatError(
                f"the task's labels ask for {text}, but {self.user.username} does not see the task's runs: make that user "
                "its assignee, or an administrator"
            )
        if self.photo_s is not None:
            # As if all of the photo climbed, which takes the most: what does not climb takes as long at every T.
            passes = [(1 + climb_passes(steps[one]), 1 + climb_passes(default[one])) for one in wanted if wanted[one] != "auto"]
            most_s = self.photo_s * max([asked / measured for asked, measured in passes], default=1)
            limit_s = self.said["limits"]["time_limit_s"]
            text += f"; the largest photo takes at most about {most_s:.3g} of {limit_s:g} s"
            if most_s > limit_s:
                raise NotChecked(f"{text}: whether that is too slow shows in a run; it then gets the tag {UNPROCESSED}")
        return text

    def sees_runs(self, record: Task) -> bool:
        """Whether CVAT lists the runs of a task to the token's user, as far as its answers tell."""
        is_administrator = self.user.is_superuser or "admin" in self.user.groups
        is_theirs = self.user.id in [person.id for person in (record.owner, record.assignee) if person]
        return bool(is_administrator or is_theirs or record.organization or record.project_id)


class Unchanged:
    """A client for `Setup` that changes nothing: it then tells what it would change."""

    def __init__(self, client: CvatClient) -> None:
        self.json, self.pages = client.json, client.pages

    def patch(self, *_) -> None:
        """No change."""


@contextmanager
def remedies(by_status: Mapping[int, str]) -> Iterator[None]:
    """Add to a CvatError what to do, by the status that its message names."""
    try:
        yield
    except CvatError as error:
        found = [text for status, text in by_status.items() if f" answers {status}: " in str(error)]
        raise CvatError("; ".join([str(error), *found])) from error


def known(value, check: str):
    """What an earlier check has found out.

    Raises:
        NotChecked: it has found out nothing.
    """
    if value is None:
        raise NotChecked(f"needs {check}, see above")
    return value


def mapping_of(ours: Sequence[dict], theirs: Sequence[Label]) -> dict[str, dict]:
    """The function's labels and attributes to those of equal name of a task, as CVAT's dialog maps them."""
    by_name, mapping = {label.name: label for label in theirs}, {}
    for label in ours:
        there = by_name.get(label["name"])
        if there and there.type in LABEL_TYPES.get(label["type"], (label["type"], "any")):
            names = {attribute.name for attribute in there.attributes}
            own = [attribute["name"] for attribute in label["attributes"] if attribute["name"] in names]
            mapping[label["name"]] = {"name": label["name"], "attributes": dict(zip(own, own))}
    return mapping


def value_of(tag: dict) -> str:
    """The text of a tag's first attribute."""
    return next((attribute["value"] for attribute in tag.get("attributes", ())), "no reason, since the tag lacks the attribute")


def main(argv: Sequence[str] | None = None) -> None:
    """The command `defectcam doctor`."""
    parser = command_parser("doctor", __doc__)
    parser.add_argument("--task", type=task_id, metavar="N", help="check this task as well: labels, photos, T, an answer")
    parser.add_argument("--function", metavar="URL", help=f"the function's address (default: {IN_CONTAINER}, its container's)")
    add_server_options(parser)
    args = parser.parse_args(argv)
    try:
        address = args.function and checked_url(args.function, "--function")
        doctor = Doctor(client_of(args), os.environ.get("NUCLIO_FUNCTION_NAME") or NAME, address, args.task)
    except RequestError as error:
        parser.error(str(error))
    statuses = []
    for status, line in doctor.run():
        print(f"{status:12} {line}", flush=True)
        statuses.append(status)
    if "wrong" in statuses:
        sys.exit(1)
