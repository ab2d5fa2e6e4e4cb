"""The report's figures on interactions whose answer is known, and its page."""

import re
import sqlite3

import pytest
from sqlalchemy.orm import Session

from defectcam.evaluation.measures import relative_time_saving_of_groups
from defectcam.feedback import report
from defectcam.feedback.store import FrameRow, InteractionRow, JobRow, open_store

# Paper, Table 2: instances, and those in the groups of 95, 75 and 50 percent.
TABLE_2 = {"crack": (111, 19, 40, 30), "spalling": (65, 17, 19, 14), "rust": (89, 22, 14, 9)}


def fill(engine, jobs):
    """Jobs {number: (annotator, completed, working_time_s, [interaction])}; an interaction is a dict of columns."""
    blank = dict(
        server="s", frame=0, change="", final_defect=None, proposal="", proposed=None, shape_keys=[], iou=None,
        edited_share=None, saved=None, vertices=0, working_time_s=None, confidence="", iterations="", weights="v1",
        settings=None,
    )  # fmt: skip
    with Session(engine) as session, session.begin():
        for job, (annotator, completed, seconds, interactions) in jobs.items():
            session.add(JobRow(server="s", job=job, task=job, annotator=annotator, completed=completed, labels=["crack"],
                               working_time_s=seconds))  # fmt: skip
            session.flush()
            session.add(FrameRow(server="s", job=job, frame=0, photo="p", width=9, height=9, image="", shapes=[]))
            session.flush()
            for number, given in enumerate(interactions):
                session.add(InteractionRow(**blank | {"id": f"{job}.{number}", "job": job} | given))


def instance(outcome, defect, saved, **more):
    return {"outcome": outcome, "defect": defect, "final_defect": defect, "saved": saved, "shape_keys": ["1"], **more}


@pytest.fixture
def two_jobs(tmp_path):
    """Five proposals and a miss in two weeks, by two people and two versions of the weights."""
    place = str(tmp_path / "feedback.db")
    first = [
        instance("accepted", "crack", 1.0, working_time_s=5.0),
        instance("modified", "crack", 0.6, working_time_s=25.0),
        {"outcome": "rejected", "defect": "rust", "working_time_s": 5.0},
        instance("miss", "crack", 0.0, working_time_s=65.0),
    ]
    second = [
        instance("accepted", "rust", 1.0, weights="v2"),
        # Two proposals joined into one shape: the second one has no shape of its own, so it is no instance.
        instance("modified", "rust", 0.8, weights="v2", shape_keys=[]),
    ]
    fill(
        open_store(place),
        {1: ("anna", "2026-11-16T12:00:00Z", 100.0, first), 2: ("<b>bert", "2026-11-23T12:00:00Z", None, second)},
    )
    return place


def test_figures(two_jobs):
    interactions = report.read_interactions(open_store(two_jobs))
    total = report.Figures(interactions)
    assert (total.proposals, total.missed) == (5, 1)
    assert (total.accepted, total.modified, total.rejected) == (0.4, 0.4, 0.2)
    assert total.saved == pytest.approx((0.95 + 0.5 + 0.95) / 3)
    assert total.saved_of_all == pytest.approx((0.95 + 0.5 + 0.95) / 4)
    assert total.seconds_per_shape == pytest.approx(100 / 3)  # the second job has no times
    assert total.hours == pytest.approx(100 / 3600)
    assert total.hours_saved == pytest.approx(100 / 3600 * 0.6 / 0.4)
    by_defect = report.grouped(interactions, "defect")
    assert list(by_defect) == ["crack", "rust"] and by_defect["rust"].rejected == pytest.approx(1 / 3)
    assert by_defect["crack"].missed == 1 and by_defect["rust"].missed == 0
    assert {one.week for one in interactions} == {"2026-W47", "2026-W48"}
    only_rejected = report.Figures([one for one in interactions if one.outcome == "rejected"])
    assert only_rejected.saved is None and only_rejected.saved_of_all is None and only_rejected.hours_saved is None


@pytest.mark.parametrize("defect", TABLE_2)
def test_eq_3_gives_the_papers_figures(tmp_path, defect):
    instances, *groups = TABLE_2[defect]
    shares = [0.97] * groups[0] + [0.8] * groups[1] + [0.6] * groups[2]
    shares += [0.3] * (instances - len(shares))
    engine = open_store(str(tmp_path / "paper.db"))
    fill(engine, {1: ("anna", "", None, [instance("modified", defect, share) for share in shares])})
    found = report.Figures(report.read_interactions(engine))
    assert found.saved == found.saved_of_all == pytest.approx(relative_time_saving_of_groups(instances, groups))
    assert round(100 * found.saved) == {"crack": 57, "spalling": 58, "rust": 40}[defect]


def test_the_page(two_jobs, tmp_path):
    out = tmp_path / "new" / "report.html"
    report.main(["--db", two_jobs, "--out", str(out)])
    text = out.read_text()
    assert text.count("<svg") == 4 + 6 and "<img" not in text and "http://" not in re.sub(r"<svg.*?</svg>", "", text, flags=re.S)
    for title in ("defect", "annotator", "weights", "week"):
        assert f"<h2>By {title}</h2>" in text
    for name in ("crack", "rust", "anna", "v1", "v2", "2026-W47", "2026-W48"):
        assert f"<td>{name}</td>" in text
    assert "<td>&lt;b&gt;bert</td>" in text, "names are no markup"
    assert "5 proposals: 40 % accepted" in " ".join(text.split())
    crack = re.search(r"<td>crack</td>(.*?)</tr>", text, re.S)[1]
    assert re.findall(r"<td>(.*?)</td>", crack) == ["2", "50 %", "50 %", "0 %", "1", "31.7", "72 %", "48 %", "0.03", "0.02"]


def test_nothing_to_report(tmp_path):
    with pytest.raises(SystemExit, match="no database"):
        report.main(["--db", str(tmp_path / "nowhere.db")])
    open_store(str(tmp_path / "empty.db"))
    with pytest.raises(SystemExit, match="no interactions yet"):
        report.main(["--db", str(tmp_path / "empty.db")])
    sqlite3.connect(tmp_path / "other.db").execute("CREATE TABLE t (x)")
    with pytest.raises(SystemExit, match="not made by defectcam harvest"):
        report.main(["--db", str(tmp_path / "other.db")])
    (tmp_path / "text.db").write_text("no database, but long enough to be looked at" * 30)
    with pytest.raises(SystemExit, match="cannot open"):
        report.main(["--db", str(tmp_path / "text.db")])
