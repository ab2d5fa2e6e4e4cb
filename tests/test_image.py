"""Photos of every kind: what comes through, what is refused, and in which words."""

import contextlib
import io
import itertools
import random
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageFile

from defectcam.image import ImageError, decode_image, image_size, pillow_heif, upright_size

# pytest swaps the warning filters around every test, the one in image.py included
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

LIMIT_PIXELS = 100_000_000


def encode(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def decode(data, limit=LIMIT_PIXELS):
    rgb = decode_image(data, limit)
    assert rgb.dtype == np.uint8 and rgb.ndim == 3 and rgb.shape[2] == 3
    assert rgb.flags.c_contiguous and rgb.flags.writeable
    return rgb


def image_refusal(data, limit=LIMIT_PIXELS):
    with pytest.raises(ImageError) as caught:
        decode_image(data, limit)
    return str(caught.value)


def stack(grey):
    return np.repeat(np.asarray(grey, np.uint8)[..., None], 3, axis=2)


def png(width, height, bits=8, colour=2, pixels=b""):
    """A PNG file written by hand, so that its header can lie."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(pixels)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


RNG = np.random.default_rng(7)
RGB = RNG.integers(0, 256, (13, 21, 3), np.uint8)  # odd sizes; noise, so that a shift or a swap shows
GREY = RNG.integers(0, 256, (13, 21), np.uint8)
ALPHA = RNG.integers(0, 256, (13, 21), np.uint8)
RAMP = np.stack([np.tile(np.arange(64) * 4, (48, 1)), np.repeat(np.arange(48)[:, None] * 5, 64, 1),
                 np.full((48, 64), 90)], axis=2).astype(np.uint8)  # smooth, for lossy formats  # fmt: skip

# ---- formats and modes ----


@pytest.mark.parametrize(
    ("file_format", "options"),
    [("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True}), ("TIFF", {}),
     ("TIFF", {"compression": "tiff_lzw"}), ("TIFF", {"compression": "tiff_deflate"}),
     ("TIFF", {"big_tiff": True})],
    ids=["png", "bmp", "webp", "tiff", "tiff-lzw", "tiff-deflate", "big-tiff"],
)  # fmt: skip
def test_lossless_formats_give_the_very_pixels(file_format, options):
    assert np.array_equal(decode(encode(Image.fromarray(RGB), file_format, **options)), RGB)


@pytest.mark.parametrize(
    ("file_format", "options"),
    [("JPEG", {"quality": 95}), ("JPEG", {"quality": 95, "progressive": True}), ("WEBP", {"quality": 95}),
     ("TIFF", {"compression": "jpeg"})],
    ids=["jpeg", "jpeg-progressive", "webp", "tiff-jpeg"],
)  # fmt: skip
def test_lossy_formats_give_nearly_the_pixels(file_format, options):
    decoded = decode(encode(Image.fromarray(RAMP), file_format, **options)).astype(int)
    assert decoded.shape == RAMP.shape
    assert np.abs(decoded - RAMP).mean() < 3


def with_alpha(image):
    image = image.copy()
    image.putalpha(Image.fromarray(ALPHA))
    return image


def palette_image():
    image = Image.frombytes("P", (21, 13), (GREY % 4).tobytes())
    image.putpalette([0, 0, 0, 250, 10, 20, 30, 240, 50, 60, 70, 230])
    return image


PALETTE_RGB = np.array([[0, 0, 0], [250, 10, 20], [30, 240, 50], [60, 70, 230]], np.uint8)[GREY % 4]


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "BMP"])
def test_black_and_white(file_format):
    data = encode(Image.fromarray(GREY > 127), file_format)
    assert np.array_equal(decode(data), stack((GREY > 127) * 255))


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "BMP"])
def test_grey(file_format):
    assert np.array_equal(decode(encode(Image.fromarray(GREY), file_format)), stack(GREY))


def test_grey_jpeg():
    decoded = decode(encode(Image.fromarray(RAMP[..., 0]), "JPEG", quality=95))
    assert np.abs(decoded.astype(int) - stack(RAMP[..., 0])).mean() < 3


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_alpha_is_dropped_from_grey(file_format):
    assert np.array_equal(decode(encode(with_alpha(Image.fromarray(GREY)), file_format)), stack(GREY))


@pytest.mark.parametrize(
    ("file_format", "options"),
    [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})],
    ids=["png", "tiff", "webp"],
)
def test_alpha_is_dropped_from_colour(file_format, options):
    assert np.array_equal(decode(encode(with_alpha(Image.fromarray(RGB)), file_format, **options)), RGB)


@pytest.mark.parametrize(
    ("file_format", "options"),
    [("PNG", {}), ("PNG", {"transparency": 1}), ("PNG", {"transparency": bytes([0, 99, 255, 7])}),
     ("TIFF", {}), ("BMP", {})],
    ids=["png", "png-transparent-entry", "png-transparent-table", "tiff", "bmp"],
)  # fmt: skip
def test_palette(file_format, options):
    assert np.array_equal(decode(encode(palette_image(), file_format, **options)), PALETTE_RGB)


@pytest.mark.parametrize("image", [RGB, GREY], ids=["rgb", "grey"])
def test_transparent_colour_is_dropped(image):
    transparency = tuple(map(int, image[0, 0])) if image.ndim == 3 else int(image[0, 0])
    data = encode(Image.fromarray(image), "PNG", transparency=transparency)
    assert np.array_equal(decode(data), image if image.ndim == 3 else stack(image))


@pytest.mark.parametrize("file_format", ["TIFF", "JPEG"])
def test_cmyk_ink_darkens(file_format):
    # PIL writes CMYK JPEGs inverted, as Adobe does. A reader that does not know this returns the negative.
    inks = {
        (0, 0, 0, 0): (255, 255, 255),
        (255, 0, 0, 0): (0, 255, 255),
        (0, 255, 0, 0): (255, 0, 255),
        (0, 0, 255, 0): (255, 255, 0),
        (0, 0, 0, 255): (0, 0, 0),
        (0, 0, 0, 128): (127, 127, 127),
    }
    for ink, colour in inks.items():
        data = encode(Image.new("CMYK", (16, 16), ink), file_format)
        assert b"Adobe" in data or file_format == "TIFF"
        assert np.abs(decode(data).astype(int) - colour).max() <= 3


def test_ycbcr_tiff():
    decoded = decode(encode(Image.fromarray(RAMP).convert("YCbCr"), "TIFF"))
    assert np.abs(decoded.astype(int) - RAMP).max() <= 3


def test_lab_tiff():
    # the last is sRGB's red: L* 54.3 of 100 as 138 of 255, a* 80.8 and b* 69.9 with 128 added
    for lab, colour in [
        ((255, 128, 128), (255, 255, 255)),
        ((0, 128, 128), (0, 0, 0)),
        ((138, 209, 198), (255, 0, 0)),
    ]:
        data = encode(Image.new("LAB", (4, 3), lab), "TIFF")
        assert Image.open(io.BytesIO(data)).mode == "LAB"
        assert np.abs(decode(data).astype(int) - colour).max() <= 6


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_by_its_maximum(file_format):
    values = RNG.integers(0, 5001, (13, 21)).astype(np.uint16)
    values[3, 4], values[0, 0] = 5000, 0
    data = encode(Image.fromarray(values), file_format)
    assert Image.open(io.BytesIO(data)).mode == "I;16"
    assert np.array_equal(decode(data), stack(np.rint(values / 5000 * 255)))


def test_16_bit_big_endian_tiff():
    values = RNG.integers(0, 60001, (13, 21)).astype(">u2")
    values[5, 5] = 60000
    data = encode(Image.frombytes("I;16B", (21, 13), values.tobytes()), "TIFF")
    assert Image.open(io.BytesIO(data)).mode == "I;16B"
    assert np.array_equal(decode(data), stack(np.rint(values / 60000 * 255)))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 1000], [2000, 100_000]], np.int32), [[0, 3], [5, 255]]),
        (np.array([[-5, 0], [1, 2]], np.int32), [[0, 0], [128, 255]]),
        (np.array([[-5, -1], [-9, -2]], np.int32), [[128, 255], [0, 223]]),
        (np.array([[0, 0], [0, 0]], np.int32), [[0, 0], [0, 0]]),
        (np.array([[0, 0.25], [0.5, 1.0]], np.float32), [[0, 64], [128, 255]]),
        (np.array([[np.nan, np.inf], [-np.inf, 4.0]], np.float32), [[0, 0], [0, 255]]),
        (np.array([[np.nan, np.nan], [np.nan, np.nan]], np.float32), [[0, 0], [0, 0]]),
        (np.array([[0, 1e-45], [0, 0]], np.float32), [[0, 255], [0, 0]]),
        (np.array([[-3e38, 3e38], [1.5e38, 0]], np.float32), [[0, 255], [191, 128]]),
        (np.zeros((2, 2), np.uint16), [[0, 0], [0, 0]]),
        (np.array([[0, 2**31 - 1], [2**31 - 1, 2**30]], np.int32), [[0, 255], [255, 128]]),
        (np.array([[0, 3e9], [1.5e9, 2**32]], np.float32), [[0, 178], [89, 255]]),
    ],
    ids=["int", "int-negative", "int-all-negative", "int-zero", "float", "nan-inf", "all-nan", "tiny", "huge",
         "u16-zero", "int-largest", "float-over-2**31"],
)  # fmt: skip
def test_deep_grey_is_scaled_by_its_maximum(values, expected):
    with np.errstate(all="raise"):
        decoded = decode(encode(Image.fromarray(values), "TIFF"))
    assert np.array_equal(decoded, stack(expected))


@pytest.mark.parametrize("byteorder", "<>")
@pytest.mark.parametrize("compression", [None, "deflate"])
@pytest.mark.parametrize(("kind", "largest"), [("u4", 2**32 - 1), ("u4", 2**31), ("u4", 5000), ("i4", 2**31 - 1),
                                               ("u2", 2**16 - 1), ("f4", 2.0**33)])  # fmt: skip
def test_deep_grey_of_every_kind_is_scaled_over_all_its_values(byteorder, compression, kind, largest):
    values = (RNG.random((13, 21)) * largest).astype(kind)
    values[0, 0], values[5, 5] = 0, largest
    out = io.BytesIO()
    tifffile.imwrite(out, values, byteorder=byteorder, compression=compression)
    assert np.array_equal(decode(out.getvalue()), stack(np.rint(values / float(largest) * 255)))


def test_uint32_stays_uint32_when_it_is_turned():
    values = (RNG.random((13, 21)) * (2**32 - 1)).astype(np.uint32)
    out = io.BytesIO()
    tifffile.imwrite(out, values, extratags=[(274, 3, 1, 6, True)])  # Orientation
    turned = UPRIGHT[6](stack(np.rint(values / float(values.max()) * 255)))
    assert np.array_equal(decode(out.getvalue()), turned)


def test_deep_grey_has_one_scale_for_the_whole_image():
    values = np.full((3000, 700), 1000, np.uint16)  # more than one strip of the conversion
    values[-1, -1] = 4000
    decoded = decode(encode(Image.fromarray(values), "TIFF"))
    assert decoded[-1, -1, 0] == 255 and (decoded.reshape(-1)[:-3] == 64).all()


def test_16_bit_colour_keeps_its_upper_byte():
    deep = RGB.astype(">u2") * 256 + 200
    pixels = b"".join(b"\x00" + row.astype(">u2").tobytes() for row in deep)
    assert np.array_equal(decode(png(21, 13, bits=16, pixels=pixels)), RGB)


def scaled(values):
    return np.rint(values.astype(float) * (255 / float(values.max()))).astype(np.uint8)


def tiff(values, **options):
    out = io.BytesIO()
    tifffile.imwrite(out, values, **options)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["u1", "u2", "i2", "u4", "f2", "f4", "f8"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_tiff_of_every_depth_has_its_first_three_bands_or_its_first(kind, count):
    """Whatever the order of the bands, compression and what the file says that they are; and the size is known before."""
    bands = (RNG.random((13, 21, count)) * 200).astype(kind)
    bands[5, 5] = 200
    expected = stack(bands[..., 0]) if count < 3 else bands[..., :3].astype(np.uint8)
    if kind != "u1":
        expected = stack(scaled(bands[..., 0])) if count < 3 else scaled(bands[..., :3])
    tried = 0
    for separate, compression, photometric in itertools.product([False, True], [None, "deflate"], ["minisblack", "rgb"]):
        if (photometric == "rgb" and count < 3) or (separate and count == 1):
            continue
        values = bands.transpose(2, 0, 1) if separate else bands if count > 1 else bands[..., 0]
        options = {"planarconfig": "separate" if separate else "contig"} if count > 1 else {}
        tags = [(274, 3, 1, 6, True)]  # Orientation
        if separate and photometric == "minisblack":
            options["extrasamples"] = [0] * (count - 1)  # or tifffile makes pages of them
        data = tiff(values, photometric=photometric, compression=compression, extratags=tags, **options)
        assert np.array_equal(decode(data), UPRIGHT[6](expected)), (separate, compression, photometric)
        with contextlib.suppress(OSError):  # Pillow does not open them all
            assert np.array_equal(decode(Image.open(io.BytesIO(data))), UPRIGHT[6](expected)), "as cvat-sdk gives photos"
        assert upright_size(data, 10**6) == (21, 13)
        tried += 1
    assert tried == {1: 2, 2: 4}.get(count, 8)


def test_deep_colour_that_only_libtiff_decompresses_is_read_or_named():
    bands = (RNG.random((13, 21, 3)) * 4095).astype(np.uint16)
    options = [cv2.IMWRITE_TIFF_COMPRESSION, 5]  # LZW
    data = cv2.imencode(".tif", bands[..., ::-1], options)[1].tobytes()
    assert np.array_equal(decode(data), scaled(bands))
    data = cv2.imencode(".tif", bands[..., ::-1].astype(np.float32), options)[1].tobytes()
    assert np.array_equal(decode(data), scaled(bands.astype(np.float32)))
    five = tiff(np.repeat(bands[..., :1], 5, 2), photometric="minisblack", planarconfig="contig")
    lzw = five.replace(struct.pack("<HHII", 259, 3, 1, 1), struct.pack("<HHII", 259, 3, 1, 5))
    reason = "TIFF of 5 bands of 16 bits, MINISBLACK, LZW is not read here: pip install imagecodecs, or save it without "
    assert image_refusal(lzw) == reason + "compression"
    many = tiff(np.zeros((4, 5, 40), np.uint8), photometric="minisblack", planarconfig="contig")
    assert image_refusal(many).startswith("TIFF with 40 bands is not read, 32 at most")


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("alpha", [False, True])
def test_12_bits_in_16_bit_colour_are_seen(suffix, alpha):
    """Of them alone, Pillow and CVAT keep four bits."""
    bands = (RNG.random((13, 21, 3)) * 4095).astype(np.uint16)
    stored = np.dstack([bands[..., ::-1], np.full((13, 21), 65535, np.uint16)]) if alpha else bands[..., ::-1]
    data = cv2.imencode(suffix, stored)[1].tobytes()
    assert np.array_equal(decode(data), scaled(bands))
    assert np.array_equal(decode(Image.open(io.BytesIO(data))), scaled(bands)), "as cvat-sdk gives photos"
    bright = cv2.imencode(suffix, stored * np.uint16(16))[1].tobytes()
    assert np.array_equal(decode(bright), (bands * 16 >> 8).astype(np.uint8)), "as CVAT shows them"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[7000, 8500], [7750, 8200]], np.uint16), [[0, 255], [128, 204]]),  # heat in 1/100 K
        (np.array([[-1, 1], [0, 0.5]], np.float32), [[0, 255], [128, 191]]),
        (np.array([[-9999, 100], [150, 250]], np.float32), [[0, 102], [153, 255]]),
        (np.array([[-32768, 100], [150, 250]], np.int16), [[0, 102], [153, 255]]),
        (np.array([[-10, 0], [30, 20]], np.float32), [[0, 64], [255, 191]]),  # degrees Celsius
        (np.array([[np.nan, 0.5], [1, 0.25]], np.float64), [[0, 128], [255, 64]]),
        (np.array([[4095, 0], [2048, 1024]], np.uint16), [[255, 0], [128, 64]]),
    ],
    ids=["heat", "-1 to 1", "-9999", "-32768", "celsius", "nan in float64", "12 bits in 16"],
)
def test_any_range_is_seen(values, expected):
    assert np.array_equal(decode(tiff(values)), stack(expected))


def test_what_the_file_calls_no_data_is_black():
    grey, tags = np.array([[65535, 100], [150, 250]], np.uint16), [(42113, 2, 6, "65535", True)]
    assert np.array_equal(decode(tiff(grey, extratags=tags)), stack([[0, 102], [153, 255]]))
    colour = np.repeat(grey[..., None], 3, 2).astype(np.float32)
    assert np.array_equal(decode(tiff(colour, photometric="rgb", extratags=tags)), stack([[0, 102], [153, 255]]))


def test_raw_photos_are_not_read_by_their_thumbnails():
    thumbnail = RGB[:4, :4].copy()
    dng = tiff(thumbnail, photometric="rgb", extratags=[(50706, 1, 4, b"\1\4\0\0", True)])
    # tifffile writes no tag of SubIFDs by hand: that of the software takes its number
    nef = tiff(thumbnail, photometric="rgb", subfiletype=1).replace(struct.pack("<HH", 305, 2), struct.pack("<HH", 330, 4))
    sensor = tiff(RNG.integers(0, 4095, (8, 8)).astype(np.uint16), photometric="cfa")
    cr2 = b"II*\0\x10\0\0\0CR\2\0" + bytes(100)
    for data, name in ((dng, "DNG"), (nef, "raw photo"), (sensor, "raw photo"), (cr2, "raw (CR2)")):
        reason = image_refusal(data)
        assert reason.startswith(name) and "is not read: save it as JPEG, PNG or TIFF" in reason


def test_heic_is_read_where_pillow_heif_is_installed():
    head = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    if not pillow_heif:
        assert image_refusal(head) == "HEIC is not read here: pip install pillow-heif, or save it as JPEG, PNG or TIFF"
        return
    assert image_refusal(head).startswith("broken image")
    for orientation in (1, 6):
        out = io.BytesIO()
        heif = pillow_heif.from_pillow(Image.fromarray(RAMP))
        heif.save(out, quality=95, exif=exif(orientation).tobytes())
        decoded = decode(out.getvalue())
        expected = UPRIGHT[orientation](RAMP)
        assert decoded.shape == expected.shape == (*upright_size(out.getvalue(), 10**6), 3)
        assert np.abs(decoded.astype(int) - expected).mean() < 5


def test_strips_join_without_a_seam():
    rows, columns = np.mgrid[:2500, :1111]
    image = np.stack([rows % 251, columns % 241, (rows + columns) % 239], axis=2).astype(np.uint8)
    assert np.array_equal(decode(encode(Image.fromarray(image), "BMP")), image)


@pytest.mark.parametrize("file_format", ["TIFF", "PNG", "WEBP"])
def test_first_frame_of_several(file_format):
    options = {"lossless": True} if file_format == "WEBP" else {}
    second = Image.fromarray(255 - RGB)
    data = encode(Image.fromarray(RGB), file_format, save_all=True, append_images=[second], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert np.array_equal(decode(data), RGB)


def test_first_picture_of_a_multi_picture_jpeg():
    second = Image.fromarray(255 - RAMP)
    data = encode(Image.fromarray(RAMP), "MPO", save_all=True, append_images=[second], quality=95)
    assert np.abs(decode(data).astype(int) - RAMP).mean() < 3


# ---- orientation ----

UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: stored.transpose(1, 0, 2)[:, ::-1],
    7: lambda stored: stored.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda stored: stored.transpose(1, 0, 2)[::-1],
}


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF"])
def test_exif_orientation(file_format, orientation):
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encode(Image.fromarray(RGB), file_format, exif=exif(orientation), **options)
    assert np.array_equal(decode(data), UPRIGHT[orientation](RGB))


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_of_a_jpeg(orientation):
    plain = encode(Image.fromarray(RAMP), "JPEG")
    turned = encode(Image.fromarray(RAMP), "JPEG", exif=exif(orientation))
    assert np.array_equal(decode(turned), UPRIGHT[orientation](decode(plain)))


def exif_block(tag, kind, count, value):
    """An EXIF block with one tag, written by hand so that it may be wrong."""
    return b"Exif\0\0II*\0" + struct.pack("<IHHHI4sI", 8, 1, tag, kind, count, value, 0)


@pytest.mark.parametrize(
    "block",
    [
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0rubbish",
        b"Exif\0\0MM\0*" + b"\xff" * 40,
        exif_block(0x0112, 3, 1, b"\x63\0\0\0"),
        exif_block(0x0112, 2, 3, b"ab\0\0"),
        exif_block(0x0112, 3, 2, b"\x06\0\x03\0")[:-6],
    ],
    ids=["empty", "offset-outside", "rubbish", "all-ones", "orientation-99", "orientation-text", "cut"],
)
def test_broken_exif_does_not_cost_the_image(block):
    plain = decode(encode(Image.fromarray(RAMP), "JPEG"))
    assert np.array_equal(decode(encode(Image.fromarray(RAMP), "JPEG", exif=block)), plain)
    assert np.array_equal(decode(encode(Image.fromarray(RGB), "PNG", exif=block)), RGB)


def test_the_handmade_exif_block_is_read():
    data = encode(Image.fromarray(RGB), "PNG", exif=exif_block(0x0112, 3, 1, b"\x06\0\0\0"))
    assert np.array_equal(decode(data), UPRIGHT[6](RGB))


# ---- size ----


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_50_megapixels(file_format):
    options = {"compress_level": 1} if file_format == "PNG" else {}
    data = encode(Image.new("RGB", (8000, 6250), (10, 200, 30)), file_format, **options)
    rgb = decode(data)
    assert rgb.shape == (6250, 8000, 3)
    assert np.abs(rgb[::500, ::500].astype(int) - (10, 200, 30)).max() <= 2


def test_what_the_limit_allows_is_not_refused_by_pillow():
    side = 14_000  # 196 MP: above the size that Pillow refuses by itself
    assert image_size(png(side, side), side * side) == (side, side)


SMALLER = "use a smaller photo, {}or defectcam propose, which takes large photos in parts"
RAISE = "raise ADVCAM_MAX_MEGAPIXELS, "


def test_limit_holds_to_the_pixel():
    data = encode(Image.new("L", (40, 25)), "PNG")
    assert decode(data, 1000).shape == (25, 40, 3)
    assert image_refusal(data, 999) == f"too large 0.001>0.000999 MP; {SMALLER.format(RAISE)}"
    assert image_refusal(png(8000, 8001), 64_000_000).startswith("too large 64.008>64 MP")
    assert image_refusal(png(1, 64_000_001), 64_000_000).startswith("too large 64.000001>64 MP")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (png(20_000, 20_000), f"too large 400>100 MP; {SMALLER.format('')}"),
        (png(60_000, 60_000), f"too large 3600>100 MP; {SMALLER.format('')}"),
        (png(12_000, 10_000), f"too large 120>100 MP; {SMALLER.format(RAISE)}"),
        (png(2**31 - 1, 2**31 - 1), f"too large 4.611686e+12>100 MP; {SMALLER.format('')}"),
    ],
    ids=["400 MP", "3600 MP", "120 MP", "largest header"],
)
def test_decompression_bomb_is_refused_before_any_pixel(data, reason):
    assert len(data) < 100
    tracemalloc.start()
    start_s = time.perf_counter()
    try:
        assert image_refusal(data) == reason
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - start_s < 1


def test_bomb_allocates_nothing_outside_python_either():
    """tracemalloc does not see Pillow's pixels: peak memory of a process of its own."""
    script = (
        "import sys, resource; from defectcam.image import decode_image, ImageError\n"
        "decode_image(bytes.fromhex(sys.argv[1]), 10)\n"
        "before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: decode_image(bytes.fromhex(sys.argv[2]), 100_000_000)\n"
        "except ImageError: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib)\n"
    )
    small, bomb = encode(Image.new("RGB", (2, 2)), "PNG"), png(12_000, 10_000)
    command = [sys.executable, "-c", script, small.hex(), bomb.hex()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert int(done.stdout) < 10_000, done.stderr


def test_memory_that_runs_out_is_an_image_error(monkeypatch):
    def load(self):
        raise MemoryError

    data = encode(Image.new("RGB", (8, 5)), "PNG")
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert image_refusal(data) == "out of memory: 8 x 5 px; use a smaller photo"


def test_memory_that_runs_out_while_turning_never_gives_a_sideways_image(monkeypatch):
    def exif_transpose(image, *, in_place=False):
        raise MemoryError

    data = encode(Image.new("RGB", (8, 5)), "PNG", exif=exif(6))
    monkeypatch.setattr("PIL.ImageOps.exif_transpose", exif_transpose)
    assert image_refusal(data) == "out of memory: 8 x 5 px; use a smaller photo"


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_no_pixels(size):
    assert image_refusal(png(*size)).startswith("broken image: ")


# ---- hostile bytes ----

STARTS = (
    "TIFF ", "JPEG XL is not read", "broken image: ", "unknown format: ", "too large ", "too many JPEG scans ", "out of memory: "
)  # fmt: skip
UNKNOWN = "unknown format: JPEG, PNG, TIFF, BMP or WebP needed"


OTHERS = {"GIF": "GIF", "PDF": "PDF", "JPEG2000": "JPEG 2000", "AVIF": "AVIF"}  # those that people take for photos


@pytest.mark.parametrize("file_format", ["PPM", "TGA", "ICO", "PCX", "EPS", *OTHERS])
def test_other_formats_are_refused(file_format):
    reason = image_refusal(encode(Image.fromarray(RGB), file_format))
    expected = f"{OTHERS[file_format]} is not read: save it as JPEG, PNG or TIFF" if file_format in OTHERS else UNKNOWN
    assert reason == expected


@pytest.mark.parametrize("data", [b"", b"\x00", b"text", b"<html>", bytes(range(256))])
def test_no_image_is_refused(data):
    assert image_refusal(data) == UNKNOWN


FILES = {
    "jpeg": encode(Image.fromarray(RAMP), "JPEG", quality=90, exif=exif(6)),
    "jpeg-progressive": encode(Image.fromarray(RAMP), "JPEG", progressive=True),
    "jpeg-cmyk": encode(Image.fromarray(RAMP).convert("CMYK"), "JPEG"),
    "png": encode(Image.fromarray(RGB), "PNG", exif=exif(3)),
    "png-palette": encode(palette_image(), "PNG", transparency=bytes([0, 99, 255, 7])),
    "png-16": encode(Image.fromarray(GREY.astype(np.uint16) * 200), "PNG"),
    "tiff": encode(Image.fromarray(RGB), "TIFF"),
    "tiff-lzw": encode(Image.fromarray(RGB), "TIFF", compression="tiff_lzw"),
    "tiff-float": encode(Image.fromarray(GREY.astype(np.float32)), "TIFF"),
    "tiff-lab": encode(Image.frombytes("LAB", (21, 13), RGB.tobytes()), "TIFF"),
    "bmp": encode(Image.fromarray(RGB), "BMP"),
    "bmp-palette": encode(palette_image(), "BMP"),
    "webp": encode(Image.fromarray(RGB), "WEBP", lossless=True),
    "webp-lossy": encode(Image.fromarray(RAMP), "WEBP"),
}


@pytest.mark.parametrize("name", FILES)
def test_truncated_files_are_refused_or_whole(name):
    """Cut anywhere: an error, or every pixel where only the trailer is gone; never an image half grey."""
    data = FILES[name]
    whole = decode(data)
    ends = [*range(4, len(data) - 12, len(data) // 60), *range(len(data) - 12, len(data))]
    refused = 0
    for end in ends:
        try:
            assert np.array_equal(decode(data[:end]), whole)
        except ImageError as error:
            assert str(error).startswith("broken image")
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("name", FILES)
def test_corrupted_files_raise_image_errors_only(name):
    rng = random.Random(name)
    for _ in range(60):
        data = bytearray(FILES[name])
        for _ in range(rng.choice([1, 2, 8])):
            # half of the hits go to the first bytes, where the headers are
            data[rng.randrange(rng.choice([min(80, len(data)), len(data)]))] = rng.randrange(256)
        try:
            decode(bytes(data), 1_000_000)
        except ImageError as error:
            reason = str(error)
            assert reason.startswith(STARTS) and reason.isprintable() and len(reason) < 160


def photo_jpeg(**options) -> bytes:
    """A JPEG with the detail of a photo, 512 x 384."""
    small = np.random.default_rng(3).integers(0, 256, (48, 64, 3), np.uint8)
    return encode(Image.fromarray(small).resize((512, 384), Image.Resampling.BICUBIC), "JPEG", **options)


JPEGS = {
    "baseline": {"quality": 90}, "grey": {"quality": 90}, "progressive": {"quality": 90, "progressive": True},
    "restarts": {"quality": 75, "restart_marker_rows": 1}, "full-colour": {"quality": 95, "subsampling": 0},
}  # fmt: skip


@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_that_lacks_its_end_has_all_its_pixels(name):
    data = photo_jpeg(**JPEGS[name])
    if name == "grey":
        data = encode(Image.open(io.BytesIO(data)).convert("L"), "JPEG", **JPEGS[name])
    assert data.endswith(b"\xff\xd9")
    for cut in (1, 2):
        assert np.array_equal(decode(data[:-cut]), decode(data))
    # a few bytes of the last of 768 blocks: nothing but that block may differ
    differing = (decode(data[:-4]) != decode(data)).any(axis=2)
    assert differing.mean() < 1 / 200 and not differing[:-18].any()


@pytest.mark.parametrize("name", JPEGS)
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9, 0.98])
def test_a_jpeg_of_which_pixels_are_missing_is_refused(name, share):
    data = photo_jpeg(**JPEGS[name])
    assert image_refusal(data[: int(share * len(data))]) == "broken image: the JPEG file is cut off; send the whole file"


def test_a_progressive_jpeg_that_ends_between_two_scans_is_refused():
    """All pixels would be there, most of them only roughly."""
    data = photo_jpeg(quality=90, progressive=True)
    scans = [number for number in range(len(data)) if data[number : number + 2] == b"\xff\xda"]
    assert len(scans) > 5
    for start in scans[1:]:
        huffman = data.rfind(b"\xff\xc4", 0, start)  # its tables belong to it
        for end in (start, huffman):
            assert image_refusal(data[:end]).startswith("broken image")


def test_the_size_is_that_of_the_header():
    assert image_size(encode(Image.fromarray(RGB), "PNG"), 10**6) == (13, 21)
    with pytest.raises(ImageError, match="too large"):
        image_size(png(20_000, 20_000), 10**8)


def test_reason_of_a_broken_image_starts_with_the_words_cvat_shows():
    data = FILES["jpeg"]
    assert image_refusal(data[: len(data) // 2]).startswith("broken image: ")


@pytest.mark.parametrize(
    "error",
    [OSError(), SyntaxError("x"), struct.error("x"), zlib.error("x"), OverflowError("x"), TypeError("x"),
     EOFError(), KeyError("x"), RecursionError("x"), ValueError("\x00\ud800" + "x" * 999)],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_whatever_pillow_raises_is_an_image_error(monkeypatch, error):
    def load(self):
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    reason = image_refusal(FILES["bmp"])
    assert reason.startswith("broken image: ") and reason.isprintable()
    assert len("broken image: ") < len(reason) < 120


def test_pillows_warnings_stay_out_of_the_log():
    data = encode(Image.new("RGB", (8, 8)), "JPEG", exif=exif_block(0x010F, 2, 255, b"\xff\0\0\0"))
    with pytest.warns(UserWarning):
        Image.open(io.BytesIO(data)).getexif()
    script = (
        "import sys; from defectcam.image import decode_image\n"
        "print(decode_image(bytes.fromhex(sys.argv[1]), 64).shape)"
    )
    command = [sys.executable, "-W", "always", "-c", script, data.hex()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "(8, 8, 3)\n" and "Warning" not in done.stderr


def test_tiff_tiles_larger_than_their_image_are_refused_before_they_are_decoded():
    """A file of a few kB whose one tile unpacks to 200 MB."""
    import struct
    import zlib

    side = 8192
    tile = zlib.compress(bytes(side * side * 3), 9)
    entries = [
        (256, 4, 16), (257, 4, 16), (258, 3, 8), (259, 3, 8), (262, 3, 2), (277, 3, 3),
        (322, 4, side), (323, 4, side), (324, 4, 0), (325, 4, len(tile)),
    ]  # fmt: skip
    start = 8 + 2 + 12 * len(entries) + 4
    directory = struct.pack("<H", len(entries))
    for tag, kind, value in entries:
        directory += struct.pack("<HHII", tag, kind, 1, start if tag == 324 else value)
    data = b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<I", 0) + tile
    with pytest.raises(ImageError, match="^too large TIFF tiles of 67.1"):
        decode_image(data, 10**8)


def progressive_jpeg(copies: int, **options) -> bytes:
    """A progressive JPEG whose last scan comes so many times more."""
    out = io.BytesIO()
    Image.new("L", (64, 48), 90).save(out, "JPEG", progressive=True, **options)
    data = out.getvalue()
    last, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:end] + copies * data[last:end] + data[end:]


def test_jpegs_of_very_many_scans_are_refused_before_they_are_decoded(monkeypatch):
    exif = Image.Exif()
    exif[270] = 200 * b"\xff\xda\x00\x08"  # what looks like scans in a segment, or behind the end, is none
    assert decode_image(progressive_jpeg(50, exif=exif) + 200 * b"\xff\xda\x00\x08", 10**6).shape == (48, 64, 3)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="^too many JPEG scans 40006>100; "):
        decode_image(progressive_jpeg(40_000), 10**6)
