"""`make demo`'s command end to end on the sample photo, and on files that are no photos."""

import json
import subprocess
import sys

import cv2
import numpy as np

from tests.conftest import ROOT


def demo(*arguments):
    command = [sys.executable, "-m", "defectcam", "demo", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_the_sample_photos_crack_is_proposed_and_drawn(tmp_path):
    """The outline proposed lies on the crack that the generator drew, and says so in its files."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from make_sample import make_sample
    finally:
        sys.path.pop(0)
    out = demo(ROOT / "docs" / "sample.jpg", "--iterations", 1, "--out", tmp_path)
    assert out.returncode == 0, out.stderr
    assert str(tmp_path / "sample.json") in out.stdout and str(tmp_path / "sample.png") in out.stdout
    shapes = json.loads((tmp_path / "sample.json").read_text())
    photo, overlay = cv2.imread(str(ROOT / "docs" / "sample.jpg")), cv2.imread(str(tmp_path / "sample.png"))
    assert overlay.shape == photo.shape and (overlay != photo).any()
    truth = make_sample()[1]["crack"]
    proposed = np.zeros(truth.shape, np.uint8)
    for shape in shapes:
        if shape["label"] == "crack":
            cv2.fillPoly(proposed, [np.round(np.reshape(shape["points"], (-1, 2))).astype(np.int32)], 1)
    near = cv2.dilate(proposed, np.ones((5, 5), np.uint8)) > 0
    assert (near & truth).sum() > 0.3 * truth.sum()


def test_no_photo(tmp_path):
    out = demo(tmp_path / "missing.jpg")
    assert out.returncode != 0 and "missing.jpg" in out.stderr
    (tmp_path / "text.jpg").write_text("no photo")
    out = demo(tmp_path / "text.jpg", "--out", tmp_path)
    assert out.returncode != 0 and "unknown format" in out.stderr
    assert json.loads((tmp_path / "text.json").read_text())[0]["label"] == "unprocessed"
    out = demo(ROOT / "docs" / "sample.jpg", "--iterations", "many")
    assert out.returncode != 0 and "iterations" in out.stderr and "many" in out.stderr
