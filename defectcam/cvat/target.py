"""What a command of `defectcam cvat` works on: a task or a project of CVAT, and its labels."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass

from defectcam.cvat.client import CvatClient, CvatError
from defectcam.cvat_answers import Label, Task


@dataclass(frozen=True)
class Target:
    """A task or a project of CVAT.

    Attributes:
        kind: "task" or "project".
        id: CVAT's.
    """

    kind: str
    id: int

    def __str__(self) -> str:
        return f"{self.kind} {self.id}"

    @property
    def path(self) -> str:
        """Its endpoint."""
        return f"/api/{self.kind}s/{self.id}"

    def labels(self, client: CvatClient) -> list[Label]:
        """Its labels in the order in which they were made; those inside of skeletons are left out."""
        labels = client.pages(f"/api/labels?{self.kind}_id={self.id}", Label)
        return sorted((label for label in labels if not label.has_parent), key=lambda label: label.id)

    def check_owns_labels(self, client: CvatClient) -> None:
        """Refuse a task whose labels are those of a project.

        Raises:
            CvatError: it is one; names the project.
        """
        project = client.json(self.path, Task).project_id
        if self.kind == "task" and project is not None:
            raise CvatError(
                f"{self} has the labels of project {project}: give project:{project}, which changes all of its tasks"
            )


def target(text: str) -> Target:
    """ "task:7", "7" or "project:3" as argparse takes it."""
    found = re.fullmatch(r"(?:(task|project):)?([0-9]+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a task (task:7) nor a project (project:3)")
    return Target(found[1] or "task", int(found[2]))


def task_id(text: str) -> int:
    """ "7" or "task:7" as argparse takes it."""
    found = target(text)
    if found.kind != "task":
        raise argparse.ArgumentTypeError(f"{text!r} is a project: give one of its tasks, such as task:7")
    return found.id
