"""Every setting of the function, once: key of a request, variable of a deployment, what is allowed, default and meaning.

Requests (`defectcam.request`) and ADVCAM_* variables are read by this table. README's table "Settings", the limits of `GET /`
and the variables in --help are made from it. `python -m defectcam.settings` prints README's.
"""

from __future__ import annotations

import difflib
import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from defectcam.text import printable, shortened

ITERATIONS_MAX = 50
SHAPES = ("polygon", "mask")
MAX_PROPOSALS = 200  # of a defect on a photo: an annotator is not helped by more
DEVICES = ("cpu", "cuda")
ENGINES = ("torch", "openvino")
MAX_MEGAPIXELS = 64  # 8000 x 8000
LARGEST_MEGAPIXELS = 178  # that ADVCAM_MAX_MEGAPIXELS may allow
TIME_LIMIT_S = 100  # CVAT gives up after 120 s, and the answer must travel too
DATABASE = "out/feedback/feedback.db"
NO_TIME_LIMIT_S = 86_400  # where a command runs the function itself: no server waits for a frame
# What earlier versions had, and what to do instead.
SNAP_REMOVED = "was removed: the outline is the map's; cam_threshold makes proposals wider or narrower"
AUTO_REMOVED = 'is "auto", which was removed: give a number of steps, or leave it out for the weights\' own'
REMOVED_VARIABLES = {
    "ADVCAM_SNAP": SNAP_REMOVED,
    "ADVCAM_IDLE_SECONDS": "was removed: the networks are small and stay on the GPU",
}


class RequestError(ValueError):
    """A key or variable that is refused; the message names it, its value and what is allowed."""


@dataclass(frozen=True)
class Settings:
    """What may be set per request or per deployment; None = the manifest's value for each defect, or its label's shape."""

    iterations: int | None = None
    threshold: float | None = None
    cam_threshold: float | None = None
    defects: tuple[str, ...] | None = None  # not empty
    shape: str | None = None
    tolerance_px: float | None = None
    hole_share: float | None = None
    max_proposals: int | None = None


@dataclass(frozen=True)
class Rule:
    """What is allowed."""

    words: str  # for messages and tables; {defects} stands for the defects that the weights know
    read: Callable[[object, Sequence[str]], object]  # (value, those defects) -> as `Settings` has it, None if not allowed
    limits: tuple = ()  # the smallest and the largest number, or all texts; empty where neither can be listed

    def allowed(self, defects: Sequence[str] = ()) -> str:
        """What is allowed, in words."""
        return self.words.format(defects=", ".join(defects) or "the defects that the weights know")


@dataclass(frozen=True)
class Setting:
    """A row of the table."""

    key: str | None  # of a request, and field of Settings
    variable: str
    rule: Rule
    default: str  # what counts where nothing is given, in words
    meaning: str
    secret: bool = False  # no process may hand the variable on


def _number(low: int, high: int, whole: bool = False, above: bool = False) -> Rule:
    """Numbers from `low` (or above it) to `high`; True is an int to Python, but no number, and NaN lies in no range."""

    def read(value: object, _) -> float | None:
        fits = type(value) in ((int,) if whole else (int, float)) and low <= value <= high and not (above and value == low)
        return (value if whole else float(value)) if fits else None

    words = f"a number above {low}, at most {high}" if above else f"{'an integer' if whole else 'a number'} from {low} to {high}"
    return Rule(words, read, (low, high))


def _one_of(*texts: str) -> Rule:
    words = " or ".join(f'"{text}"' for text in texts)
    return Rule(words, lambda value, _: value if isinstance(value, str) and value in texts else None, texts)


def _text(words: str) -> Rule:
    return Rule(words, lambda value, _: value if isinstance(value, str) else None)


def _names(value: object, known: Sequence[str]) -> tuple[str, ...] | None:
    """The names in a list or in comma separated text, each once; None if one is unknown or there is none."""
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return None
    names = tuple(dict.fromkeys(name.strip() for name in names))
    return names if names and all(name in known for name in names) else None


OF_WEIGHTS = "the weights' own"
SETTINGS = (
    Setting("iterations", "ADVCAM_ITERATIONS", _number(0, ITERATIONS_MAX, whole=True), OF_WEIGHTS, "climbing steps T"),
    Setting("threshold", "ADVCAM_THRESHOLD", _number(0, 1), OF_WEIGHTS, "minimum confidence of a proposal"),
    Setting("cam_threshold", "ADVCAM_CAM_THRESHOLD", _number(0, 1), OF_WEIGHTS,
            "theta, the probability above which a pixel counts"),
    Setting("defects", "ADVCAM_DEFECTS", Rule("one or more of {defects}", _names), "all", "defects to propose, comma separated"),
    Setting("max_proposals", "ADVCAM_MAX_PROPOSALS", _number(1, 10_000, whole=True), str(MAX_PROPOSALS),
            "most proposals of a defect on a photo"),
    Setting("shape", "ADVCAM_SHAPE", _one_of(*SHAPES), "the type of the task's label, polygon where the task cannot be read",
            "shape type"),
    Setting("tolerance_px", "ADVCAM_TOLERANCE_PX", _number(0, 20), OF_WEIGHTS, "simplification of polygons, px"),
    Setting("hole_share", "ADVCAM_HOLE_SHARE", _number(0, 1), OF_WEIGHTS, "holes are filled up to this share of the polygon"),
    Setting(None, "ADVCAM_DEVICE", _one_of(*DEVICES), "cuda where there is a GPU, else cpu", "device"),
    Setting(None, "ADVCAM_ENGINE", _one_of(*ENGINES),
            "openvino on a CPU, where it is installed and the weights have a graph; else torch", "engine"),
    Setting(None, "ADVCAM_MAX_MEGAPIXELS", _number(0, LARGEST_MEGAPIXELS, above=True), str(MAX_MEGAPIXELS),
            "largest photo, megapixels, for all commands; `defectcam propose` takes larger ones in parts"),
    Setting(None, "ADVCAM_TIME_LIMIT", _number(0, NO_TIME_LIMIT_S, above=True),
            f"{TIME_LIMIT_S}; no limit in `demo`, `propose`, `sweep`, `cvat annotate` and cvat_function.py",
            "longest answer, seconds, waiting for other photos included; a photo that would take longer gets the tag at once"),
    Setting(None, "ADVCAM_CVAT_URL", _text("an address like http://cvat-server:8080"), "none",
            "CVAT that commands use, and that the function asks for a task's T and the types of its labels"),
    Setting(None, "ADVCAM_CVAT_TOKEN", _text("letters, digits and signs"), "none", "token for that CVAT", secret=True),
    Setting(None, "ADVCAM_LOG_DIR", _text("a folder that can be written to"), "none", "folder that every answer is logged to"),
    Setting(None, "ADVCAM_WEIGHTS", _text("a folder with manifest.json"), "`weights` beside the package",
            "folder of weights; to be set where the package is installed without the checkout"),
    Setting(None, "ADVCAM_DB", _text("an SQLite file, or an SQLAlchemy URL"), DATABASE, "database of the commands with --db",
            secret=True),
)  # fmt: skip
BY_VARIABLE = {setting.variable: setting for setting in SETTINGS}
SECRETS = tuple(setting.variable for setting in SETTINGS if setting.secret)
NOT_OF_COMMANDS = ("ADVCAM_CVAT_URL", *SECRETS)  # that the function does not read where a command runs it


def checked(name: str, value: object, rule: Rule, shown: object, defects: Sequence[str] = ()) -> object:
    """`value` as the rule reads it; else a RequestError that calls it `name` and shows `shown`."""
    if name.casefold().endswith("iterations") and value == "auto":
        raise RequestError(f"{name} {AUTO_REMOVED}")
    result = rule.read(value, defects)
    if result is None:
        raise RequestError(f"{name} is {shortened(shown)}, but must be {rule.allowed(defects)}")
    return result


def read_variable(environ: Mapping[str, str], variable: str, defects: Sequence[str] = ()) -> object:
    """The value of a variable of the table as its rule reads it; None if it is unset or blank.

    Args:
        defects: names of the defects that the weights know, for ADVCAM_DEFECTS.

    Raises:
        RequestError: a value that is not allowed; names the variable, the value and what is allowed.
    """
    value, rule = environ.get(variable, "").strip(), BY_VARIABLE[variable].rule
    if not value:
        return None
    if rule.read(value, defects) is None:
        try:
            value = json.loads(value)  # numbers are read as strictly as in a request
        except (ValueError, RecursionError):
            pass
    return checked(variable, value, rule, environ[variable], defects)


def settings_from_env(environ: Mapping[str, str], defects: Sequence[str]) -> Settings:
    """Settings of a deployment; arguments and errors as of `read_variable`, also for variables of earlier versions."""
    for variable, removed in REMOVED_VARIABLES.items():
        if environ.get(variable, "").strip():
            raise RequestError(f"{variable} {removed}; unset it")
    return Settings(**{one.key: read_variable(environ, one.variable, defects) for one in SETTINGS if one.key})


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """A warning for each variable that is called like ours but is none, such as ADVCAM_ITERATION.

    No errors: Kubernetes calls variables after services, and a service may be called advcam.
    """
    known, warnings = {name.removeprefix("ADVCAM_"): name for name in BY_VARIABLE}, []
    for name in sorted(environ.keys() - BY_VARIABLE.keys() - REMOVED_VARIABLES.keys()):
        if name.upper().startswith("ADVCAM_") and environ[name].strip():
            near = difflib.get_close_matches(name[7:].upper(), known, 1)
            remedy = f"did you mean {known[near[0]]}?" if near else "the README lists all settings"
            warnings.append(f"{printable(name)} is no setting and has no effect: {remedy}")
    return warnings


def function_environ(environ: Mapping[str, str], **given: object) -> dict[str, str]:
    """The variables for a command that runs the function itself: without CVAT, without a time limit unless one is set.

    `given` counts before the environment, by names of variables without ADVCAM_ in small letters; None = not given.
    """
    environ = {name: text for name, text in environ.items() if name not in NOT_OF_COMMANDS and text.strip()}
    given = {f"ADVCAM_{name.upper()}": str(value) for name, value in given.items() if value is not None}
    return {"ADVCAM_TIME_LIMIT": str(NO_TIME_LIMIT_S)} | environ | given


def variables_help(left_out: Sequence[str] = NOT_OF_COMMANDS) -> str:
    """The variables for the end of a command's --help."""
    shown = [one for one in SETTINGS if one.variable not in left_out]
    rows = [f"{one.variable:22} {one.meaning}: {one.rule.allowed()} (default: {one.default})" for one in shown]
    indent = {"initial_indent": "  ", "subsequent_indent": " " * 25}
    return "\n".join(["variables (a blank one counts as unset):", *(textwrap.fill(row, 110, **indent) for row in rows)])


def markdown_table() -> str:
    """README's table of settings."""
    head = "| setting | request key | variable | values | default |\n|---|---|---|---|---|"
    keys = {one: f"`{one.key}` " if one.key else "" for one in SETTINGS}
    rows = [f"| {one.meaning} | {keys[one]}| `{one.variable}` | {one.rule.allowed()} | {one.default} |" for one in SETTINGS]
    return "\n".join([head, *rows])


if __name__ == "__main__":
    print(markdown_table())
