"""The command group `defectcam cvat ...`; a command's part is imported when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "annotate": ("defectcam.cvat.annotate", "new proposals for a task, say with another T; people's shapes are kept"),
    "setup": ("defectcam.cvat.setup", "the function's labels for a task or project, made or repaired"),
    "set-iterations": ("defectcam.cvat.set_iterations", "T of a task or project: the default of `iterations` on its labels"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """The command `defectcam cvat`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else ""
    if command in COMMANDS:
        importlib.import_module(COMMANDS[command][0]).main(arguments[1:])
        return
    lines = [f"  {name:14} {what}" for name, (_, what) in COMMANDS.items()]
    usage = "\n".join(["usage: defectcam cvat COMMAND ... (defectcam cvat COMMAND --help says more)", *lines])
    if command in ("-h", "--help"):
        print(f"{usage}\nexample:\n  defectcam cvat annotate 7 --iterations 4 --url http://localhost:8080")
    else:
        sys.exit(f"unknown command {command!r}\n{usage}" if command else usage)
