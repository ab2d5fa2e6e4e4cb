"""The floors of the package: a module imports its own floor and those below. And a wheel works without the repository."""

import ast
import graphlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import cv2
import httpx
import pytest

from tests.conftest import ROOT, dark_wall

PACKAGE = ROOT / "defectcam"
# From the lowest to the highest. A folder stands for all of its modules. `defectcam` is the package's own __init__.py.
FLOORS = (
    "defectcam text command_line deadline encoders licences overlay cvat_xml proposal_log validation cvat_answers",
    "settings image tiff paths request memory credentials network cvat_labels cvat_runs cvat_task",
    "engine torch_engine openvino_engine",
    "climb tiling throughput pyramid",
    "postprocess",
    "proposals regions polygons weights predict",
    "interactor handler info evaluation training",
    "function",
    "feedback bulk cvat serve demo",
    "__main__",
)
OF_REPOSITORY = {"main", "model_handler", "cvat_function", "benchmarks", "tests", "setup"}
# Imported where they are used: not every part of the product has them, or they take seconds to load.
HEAVY = {
    "torch": "the function's image for CPUs has no PyTorch",
    "safetensors": "as PyTorch",
    "defectcam.network": "imports PyTorch",
    "defectcam.torch_engine": "imports PyTorch",
    "defectcam.openvino_engine": "imports OpenVINO, which a GPU does without",
    "defectcam.tiff": "imports tifffile, and few photos need it",
    "ray": "only for propose --workers",
    "yaml": "only for labels in YOLO's format",
    "resource": "Linux only",
}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {name_of(path): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
FOLDERS = {f"defectcam.{path.parent.name}" for path in PACKAGE.glob("*/__init__.py")}


def imported(node: ast.AST) -> set[str]:
    """The modules that an import statement names; nothing for other nodes."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if not isinstance(node, ast.ImportFrom):
        return set()
    assert node.level == 0, f"line {node.lineno}: imports are written with the package's name"
    return {name if (name := f"{node.module}.{alias.name}") in SOURCES else node.module for alias in node.names}


def imports_of(tree: ast.AST, in_functions: bool) -> set[str]:
    """What a file imports in its functions, or else as soon as it is imported itself. Those for types alone do not count."""
    found, nodes = set(), [(tree, False)]
    while nodes:
        node, inside = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        found |= imported(node) if inside == in_functions else set()
        nodes += [(child, inside) for child in ast.iter_child_nodes(node)]
    return found


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def floor_of(module: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room_of(module) in rooms.split())


def test_every_module_has_one_floor():
    assert sorted(" ".join(FLOORS).split()) == sorted(set(map(room_of, SOURCES)))


@pytest.mark.parametrize("module", SOURCES)
def test_a_module_imports_only_what_it_may(module):
    tree = SOURCES[module]
    found = set().union(*map(imported, ast.walk(tree)))
    own = {name for name in found if name.split(".")[0] == "defectcam"}
    assert not {name for name in found if name.split(".")[0] in OF_REPOSITORY}, "a file of the repository's root"
    assert not {name for name in own if floor_of(name) > floor_of(module)}, "a higher floor"
    if f"defectcam.{room_of(module)}" not in FOLDERS:
        assert not {name for name in own if f"defectcam.{room_of(name)}" in FOLDERS}, "the runtime half imports the offline half"
    late = imports_of(tree, in_functions=True)
    assert not {name for name in late if not {name, name.split(".")[0]} & set(HEAVY)}, "to be imported at the top"
    assert "sys.path" not in ast.unparse(tree)


def test_no_modules_import_each_other():
    graph = {module: imports_of(tree, in_functions=False) & set(SOURCES) for module, tree in SOURCES.items()}
    graphlib.TopologicalSorter(graph).prepare()


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder into which a wheel of the package is unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    files = ["pyproject.toml", "setup.py", "README.md", "LICENSE", "function.yaml", "docs/sample.jpg"]
    for path in [*map(ROOT.joinpath, files), *PACKAGE.rglob("*.*")]:
        if path.is_file() and path.suffix != ".pyc":
            copy = folder / "source" / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, folder / "source"]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


# One process, and weights with a graph: to load OpenVINO takes a second, to load PyTorch several.
COMMANDS = """
import os, sys
from defectcam.__main__ import main

def run(*words):
    sys.argv = ["defectcam", *words]
    main()

try:
    run("demo", "wall.png")
except SystemExit as error:
    print(error)
os.environ["ADVCAM_WEIGHTS"] = "weights of a user"
run("demo", "wall.png", "--iterations", "0")
run("serve", "--port", "0")
"""


def test_a_wheel_works_without_the_repository(installed, with_graph, tmp_path):
    """--help, demo and serve, from another folder; the labels of function.yaml and the sample photo come with the wheel."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("ADVCAM_")}
    environ |= {"PYTHONPATH": str(installed), "ADVCAM_DEVICE": "cpu"}
    given = {"cwd": tmp_path, "env": environ, "text": True, "stdout": subprocess.PIPE}
    python = [sys.executable, "-P"]  # nothing of the working folder is importable
    assert "usage: defectcam COMMAND" in subprocess.run([*python, "-m", "defectcam", "--help"], **given).stdout

    cv2.imwrite(str(tmp_path / "wall.png"), dark_wall([(60, 50, 30)])[0])
    with_graph(tmp_path / "weights of a user")
    with subprocess.Popen([*python, "-u", "-c", COMMANDS], stderr=subprocess.STDOUT, **given) as process:
        try:
            said = []
            for line in process.stdout:
                said.append(line)
                if "running on" in line:
                    break
            assert said[-1:] and "running on" in said[-1], "".join(said)
            assert said[0].startswith(f"no weights in {installed}") and "set ADVCAM_WEIGHTS" in said[0]
            assert isinstance(json.loads((tmp_path / "out" / "demo" / "wall.json").read_text()), list)
            page = said[-1].split("running on ")[1].split()[0] + "/tryout"
            about = httpx.get(f"{page}/about").json()
            assert [defect["name"] for defect in about["defects"]] == ["crack"] and about["sample"]
            assert httpx.get(f"{page}/sample.jpg").content == (ROOT / "docs" / "sample.jpg").read_bytes()
            assert "<html" in httpx.get(f"{page}/").text
        finally:
            process.kill()
