"""Dockerfile, .dockerignore and the function files: the image holds the runtime half, complete, the doctor, and no more."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

from defectcam.request import parse_request
from defectcam.settings import ITERATIONS_MAX, Settings

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCTOR = [ROOT / "defectcam" / "cvat" / f"{name}.py" for name in ("__init__", "client", "doctor", "setup", "target")]
SOURCES = [ROOT / "main.py", ROOT / "model_handler.py", *sorted((ROOT / "defectcam").glob("*.py")), *DOCTOR]
OWN = {"main", "model_handler", "defectcam"}
FUNCTION_FILES = [path for path in sorted(ROOT.glob("*.yaml")) if "annotations" in path.read_text()]


def instructions() -> list[tuple[str, str]]:
    """(instruction, its arguments) of the Dockerfile, continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def of(instruction: str) -> list[str]:
    return [arguments for name, arguments in instructions() if name == instruction]


def copied_from_context() -> list[tuple[str, str]]:
    """(source, destination) of every COPY out of the build context."""
    copies = [arguments.split() for arguments in of("COPY") if "--from" not in arguments]
    return [(source, words[-1]) for words in copies for source in words[:-1]]


def in_image() -> set[str]:
    """The repository's files in the image's own stages: those copied to an absolute path."""
    patterns = [source for source, destination in copied_from_context() if destination.startswith("/")]
    paths = [path for pattern in patterns for path in ROOT.glob(pattern + "*" if pattern.endswith("/") else pattern)]
    return {str(path.relative_to(ROOT)) for path in paths}


def imports(path: Path) -> set[str]:
    """Modules that a file imports, at its top or later."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_image_holds_the_runtime_half_the_doctor_and_the_weights_and_nothing_else():
    weights = {str(path.relative_to(ROOT)) for path in (ROOT / "weights").iterdir() if path.is_file()}  # no other weights, no replay pack
    assert in_image() == {str(path.relative_to(ROOT)) for path in SOURCES} | weights


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_import_only_what_the_image_holds(source):
    folders = {path.name for path in (ROOT / "defectcam").iterdir() if path.is_dir()}
    for module in imports(source):
        parts = module.split(".")
        if parts[0] == "defectcam" and len(parts) > 1 and parts[1] in folders:
            assert source in DOCTOR, f"{source.name} imports {module} of the offline half"
            assert f"{'/'.join(parts[:3])}.py" in in_image(), f"{source.name} imports {module}, which the image lacks"


distributions_of = cache(packages_distributions)  # it reads what is known of every package


def not_installed(extra: str, sources: list[Path], imported=imports) -> set[tuple[str, str]]:
    """(file, module) of every import that an extra does not install."""
    names = {re.split(r"[<>=\[; ]", line)[0] for line in PROJECT["optional-dependencies"][extra]}
    required = {name.lower().replace("_", "-") for name in names}
    found = set()
    for source in sources:
        for module in {name.split(".")[0] for name in imported(source)} - set(sys.stdlib_module_names) - OWN:
            provided = {name.lower().replace("_", "-") for name in distributions_of().get(module, [module])}
            if not provided & required:
                found.add((source.name, module))
    return found


def imports_at_once(path: Path) -> set[str]:
    """Modules that a file imports as soon as it is imported itself."""
    nodes = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return names | {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}


def test_third_party_imports_are_runtime_requirements():
    optional = {("openvino_engine.py", "openvino"), ("image.py", "pillow_heif")}
    assert not_installed("runtime", SOURCES) == optional


def test_what_main_and_the_doctor_import_at_once_is_installed_for_a_cpu_and_so_is_its_engine():
    """tests/test_function.py runs it without the others."""
    reached, new = set(), {ROOT / "main.py", ROOT / "defectcam" / "openvino_engine.py", ROOT / "defectcam" / "cvat" / "doctor.py"}
    while new:
        reached |= new
        paths = {ROOT / f"{name.replace('.', '/')}.py" for path in new for name in imports_at_once(path)}
        new = {path for path in paths if path.exists()} - reached
    names = {path.name for path in reached}
    assert {"handler.py", "predict.py", "pyramid.py"} <= names and not {"network.py", "torch_engine.py"} & names
    assert not_installed("runtime-cpu", sorted(reached), imports_at_once) == set()
    assert not [name for name in PROJECT["optional-dependencies"]["runtime-cpu"] if "torch" in name]


def test_context_is_what_the_dockerfile_copies():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert patterns[0] == "*"
    assert {pattern.removeprefix("!") for pattern in patterns[1:]} == {
        source.removesuffix("/") for source, _ in copied_from_context()
    }


def test_requirements_are_pinned():
    install = next(command for command in of("RUN") if "--requirement" in command)
    assert "--constraint constraints.txt" in install
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().split()}
    for extra in ("runtime", "runtime-cpu"):
        assert {line.lower().replace("_", "-") for line in PROJECT["optional-dependencies"][extra]} <= pinned
    images = [argument.split("=")[1] for argument in of("ARG") if "IMAGE" in argument]
    assert images and all(re.search(r":\d+\.\d+\.\d+-\w+", image) for image in images), "a tag of two numbers moves on"


def test_processor_and_wrapper_come_from_nuclios_image_of_one_version():
    assert re.fullmatch(r"NUCLIO_VERSION=\d+\.\d+\.\d+", of("ARG")[0])
    assert "quay.io/nuclio/handler-builder-python-onbuild:${NUCLIO_VERSION}-${NUCLIO_ARCH} AS nuclio" in of("FROM")
    from_nuclio = dict(arguments.split()[1:] for arguments in of("COPY") if "--from=nuclio" in arguments)
    assert from_nuclio["/home/nuclio/bin/processor"].endswith("/usr/local/bin/processor")
    assert from_nuclio["/home/nuclio/bin/py"].endswith("/opt/nuclio/")
    assert of("CMD") == ['["processor"]']


def test_python_is_the_runtime_of_the_function_files():
    version = re.search(r"PYTHON_IMAGE=python:(\d+\.\d+)", "\n".join(of("ARG"))).group(1)
    assert f"py{version}-whl" in "\n".join(of("COPY"))
    for path in FUNCTION_FILES:
        assert yaml.safe_load(path.read_text())["spec"]["runtime"] == f"python:{version}"


def test_handler_lies_where_nuclio_looks():
    assert of("WORKDIR")[-1] == "/opt/nuclio"
    assert any(destination.endswith("/opt/nuclio/") for source, destination in copied_from_context())
    for path in FUNCTION_FILES:
        module = yaml.safe_load(path.read_text())["spec"]["handler"].split(":")[0]
        assert f"{module}.py" in in_image()


@pytest.fixture
def install(tmp_path):
    """Function (DEVICE, ENGINE) -> the finished process of the instruction that installs, with a pip that only says what."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pip").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "bin" / "pip").chmod(0o755)
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (command,) = (command for command in of("RUN") if "--requirement" in command)

    def run(device: str, engine: str) -> subprocess.CompletedProcess:
        environ = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "DEVICE": device, "ENGINE": engine}
        return subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environ, capture_output=True, text=True)

    return run


@pytest.mark.parametrize(
    "device, engine, extra, of_cpu",
    [
        ("cpu", "", "runtime-cpu", False),
        ("cpu", "openvino", "runtime-cpu", False),
        ("cpu", "torch", "runtime", True),
        ("gpu", "", "runtime", False),
        ("gpu", "torch", "runtime", False),
    ],
)
def test_device_and_engine_say_what_is_installed(install, tmp_path, device, engine, extra, of_cpu):
    assert {"DEVICE=cpu", "ENGINE="} <= set(of("ARG"))
    done = install(device, engine)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "requirements.txt").read_text().split("\n")[:-1] == PROJECT["optional-dependencies"][extra]
    assert ("whl/cpu" in done.stdout) == of_cpu, "PyTorch without CUDA"
    assert done.stdout.count("install --no-cache-dir --prefix=/packages") == 2


@pytest.mark.parametrize(
    "device, engine, reason",
    [
        ("tpu", "", "DEVICE is 'tpu', but must be cpu or gpu"),
        ("", "", "DEVICE is '', but must be cpu or gpu"),
        ("cpu", "onnx", "ENGINE is 'onnx', but must be openvino or torch"),
        ("gpu", "onnx", "ENGINE is 'onnx', but must be openvino or torch"),
        ("gpu", "openvino", "ENGINE is 'openvino', which runs on the CPU, but DEVICE is 'gpu'"),
    ],
)
def test_other_devices_and_engines_end_the_build_with_the_reason(install, device, engine, reason):
    done = install(device, engine)
    assert done.returncode == 1 and reason in done.stderr and not done.stdout


def test_threads_that_wait_sleep_wherever_the_function_is_started():
    """Spinning threads make the function several times slower as soon as another process runs."""
    assert "OMP_WAIT_POLICY=passive" in of("ENV")
    for path in FUNCTION_FILES:
        environ = yaml.safe_load(path.read_text())["spec"]["env"]
        assert {"name": "OMP_WAIT_POLICY", "value": "passive"} in environ, path.name


def test_function_does_not_run_as_root():
    names = [name for name, _ in instructions()]
    assert of("USER") == ["1000"]
    assert "RUN" not in names[names.index("USER") :]


def test_nuctl_can_wait_for_a_healthy_container():
    check = of("HEALTHCHECK")[0]
    assert "http://127.0.0.1:8082/ready" in check
    start_period_s = int(re.search(r"--start-period=(\d+)s", check).group(1))
    for path in FUNCTION_FILES:
        assert start_period_s >= yaml.safe_load(path.read_text())["spec"].get("readinessTimeoutSeconds", 120)


@pytest.mark.parametrize("name", ["function.yaml", "function-gpu.yaml"])
def test_parameters_offered_to_cvat_forks_are_the_requests(name):
    annotations = yaml.safe_load((ROOT / name).read_text())["metadata"]["annotations"]
    properties = json.loads(annotations["extra_params_schema"])["properties"]
    assert set(properties) <= set(Settings.__dataclass_fields__)
    number = properties["iterations"]
    assert (number["minimum"], number["maximum"]) == (0, ITERATIONS_MAX)
    image = "iVBORw0KGgo="
    for steps in (0, ITERATIONS_MAX):
        request = parse_request({"image": image, "iterations": steps}, Settings(), ["crack"])
        assert request.settings.iterations == steps
    for key in ("minimum", "maximum"):
        theta = properties["cam_threshold"][key]
        assert parse_request({"image": image, "cam_threshold": theta}, Settings(), ["crack"]).settings.cam_threshold == theta
