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
import secrets
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP")
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"BM", b"RIFF")
# maxRequestBodySize in the function files: 64 megapixels have 3 bytes each where nothing is compressed, 4 in base64.
MAX_BODY_BYTES = 256 << 20
MAX_REST_BYTES = 64 << 10  # of a request beside its image; settings and 200 clicks need a tenth of it
# The whole strings, and what lies between them, from the beginning of a JSON text.
JSON_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)  # without `*+`, which Python 3.11.2 matches wrongly
DATA_URL = re.compile(rb"\s*(data:([^,]{0,200}),?)", re.IGNORECASE)
ITERATIONS_MAX = 50
SHAPES = ("polygon", "mask")
STRIP_PIXELS = 1 << 20
IGNORED_KEYS_SHOWN = 10
LARGEST_TIFF_TILE_PIXELS = 1 << 20
MAX_JPEG_SCANS = 100  # cameras write about 10; libtiff has the same limit for JPEG within TIFF
# The next marker of a JPEG file that is no part of a scan's data (FF 00, and restarts) and has a segment.
JPEG_MARKER = re.compile(rb"\xff+([^\x00\x01\xff\xd0-\xd7])")
JPEG_END = b"\xff\xd9"
# Any data of a scan that begins with other bits than the zeros that libjpeg adds, enough for MISSING_SHARE of any photo.
JPEG_FILLER = bytes(range(254, -1, -1)) * 4096
MISSING_SHARE = 1 / 200  # of its pixels that a JPEG cut off at its end may lack: a few blocks of a small photo
MAX_CLICKS = 100
ORIENTATION_TAG = 0x0112  # of EXIF
# What earlier versions had, and what to do instead.
SNAP_REMOVED = "was removed: the outline is the map's; cam_threshold makes proposals wider or narrower"
AUTO_REMOVED = 'is "auto", which was removed: give a number of steps, or leave it out for the weights\' own'
REMOVED_VARIABLES = {
    "ADVCAM_SNAP": SNAP_REMOVED,
    "ADVCAM_IDLE_SECONDS": "was removed: the networks are small and stay on the GPU",
}

# Pillow warns of odd metadata and of images above 89 MP; neither concerns the caller. The filter is set once,
# here: warnings.catch_warnings around each decode would swap process-wide state under other threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


class RequestError(ValueError):
    """An envelope CVAT could never send; the message names the key, its value and what is allowed."""


class ImageError(ValueError):
    """An image that cannot be processed; the message is the reason, its most important words first.

    CVAT shows about 20 characters. A remedy names only what CVAT 2.15 has.
    """


@dataclass(frozen=True)
class Settings:
    """What may be set per request or per deployment; None = the manifest's value for each defect."""

    iterations: int | None = None  # climbing steps T, 0..50
    threshold: float | None = None  # minimum confidence of a proposal, 0..1
    cam_threshold: float | None = None  # theta, the probability above which a pixel counts, 0..1
    defects: tuple[str, ...] | None = None  # the defects to propose, not empty
    shape: str | None = None  # "polygon" or "mask"
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
    ignored = [_printable(key) for key in unknown[:IGNORED_KEYS_SHOWN]]
    settings = dataclasses.replace(defaults, **given)
    return Request(image_bytes, settings, tuple(ignored), "iterations" in given, clicks)


def image_size(source: bytes | Image.Image, max_pixels: int) -> tuple[int, int]:
    """(height, width) in px as an image file's header has them; arguments and errors as `decode_image`."""
    with _opened(source, max_pixels) as image:
        return image.height, image.width


def upright_size(source: bytes | Image.Image, max_pixels: int) -> tuple[int, int]:
    """(height, width) in px of what `decode_image` makes of an image file; of all but some PNGs from the header alone."""
    with _opened(source, max_pixels) as image:
        try:
            turned = image.format != "TIFF" and image.getexif().get(ORIENTATION_TAG) in (5, 6, 7, 8)
        except Exception:  # as in _turn_upright
            turned = False
        return (image.width, image.height) if turned else (image.height, image.width)  # a TIFF's size is turned already


def decode_image(source: bytes | Image.Image, max_pixels: int) -> np.ndarray:
    """Pixels of an image file as CVAT shows them: upright by EXIF, alpha dropped, first frame.

    Grey images deeper than 8 bits (16 and 32 bit, float) are scaled by their maximum, negative and non-finite
    values being 0; 16 bit colour keeps its upper byte. A JPEG may lack its end, but hardly any pixel.

    Args:
        source: a JPEG, PNG, TIFF, BMP or WebP file, or an image that Pillow has opened and perhaps not loaded.
        max_pixels: the largest width x height, checked before any pixel is decoded. Pillow's own limit of
            178 MP holds as well.

    Returns:
        (H, W, 3) uint8 RGB, C-contiguous, writable.

    Raises:
        ImageError: unknown format, too large, truncated or broken; nothing else is raised.
    """
    with _opened(source, max_pixels) as image:
        try:
            image.load()
        except OSError:
            if not _is_jpeg(source):
                raise
            image = _without_end(source)
        _turn_upright(image)
        return _rgb_array(image)


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


@contextlib.contextmanager
def _opened(source: bytes | Image.Image, max_pixels: int) -> Iterator[Image.Image]:
    """The image of a file, its header checked; any error that reading it runs into inside becomes an ImageError."""
    size = "size unknown"
    try:
        # An opened image is its owner's to close.
        opened = isinstance(source, Image.Image)
        with contextlib.nullcontext(source) if opened else Image.open(io.BytesIO(source), formats=FORMATS) as image:
            width_px, height_px = image.size
            size = f"{width_px} x {height_px} px"
            if width_px * height_px > max_pixels:
                raise _too_large(width_px * height_px, max_pixels)
            _check_tiff_tiles(image)
            if _is_jpeg(source):
                _check_jpeg_scans(source)
            yield image
    except ImageError:
        raise
    except UnidentifiedImageError:
        if source.startswith(SIGNATURES):  # a TIFF's directory is often its end: gone when it is cut
            raise ImageError("broken image: its header cannot be read; save it anew") from None
        raise ImageError("unknown format: JPEG, PNG, TIFF, BMP or WebP needed") from None
    except Image.DecompressionBombError as error:  # Pillow's own limit, met first; its text has the size
        limit = 2 * Image.MAX_IMAGE_PIXELS
        pixels = re.search(r"\((\d+) pixels\)", str(error))
        raise _too_large(int(pixels[1]) if pixels else limit, min(limit, max_pixels)) from None
    except MemoryError:
        raise ImageError(f"out of memory: {size}; use a smaller photo") from None
    except Exception as error:  # on hostile bytes Pillow's plug-ins raise whatever their parsing runs into
        raise ImageError(f"broken image: {_printable(str(error)) or type(error).__name__}") from None


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
        parsed, why = None, f" ({_printable(str(error))})"
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


def _printable(text: str) -> str:
    """At most 100 characters of `text`, none that a log or CVAT's database refuses (NUL, surrogates)."""
    return "".join(character for character in text[:100] if character.isprintable())


def _too_large(pixels: int, limit: int) -> ImageError:
    return ImageError(f"too large {pixels / 1e6:.8g}>{limit / 1e6:.8g} MP; use a smaller photo")


def _check_tiff_tiles(image: Image.Image) -> None:
    """A TIFF is decoded tile by tile, and its tiles may be far larger than the image they are cut from."""
    tags = getattr(image, "tag_v2", {})
    tile_pixels = int(tags.get(322, 0)) * int(tags.get(323, 0))  # TileWidth, TileLength
    if tile_pixels > max(image.width * image.height, LARGEST_TIFF_TILE_PIXELS):
        raise ImageError(f"too large TIFF tiles of {tile_pixels / 1e6:g} MP; save it anew")


def _is_jpeg(source: bytes | Image.Image) -> bool:
    return isinstance(source, bytes) and source.startswith(b"\xff\xd8")


def _jpeg_segments(jpeg: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, content) of the segments up to the image's end; the data of scans is left out."""
    start = 2
    while (marker := JPEG_MARKER.search(jpeg, start)) and marker[1] != JPEG_END[1:]:
        length = int.from_bytes(jpeg[marker.end() : marker.end() + 2], "big")
        yield marker[1][0], jpeg[marker.end() + 2 : marker.end() + length]
        start = marker.end() + length  # thumbnails are skipped


def _check_jpeg_scans(jpeg: bytes) -> None:
    """A scan of a few bytes is work for the whole image, and a file may have any number of them."""
    scans = sum(marker == 0xDA for marker, _ in _jpeg_segments(jpeg))
    if scans > MAX_JPEG_SCANS:
        raise ImageError(f"too many JPEG scans {scans}>{MAX_JPEG_SCANS}; save it anew")


def _without_end(jpeg: bytes) -> Image.Image:
    """A JPEG without its end, decoded; at most MISSING_SHARE of its pixels may be missing.

    Libjpeg makes up what is missing, and does not tell. So the file is ended in two ways: a pixel that is the same in
    both does not depend on what would have followed.

    Raises:
        ImageError: more pixels are missing, or a whole scan.
    """
    images = [Image.open(io.BytesIO(jpeg + filler + JPEG_END)) for filler in (b"", JPEG_FILLER)]
    for image in images:
        image.load()
    pairs = ((np.atleast_3d(one), np.atleast_3d(other)) for (_, one), (_, other) in zip(*map(_strips, images)))
    differing = sum(np.count_nonzero((one != other).any(axis=2)) for one, other in pairs)
    missing = differing / (images[0].width * images[0].height) if _has_all_scans(jpeg) else 1.0
    if missing > MISSING_SHARE:
        raise ImageError("broken image: the JPEG file is cut off; send the whole file")
    return images[0]


def _has_all_scans(jpeg: bytes) -> bool:
    """Whether every coefficient of every component has its scan, to the last bit."""
    components, sent = b"", set()
    for marker, content in _jpeg_segments(jpeg):
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            components = content[6::3]
        elif marker == 0xDA:
            first, last, bits = content[1 + 2 * content[0] :][:3]
            if bits & 0x0F == 0:  # the last bit
                sent |= {(name, k) for name in content[1 : 1 + 2 * content[0] : 2] for k in range(first, last + 1)}
    return sent >= {(name, k) for name in components for k in range(64)}


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
        dtype = _grey_dtype(image)
        maximum = max(_nonnegative(strip, dtype).max() for _, strip in _strips(image))
        scale = 255 / maximum if maximum > 0 else 0.0
    for rows, strip in _strips(image):
        if deep:
            rgb[rows] = np.rint(_nonnegative(strip, dtype) * scale).astype(np.uint8)[..., None]
        else:
            rgb[rows] = np.asarray(strip.convert("RGB"))
    return rgb


def _grey_dtype(image: Image.Image) -> np.dtype | None:
    """What the 32 bits of a grey TIFF are where Pillow mistakes them; else None.

    Its mode I is signed, whatever the file says; and it swaps a compressed file's bytes once more than libtiff, which has
    done so already.
    """
    tags = getattr(image, "tag_v2", None)
    if not tags or tags.get(258) != (32,):  # BitsPerSample
        return None
    kind = {"F": "f4", "I": "u4" if tags.get(339, (1,)) == (1,) else "i4"}[image.mode]  # SampleFormat
    swapped = tags.prefix == b"MM" and tags.get(259, 1) != 1  # Compression
    return np.dtype(kind).newbyteorder("S" if swapped else "=")


def _strips(image: Image.Image) -> Iterator[tuple[slice, Image.Image]]:
    """Row ranges of about STRIP_PIXELS pixels and their parts of the image, top to bottom."""
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        yield slice(top, bottom), image.crop((0, top, image.width, bottom))


def _nonnegative(strip: Image.Image, dtype: np.dtype | None) -> np.ndarray:
    """(h, w) float64 values of a grey strip, with 0 for negative and non-finite ones."""
    values = np.asarray(strip)
    values = (values if dtype is None else values.view(dtype)).astype(np.float64)
    return np.where(np.isfinite(values) & (values > 0), values, 0.0)
