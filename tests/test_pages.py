"""Names as people give them, in the pages and plots: no formula, no markup, and a picture for each of them."""

import json
import shutil
from html import unescape
from html.parser import HTMLParser
from urllib.parse import unquote
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest

from defectcam.evaluation import evaluate
from defectcam.evaluation.figures import COLUMNS
from defectcam.feedback import audit, loop, next_images, report
from defectcam.feedback.store import open_store
from defectcam.paths import write_image
from tests.test_next_images import texture, weights_dir  # noqa: F401
from tests.test_report import fill, instance

NAMES = [
    "$x^$", "a $5 and $6", "{}", "{0} {{ found }} {% x %}", "%d %s 100 %", "<b>bold</b>", "<script>alert(1)</script>",
    "two\nlines", "_begins", "__twice__", "ends_", "'single' \"double\"", "🧱 brick", "日本語", "\\alpha", "a|b", "*star*",
    "[link](http://x)", "&amp;", "1.5", "2026-11-23", "nan", "x" * 300, " blank ", "",
]  # fmt: skip


class Page(HTMLParser):
    """What a browser makes of a page: its texts and pictures, and which elements there are."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts, self.pictures, self.tags = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "img":
            self.pictures.append(unquote(dict(attrs)["src"]))

    def handle_data(self, data):
        self.texts.append(data)


def test_the_report_shows_every_name(tmp_path, recwarn):
    place = str(tmp_path / "feedback.db")
    jobs = {
        number: (name, f"2026-11-{1 + number:02}T12:00:00Z", 60.0, [
            instance("accepted", name, 1.0, working_time_s=5.0, weights=name), {"outcome": "rejected", "defect": name, "weights": name},
        ])
        for number, name in enumerate(NAMES)
    }  # fmt: skip
    fill(open_store(place), jobs)
    report.main(["--db", place, "--out", str(tmp_path / "report.html")])
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert not page.tags & {"script", "img"} and page.texts.count("<b>bold</b>") >= 8
    for name in NAMES:
        cells = name or "unknown"  # of an annotator without a name
        assert page.texts.count(cells) >= 2, name
        in_plots = report.short(name)
        assert sum(text == in_plots for text in page.texts) >= 2 + 6 or len(in_plots) == 0, "bars and legends show it"
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_names_too_long_for_plots_are_cut():
    assert report.short("x" * 300) == "x" * 29 + "..." and report.short("two\n lines\t") == "two lines"


def test_the_loops_page_takes_any_name():
    figures = {"iou": 0.5, "found_recall": 0.2}
    for name in NAMES:
        arm = {"kind": "before", "k": 0, "draw": None, "figures": {name: figures}, "old": [[0.5, 0.5]]}
        found = {"command": "defectcam loop --defect 'a\nb'", "defect": name, "campaign": name, "old_sets": ["x"], "arms": [arm]}
        text = loop.PAGE.render(campaigns=[(found, loop.table(found))], shown=loop.SHOWN, plain=loop.plain)
        (row,) = (line for line in text.splitlines() if line.startswith("| before"))
        (head,) = (line for line in text.splitlines() if line.startswith("| weights"))
        assert row.count("|") == head.count("|") and "\n    defectcam loop --defect 'a b'\n" in text
        assert text.count("\n## ") == 1, name
    assert "\\<b\\>" in loop.plain("<b>$x_1$|") and loop.plain("<b>$x_1$|").endswith("\\$x_1\\$\\|")
    assert loop.plain("phinet_labelled") == "phinet_labelled" and loop.plain("_begins") == "\\_begins"


ODD = "$x^$ <b>%41_#?"  # of a defect, a set and a photo: what a file system takes


@pytest.fixture(scope="module")
def odd(weights_dir, tmp_path_factory):  # noqa: F811
    """(weights, data): one defect, set and photo, whose names are all ODD; the photo has a label where nothing is."""
    folder = tmp_path_factory.mktemp("odd")
    shutil.copytree(weights_dir, folder / "weights")
    manifest = json.loads((folder / "weights" / "manifest.json").read_text())
    training = {"sets": [ODD], "healthy_sets": []}
    manifest["defects"] = {ODD: manifest["defects"]["crack"] | {"training": training}}
    (folder / "weights" / "manifest.json").write_text(json.dumps(manifest))
    for stem in (ODD, "CON"):
        write_image(folder / "data" / ODD / "images" / f"{stem}.png", texture(1, 8))
        mask = np.zeros((96, 96), np.uint8)
        mask[20:50, 20:50] = 255
        write_image(folder / "data" / ODD / "masks" / ODD / f"{stem}.png", mask)
    (folder / "data" / "splits.json").write_text(json.dumps({ODD: {"train": [], "val": [ODD, "CON"]}}))
    return folder / "weights", folder / "data"


def run(command, *arguments):
    command.main([str(argument) for argument in arguments])


def shown(folder, page):
    """The page, whose pictures are all there and differ."""
    found = Page((folder / page).read_text(encoding="utf-8"))
    assert found.pictures and len(set(found.pictures)) == len(found.pictures)
    for picture in found.pictures:
        if picture.endswith(".svg"):
            assert ElementTree.parse(folder / picture).getroot().tag.endswith("svg"), picture
        else:
            assert cv2.imread(str(folder / picture)) is not None, picture
    return found


def test_evaluations_page(odd, tmp_path, capsys):
    weights, data = odd
    run(evaluate, "--weights", weights, "--data", data, "--steps", "0,1", "--out", tmp_path)
    page = shown(tmp_path, "evaluate.html")
    assert len(page.pictures) == 3 and (tmp_path / "evaluate.html").read_text("utf-8").count("<b>") == len(COLUMNS)
    assert ODD in page.texts and any(f"{ODD} {ODD}: " in text for text in page.texts)
    assert ODD[:18] in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"evaluate", "evaluate.html", "evaluate.json"}


def test_the_audits_page(odd, tmp_path):
    weights, data = odd
    run(audit, "--weights", weights, "--data", data, "--sets", ODD, "--out", tmp_path)
    page = shown(tmp_path, "index.html")
    assert any(f"{ODD}, {ODD}/{ODD} at x" in " ".join(text.split()) for text in page.texts)


def test_the_page_of_the_next_images(odd, tmp_path):
    weights, data = odd
    run(next_images, data, "--weights", weights, "--out", tmp_path)
    page = shown(tmp_path, "index.html")
    assert any(unescape(text).endswith(f"/{ODD}.png") for text in page.texts)


def test_a_defect_whose_name_leads_out_of_the_data_is_refused(odd, tmp_path):
    weights, data = odd
    manifest = json.loads((weights / "manifest.json").read_text())
    shutil.copytree(weights, tmp_path / "weights")
    manifest["defects"] = {"../../x": manifest["defects"][ODD]}
    (tmp_path / "weights" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SystemExit, match="'../../x' does not lead to a file below"):
        run(evaluate, "--weights", tmp_path / "weights", "--data", data, "--out", tmp_path / "out")
