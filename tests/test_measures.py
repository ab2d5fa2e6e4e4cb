"""The measures against reference masks with known results, and the paper's own table."""

import json

import cv2
import numpy as np
import pytest

from defectcam.evaluation import measures
from tests.conftest import DATA

VECTORS = DATA / "measure_vectors"


@pytest.mark.skipif(not VECTORS.exists(), reason="../shared/data/measure_vectors is not on this machine")
def test_agrees_with_the_reference_vectors():
    expected = json.loads((VECTORS / "expected.json").read_text())
    assert len(expected) == 56
    wrong = []
    for name, wanted in expected.items():
        truth, proposed = (cv2.imread(str(VECTORS / f"{name}_{kind}.png"), 0) > 127 for kind in ("gt", "pred"))
        saved = measures.saved_per_component(proposed, truth, name.split("_")[1])
        found = [
            measures.iou(proposed, truth),
            measures.f1_2px(proposed, truth),
            measures.false_components(proposed, truth),
            measures.relative_time_saving(saved),
            *saved,
        ]
        keys = ("iou", "f1_2px", "false_components", "saved_eq3")
        target = [*(wanted[key] for key in keys), *wanted["saved_per_component"]]
        if len(found) != len(target) or np.abs(np.subtract(found, target)).max() > 0.02:
            wrong.append((name, np.round(found, 3).tolist(), np.round(target, 3).tolist()))
    assert wrong == []


@pytest.mark.parametrize(
    "instances, groups, percent",
    [(111, (19, 40, 30), 57), (65, (17, 19, 14), 58), (89, (22, 14, 9), 40), (265, (58, 73, 53), 51)],
    ids=["crack", "spalling", "rust", "all"],
)
def test_table_2_of_the_paper(instances, groups, percent):
    assert round(100 * measures.relative_time_saving_of_groups(instances, groups)) == percent


def test_empty_masks():
    empty = np.zeros((10, 12), bool)
    assert measures.iou(empty, empty) == measures.f1_2px(empty, empty) == 1.0
    assert measures.saved_per_component(empty, empty, "crack") == []
    assert measures.relative_time_saving([]) == 0.0
