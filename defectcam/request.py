"""What a caller sends: the envelope, its settings, its image; their limits, and what is wrong with them.

Two kinds of error, because CVAT ends a whole task run at the first answer that is not 2xx: `RequestError` for
an envelope CVAT could never send (HTTP 400), `ImageError` for a photo that cannot be processed (200 with a
tag).
"""

from __future__ import annotations

import binascii
import contextlib
import dataclasses
import io
import json
import re
import reprlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP")
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"BM", b"RIFF")
ITERATIONS_MAX = 50
SHAPES = ("polygon", "mask")
STRIP_PIXELS = 1 << 20
IGNORED_KEYS_SHOWN = 10
LARGEST_TIFF_TILE_PIXELS = 1 << 20
MAX_JPEG_SCANS = 100  # cameras write about 10; libtiff has the same limit for JPEG within TIFF
# The next marker of a JPEG file that is no part of a scan's data (FF 00, and restarts) and has a segment.
JPEG_MARKER = re.compile(rb"\xff+([^\x00\x01\xff\xd0-\xd7])")
MAX_CLICKS = 100

# Pillow warns of odd metadata and of images above 89 MP; neither concerns the caller. The filter is set once,
# here: warnings.catch_warnings around each decode would swap process-wide state under other threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


class RequestError(ValueError):
    """An envelope CVAT could never send; the message names the key, its value and what is allowed."""


class ImageError(ValueError):
    """An image that cannot be processed; the message is the reason, its most important words first."""


@dataclass(frozen=True)
class Settings:
    """What may be set per request or per deployment; None = the manifest's value for each defect."""

    iterations: int | str | None = None  # climbing steps T, 0..50, or "auto"
    threshold: float | None = None  # minimum confidence of a proposal, 0..1
    cam_threshold: float | None = None  # theta on the normalised CAM, 0..1
    snap: bool | None = None  # outlines follow image structure
    defects: tuple[str, ...] | None = None  # the defects to propose, not empty
    shape: str | None = None  # "polygon" or "mask"
    tolerance_px: float | None = None  # Douglas-Peucker tolerance of polygons, 0..20
    hole_share: float | None = None  # holes above this share of the area are kept in polygons, 0..1


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
        environ: environment variables; unset or blank = None. The defects are comma separated; snap is
            true/false or 1/0.
        defects: names of the defects the weights know.

    Raises:
        RequestError: a value that is not allowed; names the variable, the value and what is allowed.
    """
    given = {}
    for key, rule in _rules(defects).items():
        variable = f"ADVCAM_{key.upper()}"
        text = environ.get(variable, "").strip()
        if not text:
            continue
        if key == "snap":
            text = {"1": "true", "0": "false"}.get(text, text.lower())
        try:
            value = json.loads(text)  # numbers and switches are read as strictly as in a request
        except (ValueError, RecursionError):
            value = text
        given[key] = _checked(variable, value, rule, shown=environ[variable])
    return Settings(**given)


def parse_request(body: object, defaults: Settings, defects: Sequence[str]) -> Request:
    """The request in the body of a call.

    Args:
        body: what Nuclio hands over: a dict if it parsed the JSON itself, else bytes (or str, bytearray,
            memoryview) of a JSON object in UTF-8. Keys: `image` (base64 of an image file, with or without
            a data URL's head, line breaks and padding) and, all optional, the fields of Settings, `defects`
            as a list or comma separated; or with `pos_points` an interactor's request: `pos_points` and
            `neg_points` [[x, y], ...] and `obj_bbox` [[x, y], [x, y]]. null counts as absent, and so does
            threshold 0, which CVAT itself leaves out. Of a repeated key the last one counts, as in a dict.
        defaults: the values of the settings that the request leaves open.
        defects: names of the defects the weights know.

    Raises:
        RequestError: whatever else comes; nothing else is raised.
    """
    envelope = _envelope(body)
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
    ignored = [_printable(key) for key in unknown[:IGNORED_KEYS_SHOWN]]
    settings = dataclasses.replace(defaults, **given)
    return Request(image_bytes, settings, tuple(ignored), "iterations" in given, clicks)


def decode_image(source: bytes | Image.Image, max_pixels: int) -> np.ndarray:
    """Pixels of an image file as CVAT shows them: upright by EXIF, alpha dropped, first frame.

    Grey images deeper than 8 bits (16 and 32 bit, float) are scaled by their maximum, negative and non-finite
    values being 0; 16 bit colour keeps its upper byte.

    Args:
        source: a JPEG, PNG, TIFF, BMP or WebP file, or an image that Pillow has opened and perhaps not loaded.
        max_pixels: the largest width x height, checked before any pixel is decoded. Pillow's own limit of
            178 MP holds as well.

    Returns:
        (H, W, 3) uint8 RGB, C-contiguous, writable.

    Raises:
        ImageError: unknown format, too large, truncated or broken; nothing else is raised.
    """
    size = "size unknown"
    try:
        with _opened(source) as image:
            width_px, height_px = image.size
            size = f"{width_px} x {height_px} px"
            if width_px * height_px > max_pixels:
                raise _too_large(width_px * height_px, max_pixels)
            _check_tiff_tiles(image)
            if isinstance(source, bytes) and source.startswith(b"\xff\xd8"):
                _check_jpeg_scans(source)
            image.load()
            _turn_upright(image)
            return _rgb_array(image)
    except ImageError:
        raise
    except UnidentifiedImageError:
        if source.startswith(SIGNATURES):  # a TIFF's directory is often its end: gone when it is cut
            raise ImageError("image broken or unsupported: its header cannot be read") from None
        raise ImageError("image format unknown: JPEG, PNG, TIFF, BMP or WebP needed") from None
    except Image.DecompressionBombError as error:  # Pillow's own limit, met first; its text has the size
        limit = 2 * Image.MAX_IMAGE_PIXELS
        pixels = re.search(r"\((\d+) pixels\)", str(error))
        raise _too_large(int(pixels[1]) if pixels else limit, min(limit, max_pixels)) from None
    except MemoryError:
        raise ImageError(f"image too large for memory: {size}") from None
    except Exception as error:  # on hostile bytes Pillow's plug-ins raise whatever their parsing runs into
        raise ImageError(f"image broken: {_printable(str(error)) or type(error).__name__}") from None


# What is allowed, in words; and value -> field of Settings, None if the value is not allowed.
Rule = tuple[str, Callable[[object], object]]


def _rules(defects: Sequence[str]) -> dict[str, Rule]:
    """The rule for each field of Settings."""
    return {
        "iterations": (f'an integer from 0 to {ITERATIONS_MAX} or "auto"', _iterations),
        "threshold": _number(0, 1),
        "cam_threshold": _number(0, 1),
        "snap": ("true or false", lambda value: value if isinstance(value, bool) else None),
        "defects": (f"one or more of {', '.join(defects)}", lambda value: _names(value, defects)),
        "shape": (
            " or ".join(f'"{shape}"' for shape in SHAPES),
            lambda value: value if isinstance(value, str) and value in SHAPES else None,
        ),
        "tolerance_px": _number(0, 20),
        "hole_share": _number(0, 1),
    }


def _checked(name: str, value: object, rule: Rule, shown: object) -> object:
    """`value` as the rule reads it; else a RequestError that calls it `name` and shows `shown`."""
    allowed, read = rule
    result = read(value)
    if result is None:
        raise RequestError(f"{name} is {_short(shown)}, but must be {allowed}")
    return result


def _iterations(value: object) -> int | str | None:
    # type() and not isinstance(): True is an int to Python, but no number of steps
    in_range = type(value) is int and 0 <= value <= ITERATIONS_MAX
    return value if in_range or isinstance(value, str) and value == "auto" else None


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
        return pair and all(type(number) in (int, float) and abs(number) < 1e6 for number in point)

    if not isinstance(value, (list, tuple)) or len(value) > MAX_CLICKS or not all(map(is_point, value)):
        return None
    return tuple((float(x), float(y)) for x, y in value)


def _box_xyxy(value: object) -> tuple[float, float, float, float] | None:
    points = _points_xy(value)
    if points is None or len(points) != 2:
        return None
    (left, right), (top, bottom) = (sorted(numbers) for numbers in zip(*points))
    return (left, top, right, bottom) if left < right and top < bottom else None


def _opened(source: bytes | Image.Image) -> contextlib.AbstractContextManager[Image.Image]:
    """The image of a file, to be closed afterwards; an opened one is its owner's to close."""
    if isinstance(source, Image.Image):
        return contextlib.nullcontext(source)
    return Image.open(io.BytesIO(source), formats=FORMATS)


def _names(value: object, known: Sequence[str]) -> tuple[str, ...] | None:
    """The names in a list or in comma separated text, each once; None if one is unknown or there is none."""
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return None
    names = tuple(dict.fromkeys(name.strip() for name in names))
    return names if names and all(name in known for name in names) else None


def _envelope(body: object) -> dict:
    """The JSON object in `body`."""
    parsed, why = body, ""
    try:
        if isinstance(body, (bytes, bytearray, memoryview)):
            parsed = bytes(body).decode("utf-8")
        if isinstance(parsed, str):
            parsed = json.loads(parsed.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, an integer of 5000 digits
        parsed, why = None, f" ({_printable(str(error))})"
    if not isinstance(parsed, dict):
        raise RequestError(f"body is {_short(body)}, but must be a JSON object with the key image{why}")
    return parsed


def _base64_bytes(value: object) -> bytes:
    """The bytes that the envelope's `image` stands for."""
    if isinstance(value, str):
        head = re.match(r"\s*data:image/[^,]{1,80};base64,", value)
        try:
            # Of text without a head, line breaks or missing padding, as CVAT sends it, nothing here makes a copy.
            text = value[head.end() :] if head else value
            if re.search(r"[ \t\r\n\v\f]", text):
                text = text.encode("ascii").translate(None, b" \t\r\n\v\f").decode()
            image_bytes = binascii.a2b_base64(text + "=" * (-len(text) % 4), strict_mode=True)
        except ValueError:
            image_bytes = b""
        if image_bytes:
            return image_bytes
    shown = "missing" if value is None else _short(value)
    raise RequestError(f"image is {shown}, but must be an image file in base64")


def _short(value: object) -> str:
    """repr(value) in at most 80 characters, whatever the value and however long."""
    if isinstance(value, (bytes, bytearray)):
        value = value[:80]  # the repr of a whole body would be four times its size
    try:
        text = reprlib.repr(value)
    except Exception:  # repr() refuses integers of more than 4300 digits
        text = f"a very long {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def _printable(text: str) -> str:
    """At most 100 characters of `text`, none that a log or CVAT's database refuses (NUL, surrogates)."""
    return "".join(character for character in text[:100] if character.isprintable())


def _too_large(pixels: int, limit: int) -> ImageError:
    return ImageError(f"image too large: {pixels / 1e6:g} MP, limit {limit / 1e6:g} MP")


def _check_tiff_tiles(image: Image.Image) -> None:
    """A TIFF is decoded tile by tile, and its tiles may be far larger than the image they are cut from."""
    tags = getattr(image, "tag_v2", {})
    tile_pixels = int(tags.get(322, 0)) * int(tags.get(323, 0))  # TileWidth, TileLength
    if tile_pixels > max(image.width * image.height, LARGEST_TIFF_TILE_PIXELS):
        raise ImageError(f"image too large: TIFF tiles of {tile_pixels / 1e6:g} MP")


def _check_jpeg_scans(jpeg: bytes) -> None:
    """A scan of a few bytes is work for the whole image, and a file may have any number of them."""
    scans, start = 0, 2
    while (marker := JPEG_MARKER.search(jpeg, start)) and marker[1] != b"\xd9":  # end of the image
        scans += marker[1] == b"\xda"
        start = marker.end() + int.from_bytes(jpeg[marker.end() : marker.end() + 2], "big")  # thumbnails are skipped
    if scans > MAX_JPEG_SCANS:
        raise ImageError(f"image takes too long to decode: JPEG of {scans} scans, limit {MAX_JPEG_SCANS}; save it anew")


def _turn_upright(image: Image.Image) -> None:
    """Apply a loaded image's EXIF orientation: CVAT sends images already turned, direct callers do not."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:  # never a sideways image because memory was short
        raise
    except Exception:  # broken EXIF raises all sorts, but leaves the pixels good
        pass


def _rgb_array(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8 of a loaded image of any mode, strip by strip: no second full-size copy on the way."""
    rgb = np.empty((image.height, image.width, 3), np.uint8)
    deep = image.mode in ("I", "F") or image.mode.startswith("I;16")
    if deep:
        # 8 bits would clip nearly all of it to white; CVAT scales it for display too
        maximum = max(_nonnegative(strip).max() for _, strip in _strips(image))
        scale = 255 / maximum if maximum > 0 else 0.0
    for rows, strip in _strips(image):
        if deep:
            rgb[rows] = np.rint(_nonnegative(strip) * scale).astype(np.uint8)[..., None]
        else:
            rgb[rows] = np.asarray(strip.convert("RGB"))
    return rgb


def _strips(image: Image.Image) -> Iterator[tuple[slice, Image.Image]]:
    """Row ranges of about STRIP_PIXELS pixels and their parts of the image, top to bottom."""
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        yield slice(top, bottom), image.crop((0, top, image.width, bottom))


def _nonnegative(strip: Image.Image) -> np.ndarray:
    """(h, w) float64 values of a grey strip, with 0 for negative and non-finite ones."""
    values = np.asarray(strip).astype(np.float64)
    return np.where(np.isfinite(values) & (values > 0), values, 0.0)
