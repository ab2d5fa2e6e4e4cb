"""The REST client: tokens, organisation, pages behind a proxy, certificates, and answers that are none of CVAT's."""

import re
import ssl
import subprocess

import pytest

from defectcam import __main__
from defectcam.cvat import commands
from defectcam.cvat.client import CvatClient, CvatError
from defectcam.cvat.target import Target, target, task_id
from defectcam.settings import RequestError
from tests.cvat_state import ACCESS_TOKEN, KEY, CvatState, serving

LABELS = [{"name": name} for name in ("crack", "spalling", "rust", "beam", "pier")]


@pytest.mark.parametrize("token, scheme", [(KEY, "Token"), (ACCESS_TOKEN, "Bearer"), (f" {KEY}\r\n", "Token")])
def test_both_kinds_of_tokens(token, scheme):
    cvat = CvatState(labels=LABELS)
    with serving(cvat) as url:
        assert CvatClient(url, token).json("/api/tasks/12")["id"] == 12
    assert cvat.headers[0]["Authorization"] == f"{scheme} {token.strip()}"


def test_the_organisation_is_sent_only_if_it_is_given():
    cvat = CvatState(labels=LABELS)
    with serving(cvat) as url:
        CvatClient(url, KEY).json("/api/tasks/12")
        CvatClient(url, KEY, "bridges").json("/api/tasks/12")
    assert [headers.get("X-Organization") for headers in cvat.headers] == [None, "bridges"]
    with pytest.raises(RequestError, match="--org is 'a b', but must be the organisation's short name"):
        CvatClient("http://cvat", KEY, "a b")


@pytest.mark.parametrize("prefix", ["", "/cvat", "/tools/api/cvat"])
def test_pages_are_followed_below_the_path_of_a_proxy(prefix):
    """Every link names http://inside:8080 and no path of the proxy."""
    cvat = CvatState(labels=LABELS, prefix=prefix)
    with serving(cvat) as url:
        labels = Target("task", 12).labels(CvatClient(f"{url}/", KEY))
    assert [label.name for label in labels] == ["crack", "spalling", "rust", "beam", "pier"]
    assert [query.get("page") for _, _, query in cvat.asked] == [None, "2", "3"]


@pytest.mark.parametrize("link, path", [
    ("http://inside:8080/api/events/download?rq_id=1", "/api/events/download?rq_id=1"),
    ("https://proxy/cvat/api/events/download", "/api/events/download"),
])  # fmt: skip
def test_links_of_answers(link, path):
    assert CvatClient("https://proxy/cvat", KEY).path_of(link) == path


@pytest.mark.parametrize("answer, message", [
    ((200, "<!doctype html><title>CVAT"), "answers a web page and no JSON ('<!doctype html><title>CVAT'): is this CVAT's"),
    ((200, "it works"), "answers no JSON ('it works'): is this CVAT's address?"),
    ((200, {}), "answers {} ('results' is missing): is this CVAT's address?"),
    ((200, []), "answers [] (must be an object, not []): is this CVAT's address?"),
    ((200, {"results": []}), "answers {\"results\": []} ('next' is missing): is this CVAT's address?"),
    ((200, {"results": None, "next": None}), 'answers {"results": null, "next": null} (results must be a valid array, not None): is this CVAT'),
    ((200, {"results": [KEY]}), 'answers {"results": ["..."]} (results[0] must be an object, not \'...\'): is this CVAT'),
    ((200, ""), "answers no JSON (''): is this CVAT's address?"),
    ((401, {"detail": "Invalid token."}), "answers 401: give a valid token (ADVCAM_CVAT_TOKEN) of a user who may see"),
    ((403, {}), "answers 403: give a valid token (ADVCAM_CVAT_TOKEN)"),
    ((404, {"detail": "Not found."}), 'answers 404: {"detail": "Not found."}'),
    ((500, f"Authorization: Token {KEY}"), "answers 500: Authorization: Token ..."),
    ((502, "<html>Bad Gateway"), "answers 502: <html>Bad Gateway"),
])  # fmt: skip
def test_answers_that_are_none(answer, message):
    with serving(lambda *_: answer) as url, pytest.raises(CvatError, match=re.escape(message)) as error:
        CvatClient(url, KEY).pages("/api/labels?task_id=12")
    assert f"{url}/api/labels?task_id=12" in str(error.value) and KEY not in str(error.value)


def test_a_change_is_never_sent_to_another_address():
    """As a question it would be answered there, and nothing would have been changed."""
    cvat = CvatState(labels=LABELS)
    with serving(cvat) as elsewhere, serving(lambda *_: (301, f"{elsewhere}/api/labels/1?token={KEY}")) as url:
        with pytest.raises(CvatError, match=f"answers 301: it sends to {elsewhere}; give that address as --url$"):
            CvatClient(url, KEY).patch("/api/labels/1", {})
    assert not cvat.asked


def test_a_server_that_is_not_there():
    with pytest.raises(CvatError, match=r"http://127.0.0.1:9 cannot be reached: .*; check --url \(or ADVCAM_CVAT_URL\)"):
        CvatClient("http://127.0.0.1:9", KEY).json("/api/tasks/12")


def test_a_certificate_of_its_own(tmp_path, monkeypatch):
    files = {"-keyout": tmp_path / "key.pem", "-out": tmp_path / "cert.pem"}
    options = [str(part) for pair in files.items() for part in pair]
    name = ["-subj", "/CN=cvat", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *options, *name]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no openssl")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files["-out"], files["-keyout"])
    with serving(CvatState(labels=LABELS), context) as url:
        with pytest.raises(CvatError, match="cannot be reached: its certificate is not trusted: set SSL_CERT_FILE to a PEM"):
            CvatClient(url, KEY).json("/api/tasks/12")
        monkeypatch.setenv("SSL_CERT_FILE", str(files["-out"]))
        assert CvatClient(url, KEY).json("/api/tasks/12")["id"] == 12
    (tmp_path / "broken.pem").write_text("no certificate")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "broken.pem"))
    with pytest.raises(RequestError, match="SSL_CERT_FILE is '.*broken.pem', which cannot be read as PEM"):
        CvatClient("https://127.0.0.1:9", KEY)


# ---- the command group


def run(capsys, monkeypatch, *arguments):
    """What `defectcam ...` prints, and how it ends."""
    monkeypatch.setattr("sys.argv", ["defectcam", *arguments])
    end = None
    try:
        __main__.main()
    except SystemExit as stopped:
        end = stopped.code
    printed = capsys.readouterr()
    return f"{printed.out}{printed.err}", end


def test_help(capsys, monkeypatch):
    told, end = run(capsys, monkeypatch, "cvat", "--help")
    assert end is None and "example:\n  defectcam cvat annotate 7" in told
    for command in commands.COMMANDS:
        assert f"  {command} " in told
        own, end = run(capsys, monkeypatch, "cvat", command, "--help")
        assert not end and f"usage: defectcam cvat {command}" in own and f"\n    defectcam cvat {command} " in own
    assert "usage: defectcam cvat" in run(capsys, monkeypatch, "cvat")[1]
    assert "unknown command 'label'" in run(capsys, monkeypatch, "cvat", "label")[1]


@pytest.mark.parametrize("arguments", [("annotate", "7", "--iterations", "4"), ("setup", "7"), ("set-iterations", "7", "4")])
@pytest.mark.parametrize("token, options, reason", [
    ("53cr37 x", ("--url", "http://127.0.0.1:9"), "ADVCAM_CVAT_TOKEN must be letters"),
    ("53cr37", ("--url", "http://127.0.0.1:9", "--token", "53cr37"), "not by --token"),
    ("53cr37", (), "give --url (or ADVCAM_CVAT_URL), and a token as ADVCAM_CVAT_TOKEN"),
    ("53cr37", ("--url", "http://me:53cr37@cvat"), "--url holds a user or password"),
])  # fmt: skip
def test_no_command_shows_a_secret(arguments, token, options, reason, capsys, monkeypatch):
    monkeypatch.delenv("ADVCAM_CVAT_URL", raising=False)
    monkeypatch.setenv("ADVCAM_CVAT_TOKEN", token)
    told, end = run(capsys, monkeypatch, "cvat", *arguments, *options)
    assert end == 2 and reason in told and "53cr37" not in told


def test_tasks_and_projects():
    assert target("7") == target("task:7") == Target("task", 7) and target("project:3").path == "/api/projects/3"
    assert task_id("task:7") == task_id("7") == 7
    with pytest.raises(Exception, match=r"'job:7' is neither a task \(task:7\) nor a project \(project:3\)"):
        target("job:7")
    with pytest.raises(Exception, match="'project:3' is a project: give one of its tasks"):
        task_id("project:3")
