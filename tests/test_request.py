"""The envelope and its settings: what comes through, what is refused, and in which words."""

import base64
import json
import random
import tracemalloc
from dataclasses import fields

import pytest

from defectcam.request import MAX_CLICKS, MAX_REST_BYTES, parse_request
from defectcam.settings import RequestError, Settings, settings_from_env

DEFECTS = ("crack", "spalling", "rust")
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
    unknown = {"neg_points": [], "obj_bbox": None, "Iterations": 4, "zoom": float("nan")}
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


def test_base64_as_cvat_sends_it_is_not_copied():
    body = b'{"image": "%b"}' % base64.b64encode(bytes(6_000_000))
    tracemalloc.start()
    try:
        parse_request(body, Settings(), ["crack"])
        assert tracemalloc.get_traced_memory()[1] < 6_100_000  # the image file alone
    finally:
        tracemalloc.stop()


def test_whitespace_in_base64_costs_no_memory_to_speak_of():
    text = "AAA " * 2_000_000
    tracemalloc.start()
    try:
        request = parse_request({"image": text}, Settings(), ["crack"])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(request.image_bytes) == 4_500_000
    assert peak < 5 * len(text)
