"""function.yaml, function-gpu.yaml and interactor.yaml: as CVAT and Nuclio demand, in step with each other and the code."""

import ast
import copy
import json
import re
from pathlib import Path

import pytest
import yaml

from defectcam import serve
from defectcam.request import MAX_BODY_BYTES, MAX_REST_BYTES
from defectcam.settings import BY_VARIABLE, ITERATIONS_MAX, MAX_MEGAPIXELS

ROOT = Path(__file__).parents[1]
FILES = ("function.yaml", "function-gpu.yaml", "interactor.yaml")
CPU, GPU, CLICK = CONFIGS = [yaml.safe_load((ROOT / name).read_text()) for name in FILES]
LABELS = json.loads(CPU["metadata"]["annotations"]["spec"])
ATTRIBUTES = [attribute for label in LABELS for attribute in label["attributes"]]
TRIGGER = CPU["spec"]["triggers"]["myHttpTrigger"]
CVAT_TIMEOUT_S = 120  # of one call, CVAT_NUCLIO_DEFAULT_TIMEOUT


@pytest.mark.parametrize("config", CONFIGS, ids=FILES)
def test_the_file_is_what_cvat_2_15_and_2_73_ask_of_a_function(config):
    """CVAT 2.15 lists no function at all if one of them cannot be read; 2.73 leaves out that one."""
    name, annotations = config["metadata"]["name"], config["metadata"]["annotations"]
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", name), "Kubernetes' names; CVAT calls [a-zA-Z0-9_.-]+"
    assert config["metadata"]["namespace"] == "cvat"
    assert isinstance(config["spec"]["description"], str) and config["spec"]["description"]
    assert all(isinstance(value, str) for value in annotations.values()), "nuctl hands on texts"
    assert 0 < len(annotations["name"]) <= 24, "CVAT cuts longer names"
    assert annotations["type"] in ("detector", "interactor")
    int(annotations.get("version", "1"))
    labels = json.loads(annotations["spec"] or "[]")
    assert isinstance(labels, list)
    assert len({label["name"] for label in labels}) == len(labels)
    for label in labels:
        assert set(label) == {"name", "type", "attributes"}
        assert label["type"] in ("polygon", "tag"), "neither version checks types"
        assert len({attribute["name"] for attribute in label["attributes"]}) == len(label["attributes"])
        for attribute in label["attributes"]:
            assert set(attribute) == {"name", "input_type", "values"}
            assert attribute["values"] and all(isinstance(value, str) for value in attribute["values"])
            assert attribute["name"] != "score", "CVAT's COCO export treats this name specially"
    if annotations["type"] == "detector":
        assert labels
        return
    assert not labels, "the annotator chooses the label"
    assert int(annotations["version"]) >= 2, "2.73 keeps the button Interact grey below it"
    assert (int(annotations["min_pos_points"]), int(annotations["min_neg_points"])) == (1, 0)
    assert isinstance(annotations["help_message"], str) and annotations["help_message"]
    # Any text means yes. The first: 2.15 wants a box every time. The second: in 2.73 the tool opens with the switch on.
    assert not {"startswith_box", "startswith_box_optional"} & set(annotations)


def test_no_two_functions_have_a_name_in_common():
    for key in (lambda metadata: metadata["name"], lambda metadata: metadata["annotations"]["name"]):
        assert key(CPU["metadata"]) == key(GPU["metadata"]) != key(CLICK["metadata"])


def test_labels_are_the_defects_and_the_tags():
    assert [label["name"] for label in LABELS] == ["crack", "spalling", "rust", "unprocessed", "notice"]
    assert [label["type"] for label in LABELS] == ["polygon", "polygon", "polygon", "tag", "tag"]
    for label in LABELS[:3]:
        names = [attribute["name"] for attribute in label["attributes"]]
        assert names == ["confidence", "iterations", "proposal"]
    for label in LABELS[3:]:
        assert [attribute["name"] for attribute in label["attributes"]] == ["reason"]


@pytest.mark.parametrize("attribute", ATTRIBUTES, ids=lambda attribute: attribute["name"])
def test_attributes_fit_their_input_type(attribute):
    values = attribute["values"]
    if attribute["name"] == "confidence":
        assert (attribute["input_type"], values) == ("number", ["0", "100", "1"])  # least, greatest, step
    elif attribute["name"] == "iterations":
        assert attribute["input_type"] == "select"
        assert len(set(values)) == len(values)
        assert all(0 <= int(value) <= ITERATIONS_MAX for value in values)
    else:
        assert (attribute["input_type"], values) == ("text", [""])


def test_the_first_count_offered_is_that_of_the_weights():
    """It becomes the default of a task whose labels are made "From model"."""
    defects = json.loads((ROOT / "weights" / "manifest.json").read_text())["defects"]
    for label in LABELS[:3]:
        values = next(a["values"] for a in label["attributes"] if a["name"] == "iterations")
        assert values[0] == str(defects[label["name"]]["iterations"])


def test_gpu_file_differs_only_where_it_must():
    cpu, gpu = copy.deepcopy(CPU["spec"]), copy.deepcopy(GPU["spec"])
    assert "resources" not in cpu
    assert gpu.pop("resources") == {"limits": {"nvidia.com/gpu": 1}}
    assert cpu["build"].pop("image") + "-gpu" == gpu["build"].pop("image")
    assert cpu["env"].pop(0) == {"name": "ADVCAM_DEVICE", "value": "cpu"}
    assert gpu["env"].pop(0) == {"name": "ADVCAM_DEVICE", "value": "cuda"}
    (on_cpu,), (on_gpu,) = (config["build"]["directives"].pop("postCopy") for config in (cpu, gpu))
    assert on_cpu["value"].replace("['runtime-cpu']", "['runtime']") == on_gpu["value"] != on_cpu["value"]
    assert cpu == gpu
    assert CPU["metadata"] == GPU["metadata"]


def test_time_limits_leave_room_for_each_other():
    event_timeout_s = int(CPU["spec"]["eventTimeout"].removesuffix("s"))
    assert event_timeout_s >= 2 * CVAT_TIMEOUT_S, "Nuclio's clock is coarse"
    queue_s = TRIGGER["workerAvailabilityTimeoutMilliseconds"] / 1000
    assert CVAT_TIMEOUT_S - 20 <= queue_s < CVAT_TIMEOUT_S, "wait nearly as long as CVAT does"
    assert CPU["spec"]["readinessTimeoutSeconds"] >= 120, "not below Nuclio's default"


def test_body_limit_is_what_the_largest_photo_needs():
    uncompressed_rgb = MAX_MEGAPIXELS * 1_000_000 * 3
    in_its_envelope = uncompressed_rgb * 4 / 3 + MAX_REST_BYTES  # base64, and what is beside it
    assert in_its_envelope < TRIGGER["attributes"]["maxRequestBodySize"] == MAX_BODY_BYTES < 1.1 * in_its_envelope


def test_serve_has_the_same_limits():
    assert TRIGGER["numWorkers"] == 1
    assert serve.QUEUE_SECONDS * 1000 == TRIGGER["workerAvailabilityTimeoutMilliseconds"]


def test_handler_and_init_context_exist():
    module, handler = CPU["spec"]["handler"].split(":")
    tree, code = (ast.parse((ROOT / path).read_text()) for path in (f"{module}.py", "defectcam/function.py"))
    named = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    functions = {node.name: len(node.args.args) for node in code.body if isinstance(node, ast.FunctionDef)}
    assert {handler, "init_context"} <= named  # neither file is imported: that would load PyTorch
    assert functions[handler] == 2
    assert functions["init_context"] == 1


def test_environment_has_only_variables_that_are_read():
    for name in FILES:
        assert set(re.findall(r"\bADVCAM_\w+", (ROOT / name).read_text())) <= set(BY_VARIABLE)  # the commented ones too
    assert all(isinstance(variable["value"], str) for variable in CPU["spec"]["env"])


def test_commented_settings_are_valid_yaml():
    for name in ("function.yaml", "function-gpu.yaml"):
        lines = re.findall(r"^    # (- \{.*)$", (ROOT / name).read_text(), re.MULTILINE)
        variables = yaml.safe_load("\n".join(lines))
        assert len(variables) >= 6
        assert all(set(variable) == {"name", "value"} for variable in variables)
        assert all(isinstance(variable["value"], str) for variable in variables)


def test_processor_comes_back_after_a_crash():
    assert CPU["spec"]["platform"]["attributes"] == {
        "restartPolicy": {"name": "always", "maximumRetryCount": 3},
        "mountMode": "volume",
    }
