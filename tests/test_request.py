"""The envelope, its settings and its image: what comes through, what is refused, and in which words."""

import base64
import io
import json
import random
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib
from dataclasses import fields

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageFile

from defectcam.request import (
    MAX_CLICKS,
    MAX_REST_BYTES,
    ImageError,
    RequestError,
    Settings,
    decode_image,
    image_size,
    parse_request,
    settings_from_env,
)

# pytest swaps the warning filters around every test, the one in request.py included
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")

DEFECTS = ("crack", "spalling", "rust")
LIMIT_PIXELS = 100_000_000
PAYLOAD = bytes(range(256))
BASE64 = base64.b64encode(PAYLOAD).decode()
NONE = Settings()


def parse(defaults=NONE, **keys):
    return parse_request({"image": BASE64, **keys}, defaults, DEFECTS)


def refusal(body):
    with pytest.raises(RequestError) as caught:
        parse_request(body, NONE, DEFECTS)
    str(caught.value).encode()  # can be sent
    return str(caught.value)


# ---- envelope ----

BODY = json.dumps({"image": BASE64, "iterations": 3}).encode()


@pytest.mark.parametrize(
    "body",
    [json.loads(BODY), BODY, BODY.decode(), bytearray(BODY), memoryview(BODY),
     memoryview(BODY * 2)[: len(BODY)], b"\xef\xbb\xbf" + BODY, "\ufeff" + BODY.decode(),
     b" \r\n" + BODY + b"\n"],
    ids=["dict", "bytes", "str", "bytearray", "memoryview", "view-part", "bom", "bom-str", "blanks"],
)  # fmt: skip
def test_every_form_of_body_says_the_same(body):
    request = parse_request(body, NONE, DEFECTS)
    assert request.image_bytes == PAYLOAD
    assert request.settings == Settings(iterations=3)
    assert request.ignored == ()


@pytest.mark.parametrize(
    "body",
    [None, b"", "", {}, [], [BODY.decode()], 3, True, object(), b"null", b"3", b'"text"', b"[{}]", b"{",
     b"\xff\xfe\x00", BODY[:-1], BODY + b"x", BODY.decode().encode("utf-16"), b"[" * 200_000,
     b'{"image":' * 200_000,
     b'{"image": "QUJD", "iterations": ' + b"9" * 5000 + b"}", {3: 4, None: 5}, "\ud800",
     b'{"image": "\xff"}'],
    ids=lambda body: repr(body)[:20],
)  # fmt: skip
def test_no_envelope_is_refused(body):
    message = refusal(body)
    assert message.startswith(("body is ", "image is missing")) and "but must be" in message
    assert len(message) < 300


def test_a_refused_body_of_many_megabytes_is_not_copied_into_the_message():
    body = b"\xff" * 30_000_000
    tracemalloc.start()
    try:
        assert len(refusal(body)) < 300
        assert tracemalloc.get_traced_memory()[1] < 100_000_000  # its repr alone would be 120 MB
    finally:
        tracemalloc.stop()


NO_BASE64 = [  # the image, and what the message says of it before "but must be an image file in base64"
    ("", "is empty"), (" \n", "is empty"), ("data:image/png;base64,", "is empty"),
    ("not base64!", "has '!' at position 9"), ("QUJ*", "has '*' at position 3"),
    ("QUJD\x00", "has '\\x00' at position 4"),
    ("äöü", "has 'ä' at position 0"), ("\ud800", "has '?' at position 0"),
    ("QU+-", "has '-' at position 3: replace - by + and _ by /, it is URL-safe base64"),
    ("_UJD", "has '_' at position 0: replace - by + and _ by /, it is URL-safe base64"),
    ("QUJDRA%3D%3D", "has '%' at position 6: decode its %XX, it is percent-encoded"),
    ("Q", "is incomplete base64 ("), ("QUJDR", "is incomplete base64 ("), ("====", "is incomplete base64 ("),
    ("QQ==QUJD", "is incomplete base64 ("), ("Q=Q=", "is incomplete base64 ("),
    (3, "is 3"), (True, "is True"), (b"QUJD", "is b'QUJD'"), (["QUJD"], "is ['QUJD']"), (10**5000, "is a very long int"),
]  # fmt: skip


@pytest.mark.parametrize(("image", "words"), NO_BASE64, ids=lambda value: value if isinstance(value, str) else "")
def test_image_that_is_no_base64_is_refused(image, words):
    message = refusal({"image": image})
    assert message.startswith(f"image {words}") and message.endswith(", but must be an image file in base64")


@pytest.mark.parametrize(
    "head",
    ["data:text/plain;base64,", "data:image/png,", "data:;base64,", "data:,", "data:image/jpeg;base64;charset=utf-8,",
     "data:image/svg+xml;utf8,"],
)  # fmt: skip
def test_data_url_without_an_image_in_base64_is_refused_with_the_remedy(head):
    message = refusal({"image": head + BASE64})
    assert message == f"image begins with '{head}', but a data URL must begin with 'data:image/TYPE;base64,'"
    assert "a data URL must begin with" in refusal({"image": "data:image/png%3Bbase64%2C" + BASE64})


LONG = base64.b64encode(RNG_BYTES := random.Random(5).randbytes(300_001)).decode()


@pytest.mark.parametrize(
    "text",
    [LONG, LONG.rstrip("="), LONG.replace("/", r"\/"), LONG.replace("+", r"\u002b").replace("/", r"\u002F"),
     r"\r\n".join(LONG[i : i + 76] for i in range(0, len(LONG), 76)), "data:image/png;base64," + LONG,
     ("data:image/png;base64," + LONG).replace("/", r"\/")],
    ids=["plain", "unpadded", "slashes", "unicode", "line-breaks", "data-url", "slashes-in-data-url"],
)  # fmt: skip
@pytest.mark.parametrize("around", ['{"image": "%s"}', ' {"iterations":3,\n"image" :\t"%s", "defects": "rust"}\n',
                                    '{"x": {"image": [1, "\\"{"]}, "image": null, "image": "%s"}'])  # fmt: skip
def test_long_bodies_say_what_they_say_when_parsed_as_a_whole(text, around):
    body = (around % text).encode()
    request, whole = (parse_request(form, NONE, DEFECTS) for form in (body, json.loads(body)))
    assert request == whole and request.image_bytes == RNG_BYTES
    assert parse_request(b"\xef\xbb\xbf" + body, NONE, DEFECTS) == parse_request(body.decode(), NONE, DEFECTS) == whole


def test_a_request_of_all_there_may_be_is_taken():
    points = [[1234.567891234567, 7654.321987654321]] * MAX_CLICKS
    body = {"image": LONG, "pos_points": points, "neg_points": points, "obj_bbox": points[:1] + [[9999.5, 9999.5]],
            "threshold": 0.25, "defects": list(DEFECTS), "shape": "mask"}  # fmt: skip
    text = json.dumps(body, indent=1)
    assert len(text) - len(LONG) < MAX_REST_BYTES / 4
    assert len(parse_request(text, NONE, DEFECTS).clicks.negative_xy) == MAX_CLICKS


REST = MAX_REST_BYTES + 1


@pytest.mark.parametrize(
    "body",
    [b"[" + b"[]," * REST + b"1]", b'{"image": "QUJD", "a": [' + b"[]," * REST + b"1]}",
     b'{"image": "' + LONG.encode() + b'", "a": [' + b"0," * REST + b"1]}",
     b'{"a": [' + b"0," * REST + b'1], "image": "' + LONG.encode() + b'"}',
     b'{"image": "QUJD", "iterations": "' + b"x" * REST + b'"}', b'{"image": "QUJD"' + b" " * REST + b"}",
     b'"' + b'\\"' * REST + b'"', b'{"' + b'a":1,"' * REST + b'a":1}', b'{"image": "' + LONG.encode(),
     b"1" * 10 * REST, b'{"image": "' + LONG.encode() + b'"} {"image": "' + LONG.encode() + b'"}'],
    ids=["lists", "lists-beside", "after", "before", "long-setting", "blanks", "escapes", "keys", "endless", "digits",
         "two"],
)  # fmt: skip
def test_bodies_with_more_beside_the_image_than_settings_are_refused_unparsed(body, monkeypatch):
    def loads(text, *_, **__):
        assert len(text) < 2 * MAX_REST_BYTES
        return real(text)

    real = json.loads
    monkeypatch.setattr(json, "loads", loads)
    message = refusal(body)
    assert message.startswith("body is ") and f"more than {MAX_REST_BYTES} are beside the image" in message


def test_a_long_body_that_is_no_json_is_refused():
    assert "has '-' at position 400000: replace - by +" in refusal(f'{{"image": "{LONG[:400_000]}-"}}')
    assert "has '\\\\' at position" in refusal(f'{{"image": "{LONG}\\u1234"}}')
    message = refusal(f'{{"image": "{LONG}", "iterations": 4')
    assert "must be a JSON object with the key image (Expecting" in message
    assert refusal(f'{{"picture": "{LONG}"}}').startswith("body is ")
    assert "is missing" in refusal('{"picture": "QUJD"}')


def test_missing_image_is_named_so():
    assert refusal({"threshold": 0.5}) == refusal({"image": None}) == (
        "image is missing, but must be an image file in base64"
    )  # fmt: skip


@pytest.mark.parametrize(
    "form",
    [lambda text: text, lambda text: text.rstrip("="), lambda text: "data:image/jpeg;base64," + text,
     lambda text: "\n data:image/svg+xml;charset=utf-8;base64,\n" + text,
     lambda text: "\r\n".join(text) + "\n",
     lambda text: " " + text[:9] + "\t" + text[9:].rstrip("=")],
    ids=["plain", "unpadded", "data-url", "odd-data-url", "line-breaks", "blanks"],
)  # fmt: skip
@pytest.mark.parametrize("length", [1, 2, 3, 256])
def test_base64_in_all_its_forms(form, length):
    text = form(base64.b64encode(PAYLOAD[-length:]).decode())
    assert parse_request({"image": text}, NONE, DEFECTS).image_bytes == PAYLOAD[-length:]


def test_unknown_keys_are_reported_sorted():
    unknown = {"neg_points": [], "obj_bbox": None, "Iterations": 4, "zoom": np.nan}
    request = parse(threshold=0.5, **unknown)
    assert request.ignored == ("Iterations", "neg_points", "obj_bbox", "zoom")
    assert request.settings == Settings(threshold=0.5)


def test_of_a_repeated_key_the_last_counts():
    body = b'{"iterations": "abc", "image": "QUJD", "iterations": 5}'
    assert parse_request(body, NONE, DEFECTS).settings.iterations == 5


# ---- settings of a request ----


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("iterations", 0, 0), ("iterations", 50, 50),
        ("threshold", 0.25, 0.25), ("threshold", 1, 1.0), ("threshold", 0.01, 0.01),
        ("cam_threshold", 0, 0.0), ("cam_threshold", 0.1, 0.1),
        ("defects", ["rust", "crack"], ("rust", "crack")), ("defects", "rust", ("rust",)),
        ("defects", " crack , rust,crack", ("crack", "rust")), ("defects", ("spalling",), ("spalling",)),
        ("shape", "polygon", "polygon"), ("shape", "mask", "mask"),
        ("tolerance_px", 0, 0.0), ("tolerance_px", 20, 20.0), ("tolerance_px", 1.5, 1.5),
        ("hole_share", 0, 0.0), ("hole_share", 1, 1.0),
        ("max_proposals", 1, 1), ("max_proposals", 10_000, 10_000),
    ],
)  # fmt: skip
def test_setting_is_taken(key, value, expected):
    result = getattr(parse(**{key: value}).settings, key)
    assert result == expected and type(result) is type(expected)
    assert parse(**{key: value}).settings == Settings(**{key: expected})  # and nothing else is touched
    text = json.dumps({"image": BASE64, key: value})
    assert parse_request(text, NONE, DEFECTS).settings == Settings(**{key: expected})


ALLOWED = {
    "iterations": "an integer from 0 to 50",
    "threshold": "a number from 0 to 1",
    "cam_threshold": "a number from 0 to 1",
    "defects": "one or more of crack, spalling, rust",
    "shape": '"polygon" or "mask"',
    "tolerance_px": "a number from 0 to 20",
    "hole_share": "a number from 0 to 1",
    "max_proposals": "an integer from 1 to 10000",
}
BAD = {
    "iterations": [-1, 51, 4.0, 4.5, True, False, "4", "abc", "AUTO", "", [4], {}, 10**5000, float("nan"),
                   float("inf"), -(10**5000), "\ud800"],
    "threshold": [-0.01, 1.01, 2, True, False, "0.5", "", [], float("nan"), float("inf"), float("-inf"),
                  10**5000],
    "cam_threshold": [-1e-9, 1.0000001, False, "0", {}, float("nan"), 10**400],
    "defects": [[], "", ",", "crack,", ["crack", ""], "moss", ["crack", "moss"], "Crack", ["crack", 3],
                [["crack"]], [None], 3, True, {"crack": 1}, [10**5000], float("nan")],
    "shape": ["Polygon", "box", "", 1, True, ["mask"], {}],
    "tolerance_px": [-0.1, 20.5, True, "1", float("nan"), [1]],
    "hole_share": [-0.1, 1.1, True, "1", float("nan"), {}],
    "max_proposals": [0, -1, 10_001, 2.5, True, "3", [], float("nan")],
}  # fmt: skip


def test_every_setting_has_bad_values_here():
    assert list(BAD) == list(ALLOWED) == [field.name for field in fields(Settings)]


@pytest.mark.parametrize("key", BAD)
def test_bad_setting_is_refused_by_name_value_and_what_is_allowed(key):
    for value in BAD[key]:
        message = refusal({"image": BASE64, key: value})
        assert message.startswith(f"{key} is ") and message.endswith(f", but must be {ALLOWED[key]}")
        shown = message[len(f"{key} is ") : -len(f", but must be {ALLOWED[key]}")]
        assert 0 < len(shown) <= 80
        if isinstance(value, (str, float, bool)):
            assert shown == repr(value)


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, ["x" * 100] * 100, {f"{i}" * 20: "y" * 99 for i in range(99)}],
    ids=["str", "list", "dict"],
)
def test_long_values_are_shortened_in_the_message(value):
    message = refusal({"image": BASE64, "iterations": value})
    assert len(message) <= len("iterations is , but must be ") + 80 + len(ALLOWED["iterations"])
    assert ("xxx" if "x" in str(value) else "yyy") in message


def test_defaults_fill_what_the_request_leaves_open():
    defaults = Settings(2, 0.3, 0.1, ("rust",), "mask", 1.0, 0.2, 50)
    assert parse(defaults).settings == defaults
    assert parse(defaults, iterations=0, shape="polygon", tolerance_px=0, max_proposals=5).settings == (
        Settings(0, 0.3, 0.1, ("rust",), "polygon", 0.0, 0.2, 5)
    )  # fmt: skip


SNAP_REMOVED = "was removed: the outline is the map's; cam_threshold makes proposals wider or narrower"
AUTO_REMOVED = 'is "auto", which was removed: give a number of steps, or leave it out for the weights\' own'


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"snap": value}, f"snap {SNAP_REMOVED}; leave it out") for value in (False, True, "false", 0)]
    + [({"iterations": "auto"}, f"iterations {AUTO_REMOVED}")],
    ids=str,
)  # fmt: skip
def test_what_earlier_versions_had_is_refused_with_what_to_use(keys, message):
    assert refusal({"image": BASE64, **keys}) == message


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("ADVCAM_SNAP", "false", f"ADVCAM_SNAP {SNAP_REMOVED}; unset it"),
        ("ADVCAM_ITERATIONS", " auto ", f"ADVCAM_ITERATIONS {AUTO_REMOVED}"),
        ("ADVCAM_IDLE_SECONDS", "300",
         "ADVCAM_IDLE_SECONDS was removed: the networks are small and stay on the GPU; unset it"),
    ],
)  # fmt: skip
def test_a_deployment_with_what_earlier_versions_had_is_refused_with_what_to_use(variable, text, message):
    with pytest.raises(RequestError) as caught:
        settings_from_env({variable: text}, DEFECTS)
    assert str(caught.value) == message
    assert settings_from_env({variable: " "}, DEFECTS) == parse(snap=None).settings == NONE


def test_null_counts_as_absent():
    defaults = Settings(2, 0.3, 0.1, ("rust",), "mask", 1.0, 0.2, 50)
    assert parse(defaults, **dict.fromkeys(ALLOWED)).settings == defaults


@pytest.mark.parametrize("zero", [0, 0.0, -0.0])
def test_threshold_zero_counts_as_absent(zero):
    assert parse(Settings(threshold=0.3), threshold=zero).settings.threshold == 0.3


# ---- settings of a deployment ----


@pytest.mark.parametrize(
    ("variable", "text", "expected"),
    [
        ("ADVCAM_ITERATIONS", "4", {"iterations": 4}),
        ("ADVCAM_THRESHOLD", "0.4", {"threshold": 0.4}), ("ADVCAM_THRESHOLD", "0", {"threshold": 0.0}),
        ("ADVCAM_CAM_THRESHOLD", "1e-1", {"cam_threshold": 0.1}),
        ("ADVCAM_DEFECTS", "rust, crack", {"defects": ("rust", "crack")}),
        ("ADVCAM_SHAPE", "mask", {"shape": "mask"}),
        ("ADVCAM_TOLERANCE_PX", "2", {"tolerance_px": 2.0}),
        ("ADVCAM_HOLE_SHARE", "0.05", {"hole_share": 0.05}), ("ADVCAM_MAX_PROPOSALS", "30", {"max_proposals": 30}),
        ("ADVCAM_ITERATIONS", "", {}), ("ADVCAM_SHAPE", " ", {}), ("ADVCAM_SIZE", "4", {}),
        ("iterations", "4", {}),
    ],
)  # fmt: skip
def test_environment(variable, text, expected):
    settings = settings_from_env({variable: text, "PATH": "/bin"}, DEFECTS)
    assert settings == Settings(**expected)
    assert [type(value) for value in vars(settings).values()] == [
        type(value) for value in vars(Settings(**expected)).values()
    ]


@pytest.mark.parametrize(
    ("key", "texts"),
    [("iterations", ["abc", "4.0", "51", "-1", "true", "9" * 5000, "[" * 100_000, "null", "NaN"]),
     ("threshold", ["1.5", "NaN", "Infinity", "half", "true", "0,5"]), ("cam_threshold", ["-0.1"]),
     ("defects", ["crack,moss", ",", "all"]), ("shape", ["box", "Mask"]),
     ("tolerance_px", ["21", "2px"]), ("hole_share", ["2", "5%"]), ("max_proposals", ["0", "1.5", "all"])],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_bad_environment_is_refused_by_variable_value_and_what_is_allowed(key, texts):
    for text in texts:
        with pytest.raises(RequestError) as caught:
            settings_from_env({f"ADVCAM_{key.upper()}": text}, DEFECTS)
        message = str(caught.value)
        assert message.startswith(f"ADVCAM_{key.upper()} is ") and message.endswith(f"must be {ALLOWED[key]}")
        assert repr(text) in message or len(text) > 30


# ---- fuzz of the envelope ----


def test_envelope_fuzz_raises_request_errors_only():
    rng = random.Random(1)
    atoms = [None, True, 0, 1, -1, 4.0, 1e308, float("nan"), float("inf"), 10**4400, "", "auto", "crack",
             "mask", "QUJD", "\ud800", "\x00", [], {}, ["crack"], [[]], {"a": []}, b"QUJD",
             object()]  # fmt: skip
    keys = ["image", *ALLOWED, "obj_bbox", "", "\ud800", 3, None, ("a",)]
    accepted = 0
    for _ in range(2000):
        body = {rng.choice(keys): rng.choice(atoms) for _ in range(rng.randrange(6))}
        body["image"] = rng.choice(["QUJD", "QUJD", "QUJD", rng.choice(atoms)])
        accepted += passes(body)
    for _ in range(2000):
        text = bytearray(b'\xef\xbb\xbf{"image": "QUJD", "iterations": 4, "hole_share": 1, "defects": ["rust"]}')
        for _ in range(rng.randrange(1, 4)):
            text[rng.randrange(len(text))] = rng.choice(b'"\\{}[],:0123e-.\xff\x00uNI ')
        accepted += passes(bytes(text))
    assert 500 < accepted < 3500  # both ways were met


def passes(body):
    try:
        request = parse_request(body, NONE, DEFECTS)
    except RequestError as error:
        assert len(str(error)) < 400
        return False
    assert request.image_bytes and request.settings.iterations in (None, *range(51))
    return True


# ---- images: helpers ----


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

# ---- images: formats and modes ----


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
    # PIL writes CMYK JPEGs as Adobe does, inverted; whoever misses that returns the negative
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
        (np.array([[-5, -1], [-9, -2]], np.int32), [[0, 0], [0, 0]]),
        (np.array([[0, 0], [0, 0]], np.int32), [[0, 0], [0, 0]]),
        (np.array([[0, 0.25], [0.5, 1.0]], np.float32), [[0, 64], [128, 255]]),
        (np.array([[np.nan, np.inf], [-np.inf, 4.0]], np.float32), [[0, 0], [0, 255]]),
        (np.array([[np.nan, np.nan], [np.nan, np.nan]], np.float32), [[0, 0], [0, 0]]),
        (np.array([[0, 1e-45], [0, 0]], np.float32), [[0, 255], [0, 0]]),
        (np.array([[-3e38, 3e38], [1.5e38, 0]], np.float32), [[0, 255], [128, 0]]),
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
    if (kind, byteorder) == ("u4", ">"):  # Pillow does not know it, nor does CVAT
        assert image_refusal(out.getvalue()).startswith("broken image")
    else:
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


# ---- images: orientation ----

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


# ---- images: size ----


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_50_megapixels(file_format):
    options = {"compress_level": 1} if file_format == "PNG" else {}
    data = encode(Image.new("RGB", (8000, 6250), (10, 200, 30)), file_format, **options)
    rgb = decode(data)
    assert rgb.shape == (6250, 8000, 3)
    assert np.abs(rgb[::500, ::500].astype(int) - (10, 200, 30)).max() <= 2


def test_what_the_limit_allows_is_not_refused_by_pillow():
    side = 10_000  # 100 MP: above the size Pillow warns of
    assert side * side > Image.MAX_IMAGE_PIXELS
    assert decode(encode(Image.new("1", (side, side)), "PNG"), side * side).shape == (side, side, 3)


def test_limit_holds_to_the_pixel():
    data = encode(Image.new("L", (40, 25)), "PNG")
    assert decode(data, 1000).shape == (25, 40, 3)
    assert image_refusal(data, 999) == "too large 0.001>0.000999 MP; use a smaller photo"
    assert image_refusal(png(8000, 8001), 64_000_000).startswith("too large 64.008>64 MP")
    assert image_refusal(png(1, 64_000_001), 64_000_000).startswith("too large 64.000001>64 MP")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (png(20_000, 20_000), "too large 400>100 MP; use a smaller photo"),
        (png(60_000, 60_000), "too large 3600>100 MP; use a smaller photo"),
        (png(12_000, 10_000), "too large 120>100 MP; use a smaller photo"),
        (png(2**31 - 1, 2**31 - 1), "too large 4.611686e+12>100 MP; use a smaller photo"),
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
        "import sys, resource; from defectcam.request import decode_image, ImageError\n"
        "decode_image(bytes.fromhex(sys.argv[1]), 10)\n"
        "before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: decode_image(bytes.fromhex(sys.argv[2]), 100_000_000)\n"
        "except ImageError: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib)\n"
    )
    small, bomb = encode(Image.new("RGB", (2, 2)), "PNG"), png(12_000, 10_000)
    command = [sys.executable, "-c", script, small.hex(), bomb.hex()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert int(done.stdout) < 10_000, done.stderr


def test_pillows_limit_is_named_when_it_is_the_lower_one():
    assert image_refusal(png(20_000, 20_000), 10**9) == "too large 400>178.95697 MP; use a smaller photo"


def test_pillows_global_limits_are_left_alone():
    assert Image.MAX_IMAGE_PIXELS == 1024**3 // 12
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


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


# ---- images: hostile bytes ----

STARTS = ("broken image: ", "unknown format: ", "too large ", "too many JPEG scans ", "out of memory: ")
UNKNOWN = "unknown format: JPEG, PNG, TIFF, BMP or WebP needed"


@pytest.mark.parametrize("file_format", ["GIF", "PPM", "TGA", "ICO", "PCX", "EPS", "PDF", "JPEG2000", "AVIF"])
def test_other_formats_are_refused(file_format):
    assert image_refusal(encode(Image.fromarray(RGB), file_format)) == UNKNOWN


@pytest.mark.parametrize("data", [b"", b"\x00", b"text", b"<html>", b"%PDF-1.4", PAYLOAD])
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
            assert reason.startswith(STARTS) and reason.isprintable() and len(reason) < 130


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
        "import sys; from defectcam.request import decode_image\n"
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


def test_base64_as_cvat_sends_it_is_not_copied():
    import tracemalloc

    body = b'{"image": "%b"}' % base64.b64encode(bytes(6_000_000))
    tracemalloc.start()
    try:
        parse_request(body, Settings(), ["crack"])
        assert tracemalloc.get_traced_memory()[1] < 6_100_000  # the image file alone
    finally:
        tracemalloc.stop()


def test_whitespace_in_base64_costs_no_memory_to_speak_of():
    import tracemalloc

    text = "AAA " * 2_000_000
    tracemalloc.start()
    try:
        request = parse_request({"image": text}, Settings(), ["crack"])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(request.image_bytes) == 4_500_000
    assert peak < 5 * len(text)
