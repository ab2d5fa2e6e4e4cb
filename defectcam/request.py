"""What a caller sends: the envelope, its settings, its image; their limits, and what is wrong with them.

Two kinds of error, because CVAT ends a whole task run at the first answer that is not 2xx: `RequestError` for
an envelope CVAT could never send (HTTP 400), `ImageError` for a photo that cannot be processed (200 with a
tag).
"""

from __future__ import annotations

import binascii
import dataclasses
import json
import re
import reprlib
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from defectcam.text import printable

# maxRequestBodySize in the function files: 64 megapixels have 3 bytes each where nothing is compressed, 4 in base64.
MAX_BODY_BYTES = 256 << 20
MAX_REST_BYTES = 64 << 10  # of a request beside its image; settings and 200 clicks need a tenth of it
# The whole strings, and what lies between them, from the beginning of a JSON text.
JSON_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)  # without `*+`, which Python 3.11.2 matches wrongly
DATA_URL = re.compile(rb"\s*(data:([^,]{0,200}),?)", re.IGNORECASE)
ITERATIONS_MAX = 50
SHAPES = ("polygon", "mask")
IGNORED_KEYS_SHOWN = 10
MAX_CLICKS = 100
# What earlier versions had, and what to do instead.
SNAP_REMOVED = "was removed: the outline is the map's; cam_threshold makes proposals wider or narrower"
AUTO_REMOVED = 'is "auto", which was removed: give a number of steps, or leave it out for the weights\' own'
REMOVED_VARIABLES = {
    "ADVCAM_SNAP": SNAP_REMOVED,
    "ADVCAM_IDLE_SECONDS": "was removed: the networks are small and stay on the GPU",
}


class RequestError(ValueError):
    """An envelope CVAT could never send; the message names the key, its value and what is allowed."""


@dataclass(frozen=True)
class Settings:
    """What may be set per request or per deployment; None = the manifest's value for each defect, or its label's shape."""

    iterations: int | None = None  # climbing steps T, 0..50
    threshold: float | None = None  # minimum confidence of a proposal, 0..1
    cam_threshold: float | None = None  # theta, the probability above which a pixel counts, 0..1
    defects: tuple[str, ...] | None = None  # the defects to propose, not empty
    shape: str | None = None  # "polygon" or "mask"; None = masks for labels of type mask, polygons for all others
    tolerance_px: float | None = None  # Douglas-Peucker tolerance of polygons, 0..20
    hole_share: float | None = None  # holes above this share of the area are kept in polygons, 0..1
    max_proposals: int | None = None  # of a defect on a photo


@dataclass(frozen=True)
class Clicks:
    """Where an annotator says that a defect is and is not, in px of the upright photo (CVAT's interactor).

    Clicks are positions, not pixel numbers: (0.5, 0.5) is the middle of the first pixel. Whether they lie in the
    photo is not known before it is decoded.
    """

    positive_xy: tuple[tuple[float, float], ...]  # not empty unless there is a box
    negative_xy: tuple[tuple[float, float], ...]
    box_xyxy: tuple[float, float, float, float] | None  # left, top, right, bottom; left < right, top < bottom


@dataclass(frozen=True)
class Request:
    """A checked envelope."""

    image_bytes: bytes | Image.Image  # the image file, not empty, not decoded yet; or what a caller opened himself
    settings: Settings  # the request's own keys, completed by the defaults given
    ignored: tuple[str, ...]  # unknown keys of the envelope for the log: sorted, shortened, the first ten
    iterations_given: bool = False  # whether the request itself says `iterations`
    clicks: Clicks | None = None  # an interactor's request


def settings_from_env(environ: Mapping[str, str], defects: Sequence[str]) -> Settings:
    """Settings of a deployment: ADVCAM_ITERATIONS, ADVCAM_CAM_THRESHOLD and so on, one per field of Settings.

    Args:
        environ: environment variables; unset or blank = None. The defects are comma separated.
        defects: names of the defects the weights know.

    Raises:
        RequestError: a value that is not allowed; names the variable, the value and what is allowed.
    """
    for variable, removed in REMOVED_VARIABLES.items():
        if environ.get(variable, "").strip():
            raise RequestError(f"{variable} {removed}; unset it")
    if environ.get("ADVCAM_ITERATIONS", "").strip() == "auto":
        raise RequestError(f"ADVCAM_ITERATIONS {AUTO_REMOVED}")
    given = {}
    for key, rule in _rules(defects).items():
        variable = f"ADVCAM_{key.upper()}"
        text = environ.get(variable, "").strip()
        if not text:
            continue
        try:
            value = json.loads(text)  # numbers are read as strictly as in a request
        except (ValueError, RecursionError):
            value = text
        given[key] = _checked(variable, value, rule, shown=environ[variable])
    return Settings(**given)


def parse_request(body: object, defaults: Settings, defects: Sequence[str]) -> Request:
    """The request in the body of a call.

    Args:
        body: bytes (or str, bytearray, memoryview) of a JSON object in UTF-8 with at most MAX_REST_BYTES beside
            the image, or a dict. Keys: `image` (base64 of an image file, with or without a data URL's head, line
            breaks and padding) and, all optional, the fields of Settings, `defects` as a list or comma
            separated; or with `pos_points` an interactor's request: `pos_points` and `neg_points`
            [[x, y], ...] and `obj_bbox` [[x, y], [x, y]]. null counts as absent, and so does threshold 0, which
            CVAT itself leaves out. Of a repeated key the last one counts, as in a dict.
        defaults: the values of the settings that the request leaves open.
        defects: names of the defects the weights know.

    Raises:
        RequestError: whatever else comes; nothing else is raised.
    """
    envelope = _envelope(body)
    if envelope.get("snap") is not None:
        raise RequestError(f"snap {SNAP_REMOVED}; leave it out")
    if envelope.get("iterations") == "auto":
        raise RequestError(f"iterations {AUTO_REMOVED}")
    image_bytes = _base64_bytes(envelope.get("image"))
    rules = _rules(defects)
    given = {}
    for key, rule in rules.items():
        value = envelope.get(key)
        if value is None:
            continue
        value = _checked(key, value, rule, shown=value)
        if key == "threshold" and value == 0:
            continue
        given[key] = value
    clicks = _clicks(envelope)
    known = {"image", *rules, *(("pos_points", "neg_points", "obj_bbox") if clicks else ())}
    unknown = sorted(key for key in envelope if isinstance(key, str) and key not in known)
    ignored = [printable(key) for key in unknown[:IGNORED_KEYS_SHOWN]]
    settings = dataclasses.replace(defaults, **given)
    return Request(image_bytes, settings, tuple(ignored), "iterations" in given, clicks)


# What is allowed, in words; and value -> field of Settings, None if the value is not allowed.
Rule = tuple[str, Callable[[object], object]]


def _rules(defects: Sequence[str]) -> dict[str, Rule]:
    """The rule for each field of Settings."""
    return {
        "iterations": _integer(0, ITERATIONS_MAX),
        "threshold": _number(0, 1),
        "cam_threshold": _number(0, 1),
        "defects": (f"one or more of {', '.join(defects)}", lambda value: _names(value, defects)),
        "shape": (
            " or ".join(f'"{shape}"' for shape in SHAPES),
            lambda value: value if isinstance(value, str) and value in SHAPES else None,
        ),
        "tolerance_px": _number(0, 20),
        "hole_share": _number(0, 1),
        "max_proposals": _integer(1, 10_000),
    }


def _checked(name: str, value: object, rule: Rule, shown: object) -> object:
    """`value` as the rule reads it; else a RequestError that calls it `name` and shows `shown`."""
    allowed, read = rule
    result = read(value)
    if result is None:
        raise RequestError(f"{name} is {_short(shown)}, but must be {allowed}")
    return result


def _integer(low: int, high: int) -> Rule:
    def read(value: object) -> int | None:
        # type() and not isinstance(): True is an int to Python, but no number of steps
        return value if type(value) is int and low <= value <= high else None

    return f"an integer from {low} to {high}", read


def _number(low: int, high: int) -> Rule:
    def read(value: object) -> float | None:  # NaN lies in no range
        return float(value) if type(value) in (int, float) and low <= value <= high else None

    return f"a number from {low} to {high}", read


def _clicks(envelope: dict) -> Clicks | None:
    """The clicks of an interactor's request; None for a detector's, which has no `pos_points`."""
    if envelope.get("pos_points") is None:
        return None
    points = (f"a list of at most {MAX_CLICKS} points [x, y] in px", _points_xy)
    corners = ("two corners [[left, top], [right, bottom]] in px", _box_xyxy)
    rules = {"pos_points": points, "neg_points": points, "obj_bbox": corners}
    given = {key: envelope[key] for key in rules if envelope.get(key) is not None}
    found = {key: _checked(key, value, rules[key], shown=value) for key, value in given.items()}
    if not found["pos_points"] and "obj_bbox" not in found:
        raise RequestError("pos_points is [], but must have at least one point [x, y] where there is no obj_bbox")
    return Clicks(found["pos_points"], found.get("neg_points", ()), found.get("obj_bbox"))


def _points_xy(value: object) -> tuple[tuple[float, float], ...] | None:
    def is_point(point: object) -> bool:  # NaN and infinity lie in no range
        pair = isinstance(point, (list, tuple)) and len(point) == 2
        return pair and all(type(number) in (int, float) and abs(number) <= sys.float_info.max for number in point)

    if not isinstance(value, (list, tuple)) or len(value) > MAX_CLICKS or not all(map(is_point, value)):
        return None
    return tuple((float(x), float(y)) for x, y in value)


def _box_xyxy(value: object) -> tuple[float, float, float, float] | None:
    points = _points_xy(value)
    if points is None or len(points) != 2:
        return None
    (left, right), (top, bottom) = (sorted(numbers) for numbers in zip(*points))
    return (left, top, right, bottom) if left < right and top < bottom else None


def _names(value: object, known: Sequence[str]) -> tuple[str, ...] | None:
    """The names in a list or in comma separated text, each once; None if one is unknown or there is none."""
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return None
    names = tuple(dict.fromkeys(name.strip() for name in names))
    return names if names and all(name in known for name in names) else None


def _envelope(body: object) -> dict:
    """The JSON object in `body`; a long image is a view of its bytes."""
    parsed, why = body, ""
    try:
        if isinstance(body, str):
            body = body.encode()
        if isinstance(body, (bytes, bytearray, memoryview)):
            parsed = _parsed(bytes(body))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, an integer of 5000 digits
        parsed, why = None, f" ({printable(str(error))})"
    if not isinstance(parsed, dict):
        raise RequestError(f"body is {_short(body)}, but must be a JSON object with the key image{why}")
    return parsed


def _parsed(text: bytes) -> object:
    """What a JSON text says, only what lies beside its image parsed: 100 MB of "[]," would become 2 GB of lists.

    Raises:
        ValueError: it is no JSON, or more than MAX_REST_BYTES lie beside its image.
    """
    if len(text) <= MAX_REST_BYTES:
        return json.loads(text.decode("utf-8-sig"))
    start = text.find(b'"', 0, MAX_REST_BYTES)
    while start >= 0 and (whole := JSON_STRING.match(text, start, MAX_REST_BYTES)):
        start = text.find(b'"', whole.end(), MAX_REST_BYTES)
    end = text.find(b'"', start + 1)  # of the long string, the one that begins but does not end in the first bytes
    if 0 <= start < end and len(text) - (end - start) <= MAX_REST_BYTES:
        stand_in = secrets.token_hex(8)
        rest = text[: start + 1] + stand_in.encode() + text[end:]
        parsed = json.loads(rest.decode("utf-8-sig"))
        if isinstance(parsed, dict) and parsed.get("image") == stand_in:
            escaped = text.find(b"\\", start, end) >= 0
            parsed["image"] = memoryview(_unescaped(text[start + 1 : end])) if escaped else memoryview(text)[start + 1 : end]
            return parsed
    raise ValueError(f"{len(text)} bytes, of which more than {MAX_REST_BYTES} are beside the image")


def _base64_bytes(value: object) -> bytes:
    """The bytes that the envelope's `image` stands for: text, or a view of it."""
    must = "but must be an image file in base64"
    if not isinstance(value, (str, memoryview)):
        raise RequestError(f"image is {'missing' if value is None else _short(value)}, {must}")
    text = value.encode("utf-8", "replace") if isinstance(value, str) else value
    if head := DATA_URL.match(text):
        if not re.fullmatch(rb"image/.+;base64", head[2], re.IGNORECASE):
            shown = head[1][:80].decode("utf-8", "replace")
            raise RequestError(f"image begins with {shown!r}, but a data URL must begin with 'data:image/TYPE;base64,'")
        text = text[head.end() :]
    try:
        image_bytes = binascii.a2b_base64(text, strict_mode=True)  # as CVAT sends it: nothing is copied
    except ValueError:
        text = bytes(text).translate(None, b" \t\r\n\v\f")
        try:
            image_bytes = binascii.a2b_base64(text + b"=" * (-len(text) % 4), strict_mode=True)
        except ValueError as error:
            raise RequestError(f"image {_why_no_base64(text, str(error))}, {must}") from None
    if not image_bytes:
        raise RequestError(f"image is empty, {must}")
    return image_bytes


def _unescaped(text: bytes) -> bytes:
    r"""A JSON string without its escapes: some callers send / as \/ or + as \u002B.

    One with characters that base64 cannot have stays as it is: it would take four times the memory.
    """
    return text if re.search(rb"\\u(?!00)", text) else json.loads(b'"%b"' % text).encode()


def _why_no_base64(text: bytes, error: str) -> str:
    """What is wrong with a text without blanks, and the remedy where there is one."""
    other = re.search(rb"[^A-Za-z0-9+/=]", text)
    if not other:
        return f"is incomplete base64 ({error})"
    found = f"has {text[other.start() :][:4].decode('utf-8', 'replace')[0]!r} at position {other.start()}"
    if other[0] in b"-_":
        return f"{found}: replace - by + and _ by /, it is URL-safe base64"
    return f"{found}: decode its %XX, it is percent-encoded" if other[0] == b"%" else found


def _short(value: object) -> str:
    """repr(value) in at most 80 characters, whatever the value and however long."""
    if isinstance(value, (bytes, bytearray)):
        value = value[:80]  # the repr of a whole body would be four times its size
    try:
        text = reprlib.repr(value)
    except Exception:  # repr() refuses integers of more than 4300 digits
        text = f"a very long {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."
