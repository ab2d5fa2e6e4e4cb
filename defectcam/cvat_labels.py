"""The labels of a task in CVAT: those of function.yaml, and one made like them for every other defect of the weights.

deploy.sh makes the same labels without Python, for the function files that it deploys; a test holds the two together.
"""

from __future__ import annotations

import copy
import json
import re
import unicodedata
from collections.abc import Iterable

from defectcam.paths import repository_file

FUNCTION_YAML = repository_file("function.yaml")
UNPROCESSED, NOTICE = TAGS = ("unprocessed", "notice")  # the tags beside proposals, the last labels of function.yaml
NAME_MAX = 64  # characters of a label's name that CVAT stores
# Of labels that are added: CVAT's own colours are pale, and thin cracks are hard to see in them.
COLOURS = ("#00dc78", "#ff00ff", "#00e5ff", "#b4ff00", "#aa5aff", "#ff7800")


def check_label_name(defect: str) -> None:
    """Check that CVAT can take a defect's name for a label.

    Raises:
        ValueError: it cannot; the message says why and what to do.
    """
    problem = None
    if not defect:
        problem = "is empty"
    elif defect in TAGS:
        problem = f"is the tag {defect!r} of the function"
    elif defect != defect.strip(" "):
        problem = "begins or ends with a blank"
    elif len(defect) > NAME_MAX:
        problem = f"has {len(defect)} characters, but CVAT takes {NAME_MAX}"
    elif any(unicodedata.category(char) in ("Cc", "Zl", "Zp") for char in defect):
        problem = "has a control character or a line break"
    if problem:
        raise ValueError(f"the defect's name {defect!r} {problem}: give it another name (defectcam calibrate --defect NAME)")


def labels_with(defects: Iterable[str]) -> list[dict]:
    """The labels of function.yaml, and one for each of these defects that the file lacks, before the tags.

    Returns:
        {"name", "type", "attributes"} of each label; of those that are added "color", too.

    Raises:
        ValueError: CVAT cannot take a defect's name, or function.yaml has no labels.
    """
    # deploy.sh reads it in the same way. The function's image has no PyYAML, so a YAML parser cannot be used.
    spec = re.search(r"^    spec: *\|\n((?:(?:      .*)?\n)+)", FUNCTION_YAML.read_text(encoding="utf-8"), re.MULTILINE)
    if spec is None:
        raise ValueError(f"{FUNCTION_YAML} has no labels below 'spec: |' of its annotations: take the file as it was published")
    labels = json.loads(spec[1])
    like = next(label for label in labels if label["type"] == "polygon")
    for defect in defects:
        check_label_name(defect)
        if any(label["name"] == defect for label in labels):
            continue
        taken = {label.get("color") for label in labels}
        colour = next((one for one in COLOURS if one not in taken), COLOURS[len(labels) % len(COLOURS)])
        first_tag = next((place for place, label in enumerate(labels) if label["type"] == "tag"), len(labels))
        labels.insert(first_tag, {**copy.deepcopy(like), "name": defect, "color": colour})
    return labels


def task_labels(labels: Iterable[dict]) -> list[dict]:
    """The function's labels as CVAT's label editor takes them in its tab Raw: with `mutable` and `default_value`."""
    return [
        label | {"attributes": [a | {"mutable": False, "default_value": a["values"][0]} for a in label["attributes"]]}
        for label in labels
    ]
