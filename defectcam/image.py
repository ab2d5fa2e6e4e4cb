"""The one reader of photos: any file that people bring to (H, W, 3) uint8 RGB, upright, or an error that says what to do.

Pillow reads JPEG (MPO too), PNG, TIFF, BMP and WebP, and HEIC where pillow-heif is installed; `defectcam.tiff` reads the
TIFFs that Pillow does not know. Raw photos (DNG, CR2, NEF), JPEG 2000 and others are refused by name.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from defectcam.settings import LARGEST_MEGAPIXELS, MAX_MEGAPIXELS, read_variable
from defectcam.text import printable

try:
    import pillow_heif
except ImportError:
    pillow_heif = None
else:
    pillow_heif.register_heif_opener()

if TYPE_CHECKING:
    from defectcam.tiff import TiffBands

HEIC_SUFFIXES = (".heic", ".heif")
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP", *(("HEIF",) if pillow_heif else ()))  # as Pillow calls them
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".mpo", *(HEIC_SUFFIXES if pillow_heif else ()))
# Files that people take for photos, and that are not read.
OTHER_SUFFIXES = frozenset(
    ".dng .cr2 .cr3 .nef .arw .raf .orf .rw2 .pef .srw .jp2 .j2k .jpf .jpx .jxl .avif .gif .psd .ecw .sid .heic .heif".split()
) - set(PHOTO_SUFFIXES)
SAVE_ANEW = "save it as JPEG, PNG or TIFF"
HEIC_REMEDY = "pip install pillow-heif"
# Beginnings of files of formats that are read, and of some that are not.
TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", *TIFF_SIGNATURES, b"BM", b"RIFF")
OTHER_SIGNATURES = {
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
    b"GIF8": "GIF",
    b"8BPS": "Photoshop",
    b"%PDF": "PDF",
    b"FUJIFILMCCD": "raw (RAF)",
    b"II*\0\x10\0\0\0CR": "raw (CR2)",
    b"IIRO": "raw (ORF)",
    b"IIRS": "raw (ORF)",
    b"IIU\0": "raw (RW2)",
}
BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"crx ": "raw (CR3)"}  # of files that begin as MP4 does; others are HEIC
STRIP_PIXELS = 1 << 20
LARGEST_TIFF_TILE_PIXELS = 1 << 20
MAX_JPEG_SCANS = 100  # cameras write about 10; libtiff has the same limit for JPEG within TIFF
# The next marker of a JPEG file that is no part of a scan's data (FF 00, and restarts) and has a segment.
JPEG_MARKER = re.compile(rb"\xff+([^\x00\x01\xff\xd0-\xd7])")
JPEG_END = b"\xff\xd9"
# Any data of a scan that begins with other bits than the zeros that libjpeg adds, enough for MISSING_SHARE of any photo.
JPEG_FILLER = bytes(range(254, -1, -1)) * 4096
MISSING_SHARE = 1 / 200  # of its pixels that a JPEG cut off at its end may lack: a few blocks of a small photo
# Tags of TIFF and EXIF.
SUBFILE_TYPE, BITS, COMPRESSION, PHOTOMETRIC, ORIENTATION, PLANAR = 254, 258, 259, 262, 274, 284
TILE_WIDTH, TILE_LENGTH, SUB_IFDS, SAMPLE_FORMAT, GDAL_NODATA, DNG_VERSION = 322, 323, 330, 339, 42113, 50706

# Pillow warns of odd metadata and of images above 89 MP; neither concerns the caller. The filter is set once,
# here: warnings.catch_warnings around each decode would swap process-wide state under other threads.
warnings.filterwarnings("ignore", module=r"PIL\.")
Image.MAX_IMAGE_PIXELS = None  # the limit here is checked as early: once the header is read


class ImageError(ValueError):
    """An image that cannot be processed; the message is the reason, its most important words first.

    CVAT shows about 20 characters.
    """


def pixel_limit(environ: Mapping[str, str] = os.environ) -> int:
    """The largest width x height of a photo, px, as ADVCAM_MAX_MEGAPIXELS has it: for the function and all commands.

    Raises:
        RequestError: naming the variable, its value and what is allowed.
    """
    return int(1e6 * (read_variable(environ, "ADVCAM_MAX_MEGAPIXELS") or MAX_MEGAPIXELS))


def image_size(source: bytes | Image.Image, max_pixels: int) -> tuple[int, int]:
    """(height, width) in px as an image file's header has them; arguments and errors as `decode_image`."""
    with _opened(source, max_pixels) as image:
        return image.height, image.width


def upright_size(source: bytes | Image.Image, max_pixels: int | None) -> tuple[int, int]:
    """(height, width) in px of what `decode_image` makes of an image file; of all but some PNGs from the header alone.

    Args, errors: as of `decode_image`; with None for `max_pixels` also of a file that has a header, but cannot be decoded.
    """
    with _opened(source, max_pixels) as image:
        turned = image.format != "TIFF" and _orientation(image) in (5, 6, 7, 8)  # a TIFF's size is turned already
        return (image.width, image.height) if turned else (image.height, image.width)


def decode_image(source: bytes | Image.Image, max_pixels: int) -> np.ndarray:
    """Pixels of an image file as CVAT shows them: upright by EXIF, alpha dropped, first frame.

    Grey deeper than 8 bits (12, 16 and 32 bits, float) is scaled by its maximum. A range that lies far from zero, its
    minimum above half of its maximum or below zero, is scaled from its minimum. Pixels that are not finite or have the
    TIFF's no-data value are black, and so is a lowest negative value that lies apart, such as -9999. 16 bit colour keeps
    its upper byte; where that has less than 8 bits, such as of 12 bits in 16, all channels are scaled together, as grey is.
    Of a TIFF with more bands the first three are red, green and blue, whatever they are; of two bands the first is grey.
    A JPEG may lack its end, but hardly any pixel.

    Args:
        source: a JPEG, PNG, TIFF, BMP, WebP or HEIC file, or an image that Pillow has opened and perhaps not loaded.
        max_pixels: the largest width x height, checked before any pixel is decoded.

    Returns:
        (H, W, 3) uint8 RGB, C-contiguous, writable.

    Raises:
        ImageError: unknown format, too large, truncated or broken; nothing else is raised.
    """
    with _opened(source, max_pixels) as image:
        if not isinstance(image, Image.Image):
            return _rgb_of_bands(image)
        deep = _is_deep_colour(image)
        file = _file_of(source) if deep else b""
        orientation = _orientation(image) if deep else 1
        try:
            image.load()
        except OSError:
            if not _is_jpeg(source):
                raise
            image = _without_end(source)
        _turn_upright(image)
        rgb = _rgb_array(image)
        if file and rgb.max() < 128:  # what Pillow left out counts
            return _rgb_of_deep_file(file, orientation)
        return rgb


@contextlib.contextmanager
def _opened(source: bytes | Image.Image, max_pixels: int | None) -> Iterator[Image.Image | TiffBands]:
    """The image of a file, its header checked; any error that reading it runs into inside becomes an ImageError."""
    size = "size unknown"
    try:
        # An opened image is its owner's to close.
        usable = isinstance(source, Image.Image) and not (_has_planes(source) and _file_of(source))
        with contextlib.nullcontext(source) if usable else _open(_file_of(source)) as image:
            size = f"{image.width} x {image.height} px"
            if max_pixels is not None:
                _check(source, image, max_pixels)
            yield image
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise _unknown_format(source) from None
    except MemoryError:
        raise ImageError(f"out of memory: {size}; use a smaller photo") from None
    except Exception as error:  # on hostile bytes Pillow's plug-ins raise whatever their parsing runs into
        raise ImageError(f"broken image: {printable(str(error)) or type(error).__name__}") from None


def _check(source: bytes | Image.Image, image: Image.Image | TiffBands, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise _too_large(image.width * image.height, max_pixels)
    if isinstance(image, Image.Image):
        _check_tiff(image)
    if _is_jpeg(source):
        _check_jpeg_scans(source)


def _open(source: bytes) -> Image.Image | TiffBands:
    """What reads the pixels of a file: Pillow, or for a TIFF that it does not know `defectcam.tiff`."""
    for start, name in OTHER_SIGNATURES.items():
        if source.startswith(start):
            raise ImageError(f"{name} is not read: {SAVE_ANEW}")
    try:
        image = Image.open(io.BytesIO(source), formats=FORMATS)
    except (UnidentifiedImageError, SyntaxError, ValueError, KeyError):
        if not source.startswith(TIFF_SIGNATURES):
            raise
        image = None
    if image and not _has_planes(image):
        return image
    from defectcam.tiff import TiffBands

    return TiffBands(source)


def _has_planes(image: Image.Image) -> bool:
    """Whether Pillow takes the first band for the whole, or mixes bands: other planes than red, green and blue of 8 bits."""
    tags = getattr(image, "tag_v2", {})
    return tags.get(PLANAR) == 2 and (tags.get(PHOTOMETRIC) != 2 or max(tags.get(BITS, (1,))) > 8)


def _unknown_format(source: bytes) -> ImageError:
    brand = BRANDS.get(source[8:12], "HEIC") if source[4:8] == b"ftyp" else None
    if brand == "HEIC" and not pillow_heif:
        return ImageError(f"HEIC is not read here: {HEIC_REMEDY}, or {SAVE_ANEW}")
    if brand and brand != "HEIC":
        return ImageError(f"{brand} is not read: {SAVE_ANEW}")
    if brand or source.startswith(SIGNATURES):  # a TIFF's directory is often its end: gone when it is cut
        return ImageError("broken image: its header cannot be read; save it anew")
    return ImageError("unknown format: JPEG, PNG, TIFF, BMP or WebP needed")


def _too_large(pixels: int, limit: int) -> ImageError:
    raised = "" if pixels > LARGEST_MEGAPIXELS * 1e6 else "raise ADVCAM_MAX_MEGAPIXELS, "
    return ImageError(
        f"too large {pixels / 1e6:.8g}>{limit / 1e6:.8g} MP; use a smaller photo, {raised}or defectcam propose, which takes "
        "large photos in parts"
    )


def check_raw(tags: Mapping[int, object]) -> None:
    """Refuse a raw photo: Pillow would read its thumbnail, and nothing would tell.

    Args:
        tags: of the first directory of a TIFF.

    Raises:
        ImageError: it is one.
    """
    thumbnail_first = int(tags.get(SUBFILE_TYPE) or 0) & 1 and SUB_IFDS in tags
    if DNG_VERSION in tags or thumbnail_first:
        what = "DNG" if DNG_VERSION in tags else "raw photo (TIFF that begins with a thumbnail)"
        raise ImageError(f"{what} is not read: {SAVE_ANEW}")


def check_tile(tile_pixels: int, pixels: int) -> None:
    """A TIFF is decoded tile by tile, and its tiles may be far larger than the image they are cut from."""
    if tile_pixels > max(pixels, LARGEST_TIFF_TILE_PIXELS):
        raise ImageError(f"too large TIFF tiles of {tile_pixels / 1e6:g} MP; save it anew")


def _check_tiff(image: Image.Image) -> None:
    tags = getattr(image, "tag_v2", None)
    if tags:
        check_raw(tags)
        check_tile(int(tags.get(TILE_WIDTH, 0)) * int(tags.get(TILE_LENGTH, 0)), image.width * image.height)


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


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where it is unknown."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:  # as in _turn_upright
        return 1


def _is_deep_colour(image: Image.Image) -> bool:
    """Whether Pillow will drop bits of a file: it has no mode for 16 bits in more than one band."""
    return len(image.getbands()) > 1 and any(";16" in str(tile) for tile in getattr(image, "tile", ()))


def _file_of(source: bytes | Image.Image) -> bytes:
    """The file that an image was opened from; empty where it is not known any more."""
    if isinstance(source, bytes):
        return source
    file = getattr(source, "fp", None)
    if not file:
        return b""
    place = file.tell()
    file.seek(0)
    content = file.read()
    file.seek(place)
    return content


def _rgb_of_deep_file(file: bytes, orientation: int) -> np.ndarray:
    """A PNG or TIFF of 16 bit colour, scaled by its maximum."""
    if file.startswith(TIFF_SIGNATURES):
        from defectcam.tiff import TiffBands

        with TiffBands(file) as bands:
            return _rgb_of_bands(bands)
    values = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_UNCHANGED)
    return _upright(_scaled(lambda: _row_strips(values[..., 2::-1]), *values.shape[:2]), orientation)


def _rgb_of_bands(bands: TiffBands) -> np.ndarray:
    """The first band as grey, or the first three as colour; bands of 8 bits as they are, others scaled."""
    values = bands.read()
    if values.dtype == np.uint8:
        rgb = values if values.ndim == 3 else np.repeat(values[..., None], 3, axis=2)
    else:
        rgb = _scaled(lambda: _row_strips(values), *values.shape[:2], bands.no_data)
    return _upright(rgb, bands.orientation)


def _upright(rgb: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, 3), turned by its EXIF orientation; C-contiguous."""
    if orientation in (5, 6, 7, 8):
        rgb = rgb.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        rgb = rgb[:, ::-1]
    if orientation in (3, 4, 7, 8):
        rgb = rgb[::-1]
    return np.ascontiguousarray(rgb)


def _rgb_array(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8 of a loaded image of any mode, strip by strip: no second full-size copy on the way."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        # 8 bits would clip nearly all of it to white; CVAT scales it for display too
        dtype = _grey_dtype(image)

        def values() -> Iterator[tuple[slice, np.ndarray]]:
            grey = ((rows, np.asarray(strip)) for rows, strip in _strips(image))
            return ((rows, strip if dtype is None else strip.view(dtype)) for rows, strip in grey)

        return _scaled(values, image.height, image.width, no_data_value(getattr(image, "tag_v2", {}).get(GDAL_NODATA)))
    rgb = np.empty((image.height, image.width, 3), np.uint8)
    for rows, strip in _strips(image):
        rgb[rows] = np.asarray(strip.convert("RGB"))
    return rgb


def _grey_dtype(image: Image.Image) -> np.dtype | None:
    """What the 32 bits of a grey TIFF are where Pillow mistakes them; else None.

    Its mode I is signed, whatever the file says; and it swaps a compressed file's bytes once more than libtiff, which has
    done so already.
    """
    tags = getattr(image, "tag_v2", None)
    if not tags or tags.get(BITS) != (32,):
        return None
    kind = {"F": "f4", "I": "u4" if tags.get(SAMPLE_FORMAT, (1,)) == (1,) else "i4"}[image.mode]
    swapped = tags.prefix == b"MM" and tags.get(COMPRESSION, 1) != 1
    return np.dtype(kind).newbyteorder("S" if swapped else "=")


def _strips(image: Image.Image) -> Iterator[tuple[slice, Image.Image]]:
    """Row ranges of about STRIP_PIXELS pixels and their parts of the image, top to bottom."""
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        yield slice(top, bottom), image.crop((0, top, image.width, bottom))


def _row_strips(values: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """The same of an array (H, W) or (H, W, 3)."""
    rows = max(1, STRIP_PIXELS // values.shape[1])
    return ((slice(top, top + rows), values[top : top + rows]) for top in range(0, len(values), rows))


def no_data_value(text: object) -> float:
    """What GDAL's tag says that pixels without data have; NaN where it says nothing."""
    try:
        return float(str(text).strip(" \0"))
    except ValueError:
        return np.nan


def _scaled(
    strips: Callable[[], Iterator[tuple[slice, np.ndarray]]], height: int, width: int, no_data: float = np.nan
) -> np.ndarray:
    """(H, W, 3) uint8 of deep values, see `decode_image`.

    Args:
        strips: gives the rows and their values, (h, W) or (h, W, 3) of any number type, whenever it is called.
        no_data: value of pixels without data.
    """

    def known(values: np.ndarray) -> np.ndarray:
        return np.isfinite(values) & (values != no_data)

    def lowest_above(limit: float) -> float:
        return min(float(np.where(known(one) & (one > limit), one, np.inf).min()) for _, one in strips())

    low = lowest_above(-np.inf)
    high = max(float(np.where(known(one), one, -np.inf).max()) for _, one in strips())
    if low < 0 and (next_low := lowest_above(low)) - low > high - next_low:
        low = next_low
    if low >= high or 0 <= low <= high / 2:
        low = 0.0
    scale = 255 / (high - low) if high > low else 0.0
    rgb = np.empty((height, width, 3), np.uint8)
    for rows, values in strips():
        deep = np.where(known(values), values, low).astype(np.float64)
        grey = np.rint((np.clip(deep, low, max(low, high)) - low) * scale).astype(np.uint8)
        rgb[rows] = grey if grey.ndim == 3 else grey[..., None]
    return rgb
