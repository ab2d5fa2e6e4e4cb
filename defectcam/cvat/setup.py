"""Make or repair the labels of a task or project in CVAT, as the function needs them.

The labels are those of function.yaml, and one for every other defect of the weights: with the attributes `confidence`,
`iterations` and `proposal`, strong colours, and the tags `unprocessed` and `notice`. What is missing is added: labels,
attributes, values of `iterations`. A pale colour becomes a strong one. Nothing is deleted or renamed, and no
default is changed but one that is not among its values. What this command cannot repair is printed with a remedy.

For a task that belongs to a project give the project.

Exit status: 0 if all labels are right now, 1 if something is left to do by hand or CVAT refused, 2 for a wrong command.

Example:
    export ADVCAM_CVAT_URL=http://localhost:8080 ADVCAM_CVAT_TOKEN=...
    defectcam cvat setup task:12
    defectcam cvat setup project:3 --org bridges
"""

from __future__ import annotations

import colorsys
import re
import sys
from collections.abc import Sequence

from defectcam.command_line import command_parser
from defectcam.cvat.client import CvatClient, CvatError, add_server_options, client_of
from defectcam.cvat.target import Target, target
from defectcam.cvat_answers import Attribute, Label
from defectcam.cvat_labels import COLOURS, labels_with, task_labels
from defectcam.settings import RequestError
from defectcam.weights import WeightsError, add_weights_option, read_manifest

PALE = 0.6  # saturation (0..1) below which a thin crack is hard to see; CVAT's own colours have about 0.3
LABEL_TYPES = {"polygon": ("polygon", "mask", "any"), "tag": ("tag", "any")}  # types of a task's label that can hold ours


class Setup:
    """The changes that make the labels of a task or project those of the function.

    Args:
        client: the connection.
        place: the task or project.
    """

    def __init__(self, client: CvatClient, place: Target) -> None:
        self.client, self.place = client, place
        self.done: list[str] = []  # what was changed, a line each
        self.left: list[str] = []  # what cannot be repaired here, with the remedy

    def run(self, wanted: Sequence[dict]) -> None:
        """Add and repair labels.

        Args:
            wanted: as `defectcam.cvat_labels.task_labels` returns them.

        Raises:
            CvatError: CVAT refuses, or the labels are those of a project.
        """
        self.place.check_owns_labels(self.client)
        present = self.place.labels(self.client)
        by_name = {label.name: label for label in present}
        taken = {label.color.lower() for label in present if label.color}
        missing = []
        for label in wanted:
            there = by_name.get(label["name"])
            if there is None:
                missing.append(self._coloured(label, label.get("color"), taken))
            else:
                self._repair(there, label, taken)
        if missing:
            self.client.patch(self.place.path, {"labels": missing})
            self.done += [f"label {label['name']!r} added ({label['type']}, {label['color']})" for label in missing]

    def _coloured(self, label: dict, colour: str | None, taken: set[str]) -> dict:
        """The label with its own colour, or a strong one that no other label has."""
        free = [one for one in COLOURS if one not in taken]
        colour = colour or (free or COLOURS)[0]
        taken.add(colour)
        return {**label, "color": colour}

    def _repair(self, there: Label, wanted: dict, taken: set[str]) -> None:
        """Change a label that is there, as little as needed."""
        name = there.name
        if there.type not in LABEL_TYPES[wanted["type"]]:
            self.left.append(
                f"label {name!r} has the type {there.type}, which cannot hold a {wanted['type']}: rename it in CVAT, "
                "then run this again, which makes a new one"
            )
            return
        added, changes = [], []
        by_name = {attribute.name: attribute for attribute in there.attributes}
        for attribute in wanted["attributes"]:
            own = by_name.get(attribute["name"])
            if own is None:
                added.append(attribute)
                changes.append(f"attribute {attribute['name']!r} added")
            elif own.input_type != attribute["input_type"]:
                self.left.append(
                    f"attribute {attribute['name']!r} of label {name!r} is of the type {own.input_type}, but must be "
                    f"{attribute['input_type']}, or CVAT shows false values: rename it in CVAT and run this again"
                )
            else:
                changes += _repaired_values(own, attribute)
        colour = there.color or ""
        if is_pale(colour):
            colour = self._coloured(wanted, wanted.get("color"), taken)["color"]
            changes.append(f"colour {there.color or 'none'} -> {colour}")
        if changes:
            # A PATCH without name or colour would let some versions choose new ones.
            attributes = [attribute.model_dump() for attribute in there.attributes] + added
            self.client.patch(f"/api/labels/{there.id}", {"name": name, "color": colour, "attributes": attributes})
            self.done.append(f"label {name!r}: {', '.join(changes)}")


def _repaired_values(own: Attribute, wanted: dict) -> list[str]:
    """Bring the values of an attribute up to those that are wanted, in place; says what was changed."""
    changes, name = [], own.name
    if own.input_type == "select":
        lacking = [value for value in wanted["values"] if value not in own.values]
        own.values = [*own.values, *lacking]
        if lacking:
            changes.append(f"{name} has the values {', '.join(lacking)} as well")
        if own.default_value not in own.values:
            changes.append(f"default of {name} {own.default_value!r} -> {wanted['default_value']!r}")
            own.default_value = wanted["default_value"]
    elif own.input_type == "number" and own.values != wanted["values"]:
        changes.append(f"range of {name} {own.values} -> {wanted['values']}")
        own.values = list(wanted["values"])
    return changes


def is_pale(colour: str) -> bool:
    """Whether a colour such as #a5ecdf is hard to see on concrete, or is none."""
    if not re.fullmatch("#[0-9a-fA-F]{6}", colour):
        return True
    red, green, blue = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    return colorsys.rgb_to_hsv(red, green, blue)[1] < PALE


def main(argv: Sequence[str] | None = None) -> None:
    """The command `defectcam cvat setup`."""
    parser = command_parser("cvat setup", __doc__)
    parser.add_argument("target", type=target, metavar="TASK|PROJECT", help="task:12 or project:3")
    add_weights_option(parser, "weights folder, whose defects get labels")
    add_server_options(parser)
    args = parser.parse_args(argv)
    try:
        setup = Setup(client_of(args), args.target)
        _, configs = read_manifest(args.weights)
        wanted = task_labels(labels_with(configs))
    except RequestError as error:
        parser.error(str(error))
    except (WeightsError, ValueError) as error:
        sys.exit(str(error))
    failure = None
    try:
        setup.run(wanted)
    except CvatError as error:
        failure = str(error)
    for line in setup.done:
        print(f"{args.target}: {line}")
    for line in setup.left:
        print(f"{args.target}: {line}", file=sys.stderr)
    if failure or setup.left:
        sys.exit(failure or 1)
    if not setup.done:
        print(f"{args.target}: all labels are right already")
