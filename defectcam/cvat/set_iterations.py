"""Set T of a task or project in CVAT: the default of the attribute `iterations` on all defect labels at once.

The next run of the function over the task uses it (docs/annotate.md). A select that lacks the value gets it. Labels without
the attribute `iterations` are left alone. For a task that belongs to a project give the project.

Example:
    export ADVCAM_CVAT_URL=http://localhost:8080 ADVCAM_CVAT_TOKEN=...
    defectcam cvat set-iterations task:12 4
    defectcam cvat set-iterations project:3 4
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

from defectcam.command_line import command_parser
from defectcam.cvat.client import CvatClient, CvatError, add_server_options, client_of
from defectcam.cvat.target import Target, target
from defectcam.cvat_runs import ATTRIBUTE
from defectcam.settings import ITERATIONS_MAX, RequestError

SETUP_REMEDY = "make the labels with defectcam cvat setup"


def set_iterations(client: CvatClient, place: Target, steps: int) -> Iterator[str]:
    """Make T the default of `iterations` on every label that has it; yields what was done, a line a label.

    Raises:
        CvatError: no label has the attribute, one of it is of another type, or CVAT refuses. The types are looked at
            before anything is changed.
    """
    place.check_owns_labels(client)
    found = []
    for label in place.labels(client):
        own = next((attribute for attribute in label.attributes if attribute.name == ATTRIBUTE), None)
        if own is None:
            continue
        if own.input_type != "select":
            raise CvatError(
                f"{ATTRIBUTE} of label {label.name!r} of {place} is of the type {own.input_type}, but must be select: "
                f"rename it in CVAT, then {SETUP_REMEDY} {place.kind}:{place.id}"
            )
        found.append((label, own))
    if not found:
        raise CvatError(f"no label of {place} has the attribute {ATTRIBUTE}: {SETUP_REMEDY} {place.kind}:{place.id}")
    for label, own in found:
        before, value = own.default_value, str(steps)
        is_new = value not in own.values
        if before == value and not is_new:
            yield f"label {label.name!r}: T is {value} already"
            continue
        own.default_value, own.values = value, [*own.values, *[value] * is_new]
        client.patch(f"/api/labels/{label.id}", label.model_dump(include={"name", "color", "attributes"}))
        yield f"label {label.name!r}: T {before} -> {value}{', a new value of the select' if is_new else ''}"


def steps_of(text: str) -> int:
    """T as argparse takes it."""
    if not text.isdecimal() or int(text) > ITERATIONS_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of climbing steps: give 0 to {ITERATIONS_MAX}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> None:
    """The command `defectcam cvat set-iterations`."""
    parser = command_parser("cvat set-iterations", __doc__)
    parser.add_argument("target", type=target, metavar="TASK|PROJECT", help="task:12 or project:3")
    parser.add_argument("iterations", type=steps_of, metavar="T", help=f"climbing steps, 0 to {ITERATIONS_MAX}")
    add_server_options(parser)
    args = parser.parse_args(argv)
    try:
        for line in set_iterations(client_of(args), args.target, args.iterations):
            print(f"{args.target}: {line}")
    except RequestError as error:
        parser.error(str(error))
    except CvatError as error:
        sys.exit(str(error))
