"""What a caller sends: the envelope, its settings, its image, and what is wrong with them.

Two kinds of error, because CVAT ends a whole task run at the first answer that is not 2xx: `RequestError` for
an envelope CVAT could never send (HTTP 400), `ImageError` for a photo that cannot be processed (200 with a
tag).
"""

from __future__ import annotations

import binascii
import dataclasses
import json
import re
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from defectcam.settings import SETTINGS, SNAP_REMOVED, RequestError, Rule, Settings, checked
from defectcam.text import printable, shortened

# maxRequestBodySize in the function files: 64 megapixels have 3 bytes each where nothing is compressed, 4 in base64.
MAX_BODY_BYTES = 256 << 20
MAX_REST_BYTES = 64 << 10  # of a request beside its image; settings and 200 clicks need a tenth of it
# The whole strings, and what lies between them, from the beginning of a JSON text.
JSON_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)  # without `*+`, which Python 3.11.2 matches wrongly
DATA_URL = re.compile(rb"\s*(data:([^,]{0,200}),?)", re.IGNORECASE)
IGNORED_KEYS_SHOWN = 10
MAX_CLICKS = 100


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
    image_bytes = _base64_bytes(envelope.get("image"))
    rules = {setting.key: setting.rule for setting in SETTINGS if setting.key}
    given = _checked(envelope, rules, defects)
    if given.get("threshold") == 0:
        del given["threshold"]
    clicks = _clicks(envelope)
    known = {"image", *rules, *(("pos_points", "neg_points", "obj_bbox") if clicks else ())}
    unknown = sorted(key for key in envelope if isinstance(key, str) and key not in known)
    ignored = [printable(key) for key in unknown[:IGNORED_KEYS_SHOWN]]
    settings = dataclasses.replace(defaults, **given)
    return Request(image_bytes, settings, tuple(ignored), "iterations" in given, clicks)


def _checked(envelope: dict, rules: Mapping[str, Rule], defects: Sequence[str] = ()) -> dict:
    """What the envelope has of the keys of some rules, as those read it; null counts as absent."""
    given = {key: envelope[key] for key in rules if envelope.get(key) is not None}
    return {key: checked(key, value, rules[key], value, defects) for key, value in given.items()}


def _clicks(envelope: dict) -> Clicks | None:
    """The clicks of an interactor's request; None for a detector's, which has no `pos_points`."""
    if envelope.get("pos_points") is None:
        return None
    points = Rule(f"a list of at most {MAX_CLICKS} points [x, y] in px", lambda value, _: _points_xy(value))
    corners = Rule("two corners [[left, top], [right, bottom]] in px", lambda value, _: _box_xyxy(value))
    found = _checked(envelope, {"pos_points": points, "neg_points": points, "obj_bbox": corners})
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
        raise RequestError(f"body is {shortened(body)}, but must be a JSON object with the key image{why}")
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
        raise RequestError(f"image is {'missing' if value is None else shortened(value)}, {must}")
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
