"""What a pydantic model refuses, in plain words."""

from __future__ import annotations

from pydantic import ConfigDict, ValidationError

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)  # no conversions: "3" and true are no numbers


def first_problem(error: ValidationError) -> str:
    """The first value that does not fit: its field, what is allowed, and the value.

    A ValueError that a model's own check raises is shown with its own words.
    """
    problem = error.errors()[0]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]).lstrip(".")
    kind, reason, value = problem["type"], problem["msg"], f"{problem['input']!r:.80}"
    if kind == "value_error":
        return f"{field} {problem['ctx']['error']}".lstrip()
    if kind == "missing":
        return f"{field!r} is missing"
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{field!r} is no field that is known"
    if reason.startswith("Input should "):
        return f"{field} must {reason.removeprefix('Input should ')}, not {value}".lstrip()
    return f"{field}: {reason}".removeprefix(": ")
