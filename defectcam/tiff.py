"""TIFF files that Pillow does not know: bands of 16 bits or more, of floats, in planes of their own, or more than four."""

from __future__ import annotations

import io
import logging
import struct

import cv2
import numpy as np
import tifffile

from defectcam.image import GDAL_NODATA, ImageError, check_raw, check_tile, no_data_value

MAX_BANDS = 32
logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it logs of broken files is raised here
RAW = (tifffile.PHOTOMETRIC.CFA, tifffile.PHOTOMETRIC.LINEAR_RAW)
COLOURS = (tifffile.PHOTOMETRIC.MINISWHITE, tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.RGB)


class TiffBands:
    """The first image of a TIFF file, its pixels not read yet; used as Pillow's images are.

    Attributes:
        width, height: of the upright image, px.
        orientation: of EXIF, 1 to 8.
        no_data: value of pixels without data; NaN where the file names none.

    Raises:
        ImageError: a raw photo, or one that is not read.
        Exception: of any kind, of a broken file.
    """

    format = "TIFF"

    def __init__(self, source: bytes) -> None:
        self._source = source
        self._file = tifffile.TiffFile(io.BytesIO(source))
        self._page = page = self._file.pages[0]
        self._check_directory()
        tags = {tag.code: tag.value for tag in page.tags}
        check_raw(tags)
        if page.photometric in RAW:
            raise ImageError("raw photo (TIFF) is not read: save it as JPEG, PNG or TIFF with colours")
        if page.photometric not in COLOURS or page.dtype is None or page.imagedepth != 1:
            raise ImageError(f"TIFF of {self._kind()} is not read: save it as grey or RGB")
        if page.samplesperpixel > MAX_BANDS:
            raise ImageError(f"TIFF with {page.samplesperpixel} bands is not read, {MAX_BANDS} at most: save three of them")
        check_tile(page.tilewidth * page.tilelength, page.imagewidth * page.imagelength)
        self.orientation = int(tags.get(274, 1))
        size = page.imagewidth, page.imagelength
        self.width, self.height = size[::-1] if self.orientation in (5, 6, 7, 8) else size
        self.no_data = no_data_value(tags.get(GDAL_NODATA))

    def __enter__(self) -> TiffBands:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self) -> np.ndarray:
        """(H, W) of one or two bands, the first of them, else (H, W, 3), the first three; as stored, not turned.

        Raises:
            ImageError: compressed as nothing here reads it.
        """
        page = self._page
        try:
            values = page.asarray()
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            values = self._by_opencv()
        if page.samplesperpixel > 1:
            if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
                values = values[:3].transpose(1, 2, 0)
            values = values[..., :3] if page.samplesperpixel > 2 else values[..., 0]
        if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
            values = ~values if values.dtype.kind == "u" else np.nanmax(values) - values
        return values

    def _check_directory(self) -> None:
        """Tifffile leaves out what it cannot read of a broken directory, and goes on with defaults."""
        kind, start = self._file.tiff, self._page.offset
        (count,) = struct.unpack(kind.tagnoformat, self._source[start : start + kind.tagnosize])
        if len(self._page.tags) != count:
            raise ValueError("the directory of the TIFF is damaged or cut off")

    def _by_opencv(self) -> np.ndarray:
        """What libtiff decompresses, of colour with up to four bands."""
        values = cv2.imdecode(np.frombuffer(self._source, np.uint8), cv2.IMREAD_UNCHANGED)
        if values is None or values.dtype != self._page.dtype or values.shape != self._page.shape:
            raise ImageError(f"TIFF of {self._kind()} is not read here: pip install imagecodecs, or save it without compression")
        return values[..., 2::-1] if values.ndim == 3 else values

    def _kind(self) -> str:
        page = self._page
        words = (f"{page.samplesperpixel} bands of {page.bitspersample} bits", page.photometric, page.compression)
        return ", ".join(getattr(word, "name", str(word)) for word in words)
