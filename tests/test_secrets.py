"""Nothing that a command prints, writes or starts shows a secret: the token of CVAT, the password of a database."""

import base64
import importlib
import json
import re
import threading
import traceback
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import httpx
import numpy as np
import pytest

from defectcam.__main__ import COMMANDS
from defectcam.credentials import address_from, checked_token, checked_url
from defectcam.feedback.store import StoreError, database_url, open_store, without_secrets
from defectcam.settings import SECRETS, RequestError
from tests.conftest import ROOT, running_function
from tests.test_harvest import A, Cvat, proposal, square
from tests.test_next_images import Cvat as UploadCvat
from tests.test_next_images import texture, weights_dir  # noqa: F401

MARK = "53cr37"  # in every secret here; what is printed may hold no part of one
TOKEN, PASSWORD = f"{MARK}-t0ken", f"{MARK}-pass"
BROKEN_TOKENS = [f"{MARK}\r{MARK}", f"{MARK} {MARK}", f"{MARK}\n{MARK}", f"{MARK}\x1b", f"{MARK}ä", f"{MARK}\0"]
BROKEN_PLACES = [
    f"postgresql+psycopg://user:{PASSWORD}@127.0.0.1:9/name", f"postgresql+psycopg://user@127.0.0.1:9/name?password={PASSWORD}",
    f"nosuchdatabase://user:{PASSWORD}@host/name", f"postgresql+psycopg://user:a@{PASSWORD}@host/name",
    f"postgresql+psycopg://user:a@b/{PASSWORD}@host/name", f"postgresql+psycopg://user:{PASSWORD}",
    f"postgresql:/user:{PASSWORD}@host/name", f"host=db user=me password={PASSWORD}", f"://user:{PASSWORD}@host",
    f"sqlite:////nowhere/x?password={PASSWORD}", f"mysql+pymysql://user:{PASSWORD}@127.0.0.1:9/name",
    f"postgresql+psycopg://user:{PASSWORD}@127.0.0.1:{MARK}/name",
]  # fmt: skip


def run(capfd, command: str, *arguments) -> str:
    """Everything that a command prints in this process, its message at the end and the traceback of what it raises."""
    told = ""
    try:
        importlib.import_module(COMMANDS[command][0]).main([str(argument) for argument in arguments])
    except SystemExit as end:
        told = f"exit {end.code}"
    except BaseException:
        told = traceback.format_exc()
    printed = capfd.readouterr()
    return f"{printed.out}{printed.err}{told}"


@contextmanager
def server(answer):
    """URL of a server, and the headers it got; `answer(method, path, query, headers, body)`: status, headers, JSON."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(dict(self.headers))
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            path, _, query = self.path.partition("?")
            status, headers, content = answer(self.command, path, query, self.headers, body)
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}", asked
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def repeating(status):
    """A server whose error page repeats what it was sent, as Django's does where it is being debugged."""
    return lambda method, path, query, headers, body: (status, {}, {"HTTP_AUTHORIZATION": headers["Authorization"]})


def completed_job(method, path, query, headers, body):
    photos = [("one.png", np.full((150, 200, 3), 90, np.uint8))]
    cvat = Cvat(photos)
    cvat.run(0, [proposal(A, square(10, 10))])
    status, body = cvat(method, path, dict(re.findall(r"(\w+)=(\w+)", query)))
    return status, {}, json.loads(json.dumps(body).replace("{server}", "http://x")) if not isinstance(body, bytes) else body


def upload(method, path, query, headers, body):
    headers.replace_header("Authorization", "Token 0123456789abcdef0123456789abcdef01234567")  # the one it knows
    status, content = uploads(method, path, headers, body)
    return status, {}, content


def about(method, path, query, headers, body):
    known = {"/api/server/about": {"version": "2.73.0"}, "/api/server/plugins": {}, "/api/lambda/functions": []}
    return (200, {}, known[path]) if path in known else (404, {}, {"detail": f"for {headers['Authorization']}"})


uploads = UploadCvat()


def files_with_a_secret(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and MARK.encode() in path.read_bytes()]


# ---- which commands there are ----


@pytest.fixture
def places(tmp_path, weights_dir, monkeypatch):  # noqa: F811
    """Arguments of every command that takes a token or a database; a new one must be added here."""
    monkeypatch.delenv("ADVCAM_CVAT_URL", raising=False)
    monkeypatch.setenv("ADVCAM_WEIGHTS", str(weights_dir))
    (tmp_path / "photos").mkdir()
    cv2.imwrite(str(tmp_path / "photos" / "wall.png"), texture(1, 8, (40, 48)))
    photos = tmp_path / "photos"
    return {
        "harvest": ("--snapshot", "--csv", tmp_path / "csv"),
        "adapt": ("--defect", "crack", "--weights", weights_dir, "--cvat-task", 3, "--out", tmp_path / "adapted"),
        "next-images": (photos, "--weights", weights_dir, "--cvat-task", "pier", "--out", tmp_path / "next"),
        "weak-labels": ("--photos", photos, "--out", tmp_path / "feedback"),
        "report": ("--out", tmp_path / "report.html"),
        "doctor": ("--task", "12", "--function", "http://127.0.0.1:9"),
    }


WITH_TOKEN, WITH_DATABASE = ("harvest", "adapt", "next-images", "doctor"), ("harvest", "weak-labels", "report")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_wrong_use_of_every_command(command, places, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADVCAM_CVAT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("ADVCAM_CVAT_TOKEN", BROKEN_TOKENS[0])  # the function itself does not start with it
    monkeypatch.setenv("ADVCAM_DB", BROKEN_PLACES[0])
    told = run(capfd, command, "--help")
    takes_token, takes_database = "ADVCAM_CVAT_TOKEN" in told, "ADVCAM_DB" in told
    of_function = command == "serve"  # see `test_the_function_itself`
    assert (command in WITH_TOKEN or of_function, command in WITH_DATABASE) == (takes_token, takes_database)
    assert (command in places or of_function) == (takes_token or takes_database)
    told += run(capfd, command)
    assert "usage:" in told and MARK not in told and "--token" not in told
    assert not files_with_a_secret(tmp_path)


@pytest.mark.parametrize("command", ["serve", "demo", "propose"])
def test_the_function_itself(command, places, capfd, monkeypatch, tmp_path):
    """It is told of a broken token before anything runs; `propose` needs none and ignores it."""
    monkeypatch.setenv("ADVCAM_CVAT_URL", f"http://user:{PASSWORD}@127.0.0.1:9")
    monkeypatch.setenv("ADVCAM_CVAT_TOKEN", BROKEN_TOKENS[0])
    monkeypatch.setenv("ADVCAM_DEFECTS", "crack")
    photo = tmp_path / "photos" / "wall.png"
    arguments = {"serve": (), "demo": (photo, "--out", tmp_path / "o"), "propose": (photo.parent, "--out", tmp_path / "o")}
    told = run(capfd, command, *arguments[command])
    assert MARK not in told and not files_with_a_secret(tmp_path)
    assert "proposals: " in told if command == "propose" else "ADVCAM_CVAT_URL holds a user or password" in told
    monkeypatch.setenv("ADVCAM_CVAT_URL", "http://127.0.0.1:9")
    told = run(capfd, command, *arguments[command])
    assert MARK not in told and ("ADVCAM_CVAT_TOKEN must be" in told) == (command != "propose")


def test_a_running_function_whose_token_is_refused(places, capfd, tmp_path):
    image = base64.b64encode((tmp_path / "photos" / "wall.png").read_bytes()).decode()
    with server(repeating(401)) as (url, asked):
        environ = {"ADVCAM_CVAT_URL": url, "ADVCAM_CVAT_TOKEN": f" {TOKEN}\r\n", "NUCLIO_FUNCTION_NAME": "f"}
        environ |= {"ADVCAM_DEFECTS": "crack", "ADVCAM_LOG_DIR": str(tmp_path / "log")}
        with running_function(**environ) as function:
            told = httpx.get(function).text + httpx.post(function, json={"image": image}, timeout=60).text
            told += httpx.post(function, json={"image": image, "iterations": "x"}).text
    printed = capfd.readouterr()
    told += printed.out + printed.err
    assert {headers["Authorization"] for headers in asked} == {f"Bearer {TOKEN}"}, "without the white space"
    assert "401" in told and MARK not in told and not files_with_a_secret(tmp_path)


# ---- tokens ----


@pytest.mark.parametrize("command", WITH_TOKEN)
@pytest.mark.parametrize("answer, reason", [
    (None, ""),
    (repeating(401), "answers 401: give a valid token (ADVCAM_CVAT_TOKEN)"),
    (repeating(500), "answers 500: "),
    (repeating(200), "answers "),
])  # fmt: skip
def test_commands_that_ask_cvat(command, answer, reason, places, capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("ADVCAM_CVAT_TOKEN", f"\t{TOKEN}\r\n")
    good, done = {
        "harvest": (completed_job, "new snapshots"),
        "adapt": (completed_job, "no photo of task 3 is labelled yet"),
        "next-images": (upload, "task 7"),
        "doctor": (about, "version 2.73.0"),
    }[command]
    with server(answer or good) as (url, asked):
        told = run(capfd, command, *places[command], "--url", url, *(("--db", tmp_path / "f.db") if command == "harvest" else ()))
    assert reason in told and MARK not in told and not files_with_a_secret(tmp_path)
    assert {headers["Authorization"] for headers in asked} == {f"Bearer {TOKEN}"}, "without the white space"
    if answer is None:
        assert done in told


@pytest.mark.parametrize("command", WITH_TOKEN)
def test_another_server_gets_no_token(command, places, capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("ADVCAM_CVAT_TOKEN", TOKEN)
    with server(lambda *_: (200, {}, {"results": []})) as (elsewhere, asked):
        redirected = (302, {"Location": f"{elsewhere}/api"}, {})
        with server(lambda *_: redirected) as (url, _):
            told = run(capfd, command, *places[command], "--url", url, *(("--db", tmp_path / "f.db") if command == "harvest" else ()))
    assert not any("Authorization" in headers for headers in asked)
    assert bool(asked) == (command != "next-images"), "a question is asked again there, a change is not"
    assert asked or f"it sends to {elsewhere}; give that address as --url" in told
    assert MARK not in told


@pytest.mark.parametrize("command", WITH_TOKEN)
@pytest.mark.parametrize("token", BROKEN_TOKENS)
def test_a_broken_token_is_refused_before_anything_is_asked(command, token, places, capfd, monkeypatch):
    if "\0" not in token:  # which no variable can hold
        monkeypatch.setenv("ADVCAM_CVAT_TOKEN", token)
        with server(repeating(200)) as (url, asked):
            told = run(capfd, command, *places[command], "--url", url)
        assert "ADVCAM_CVAT_TOKEN must be letters, digits and signs" in told and MARK not in told and not asked
    with pytest.raises(RequestError) as error:
        checked_token(token)
    assert MARK not in str(error.value)


@pytest.mark.parametrize("command", WITH_TOKEN)
@pytest.mark.parametrize("arguments, reason", [
    (("--url", "http://127.0.0.1:9"), "cannot be reached"),
    (("--url", "http://127.0.0.1:9", "--token", TOKEN), "give the token as ADVCAM_CVAT_TOKEN, not by --token"),
    (("--url", "http://127.0.0.1:9", f"--token={TOKEN}"), "give the token as ADVCAM_CVAT_TOKEN, not by --token"),
    (("--url", "http://127.0.0.1:9", "--tok", TOKEN), "give the token as ADVCAM_CVAT_TOKEN, not by --token"),
    (("--url", f"http://user:{PASSWORD}@127.0.0.1:9"), "--url holds a user or password"),
    (("--url", TOKEN), "--url is no address"),
    (("--url", "http://127.0.0.1:9:9"), "which is no address"),
])  # fmt: skip
def test_options_that_are_wrong(command, arguments, reason, places, capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("ADVCAM_CVAT_TOKEN", TOKEN)
    monkeypatch.setenv("ADVCAM_DB", str(tmp_path / "f.db"))
    told = run(capfd, command, *places[command], *arguments)
    assert reason in told and MARK not in told and "Traceback" not in told


def test_addresses_and_tokens():
    assert address_from({"ADVCAM_CVAT_URL": " http://cvat:8080/\r\n", "ADVCAM_CVAT_TOKEN": "abc\n"}) == ("http://cvat:8080", "abc")
    assert address_from({}) == ("", "")
    assert checked_url("https://cvat.example.org/x/", "--url") == "https://cvat.example.org/x"


# ---- databases ----


@pytest.mark.parametrize("command", WITH_DATABASE)
@pytest.mark.parametrize("place", BROKEN_PLACES)
def test_a_database_that_cannot_be_opened(command, place, places, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADVCAM_CVAT_TOKEN", TOKEN)
    url = ("--url", "http://127.0.0.1:9") if command == "harvest" else ()
    before = set(tmp_path.rglob("*"))
    refused = run(capfd, command, *places[command], *url, "--db", place)
    assert "exit 2" in refused and ("as ADVCAM_DB, not by --db" in refused or "address cannot be read" in refused)
    monkeypatch.setenv("ADVCAM_DB", place)
    told = run(capfd, command, *places[command], *url)
    assert "cannot open the database" in told or "address cannot be read" in told
    assert MARK not in refused + told and "Traceback" not in refused + told
    assert set(tmp_path.rglob("*")) == before, "no file is made of an address"


@pytest.mark.parametrize("command", ["weak-labels", "report"])
def test_a_database_without_interactions(command, places, capfd, monkeypatch, tmp_path):
    """Where it is there its name is printed, by the variable as by the option."""
    place = f"sqlite:///{tmp_path / 'f.db'}"
    open_store(place)
    monkeypatch.setenv("ADVCAM_DB", place)
    assert "f.db has no interactions" in run(capfd, "report", *places["report"])
    monkeypatch.setenv("ADVCAM_DB", str(tmp_path / "other.db"))
    assert "there is no database" in run(capfd, command, *places[command])
    assert "there is no database" not in run(capfd, command, *places[command], "--db", tmp_path / "f.db")


def test_names_of_databases_without_their_secrets():
    url = database_url(f"postgresql+psycopg://me:{PASSWORD}@db:5432/name?sslpassword={PASSWORD}")
    assert without_secrets(url) == "postgresql+psycopg://me:***@db:5432/name" and url.password == PASSWORD
    assert database_url("postgresql+psycopg://me:a%40b@db/name").password == "a@b"
    for path in ("out/feedback.db", "a%41 b?.db", "/tmp/x@y.db"):
        assert without_secrets(database_url(path)) == path == database_url(path).database


def test_a_file_of_any_name_is_the_one_that_is_opened(tmp_path):
    place = tmp_path / "a%41?b.db"
    open_store(str(place))
    assert [path.name for path in tmp_path.iterdir()] == [place.name] and open_store(str(place), make=False)


@pytest.mark.parametrize("secret", [PASSWORD, "s", "."])
def test_what_a_driver_says_of_the_password_is_not_repeated(secret, monkeypatch):
    def fail(*_):
        raise OSError(f"connection failed: password={secret}!")

    monkeypatch.setattr("defectcam.feedback.store.create_engine", fail)
    with pytest.raises(StoreError) as error:
        open_store(f"postgresql+psycopg://me:{secret}@db/name")
    assert f"={secret}!" not in str(error.value)


# ---- processes that are started ----


def test_variables_with_secrets_are_those_that_the_code_reads():
    """What looks like a secret among the variables is in SECRETS: so no process gets it that does not need it."""
    code = "".join(path.read_text() for path in [*ROOT.glob("*.py"), *(ROOT / "defectcam").rglob("*.py")])
    variables = set(re.findall(r"ADVCAM_[A-Z_]+", code))
    assert set(SECRETS) == {name for name in variables if re.search("TOKEN|PASS|SECRET|KEY|_DB$", name)}
