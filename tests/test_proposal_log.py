"""The proposal log: several processes at once, kills in the middle of a line, rotation, a disk that fails."""

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import pytest

from defectcam.deadline import NO_DEADLINE
from defectcam.handler import cvat_shape
from defectcam.proposal_log import ProposalLog, image_hash, read_proposal_log
from defectcam.proposals import Component, Proposal
from defectcam.regions import region_of
from tests.conftest import ROOT

LOGGER = logging.getLogger("test")
PHOTO = np.zeros((40, 60, 3), np.uint8)
FACTS = (image_hash(PHOTO), 60, 40, "v1")
SETTINGS = {"crack": {"iterations": 2}}


def polygon(name):
    attributes = [{"name": "confidence", "value": "90"}, {"name": "proposal", "value": name}]
    return {"label": "crack", "type": "polygon", "points": [1.0, 2.0, 30.0, 2.0, 30.0, 20.5], "attributes": attributes}


def append_many(log, worker, count):
    for number in range(count):
        log.append(*FACTS, SETTINGS, [polygon(f"{worker:04x}{number:04x}")])


def names(folder):
    return [shape["attributes"][1]["value"] for record in read_proposal_log(folder) for shape in record["shapes"]]


def test_an_answer_is_read_as_it_was_given(tmp_path):
    log = ProposalLog(tmp_path / "new" / "folder", LOGGER)
    log.append(*FACTS, SETTINGS, [polygon("0000000a")])
    log.append(*FACTS, SETTINGS, [])  # nothing proposed is an answer too
    first, second = read_proposal_log(tmp_path / "new" / "folder")
    assert (first["width"], first["height"], first["weights"], first["settings"]) == (60, 40, "v1", SETTINGS)
    assert first["shapes"] == [polygon("0000000a")] and second["shapes"] == []
    assert first["image"] == second["image"] == image_hash(PHOTO)
    assert first["time"] < second["time"]


def test_photos_of_other_pixels_or_another_shape_have_other_hashes():
    other = PHOTO.copy()
    other[39, 59, 2] = 1
    assert len({image_hash(PHOTO), image_hash(other), image_hash(PHOTO.reshape(60, 40, 3))}) == 3


@pytest.mark.parametrize("corner", [0, 1])
def test_a_mask_is_kept_as_cvat_stores_it(tmp_path, corner):
    pixels = np.random.default_rng(0).random((13, 17)) < 0.4
    pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1] = True, True, True, True
    pixels[0, 0] = corner
    effective = {"iterations": 2, "shape": "mask", "tolerance_px": 1.0, "hole_share": 1.0}
    shape = cvat_shape(Proposal(Component(pixels, 5, 7), 0.5), "crack", "0000000a", effective, (40, 60), NO_DEADLINE)
    answered = json.dumps(shape)
    ProposalLog(tmp_path, LOGGER).append(*FACTS, SETTINGS, [shape])
    assert json.dumps(shape) == answered, "the answer must not be changed"
    (record,) = read_proposal_log(tmp_path)
    region = region_of("mask", record["shapes"][0]["mask"], 60, 40)
    assert (region.left, region.top) == (5, 7) and (region.mask == pixels).all()
    assert record["shapes"][0]["points"] == shape["points"]


def test_forked_workers_lose_and_mix_nothing(tmp_path):
    log = ProposalLog(tmp_path, LOGGER, max_file_bytes=4000)
    append_many(log, 9, 3)  # the children inherit a log that is in use
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=append_many, args=(log, worker, 200)) for worker in range(4)]
    for worker in workers:
        worker.start()
    append_many(log, 8, 100)
    for worker in workers:
        worker.join()
    wanted = [f"{worker:04x}{number:04x}" for worker in range(4) for number in range(200)]
    wanted += [f"{8:04x}{number:04x}" for number in range(100)] + [f"{9:04x}{number:04x}" for number in range(3)]
    assert sorted(names(tmp_path)) == sorted(wanted)


def test_threads_of_one_worker_lose_and_mix_nothing(tmp_path):
    log = ProposalLog(tmp_path, LOGGER, max_file_bytes=4000)
    threads = [threading.Thread(target=append_many, args=(log, worker, 100)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wanted = [f"{worker:04x}{number:04x}" for worker in range(4) for number in range(100)]
    assert sorted(names(tmp_path)) == sorted(wanted)


WRITER = """
import logging, sys
from defectcam.proposal_log import ProposalLog
log = ProposalLog(sys.argv[1], logging.getLogger(), max_file_bytes=1 << 30)
points = [float(i) for i in range(200_000)]
number = 0
while True:
    attributes = [{"name": "confidence", "value": "1"}, {"name": "proposal", "value": f"{number:08x}"}]
    shape = {"label": "crack", "type": "polygon", "points": points, "attributes": attributes}
    log.append("00", 4, 4, "v1", {}, [shape])
    print(number, flush=True)
    number += 1
"""


def test_kills_in_the_middle_cost_at_most_the_line_being_written(tmp_path):
    """Two workers at once, killed three times: answers that were given before are all there, whole."""
    told = 0
    for _ in range(3):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        writers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)]
        for writer in writers:
            for _ in range(3):
                writer.stdout.readline()
        time.sleep(0.05)
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            told += 3 + len(writer.stdout.read().split())
            writer.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = list(read_proposal_log(tmp_path))
    assert told <= len(found) <= told + 6  # a whole line may have been written and not told
    assert all(len(record["shapes"][0]["points"]) == 200_000 for record in found)


def test_half_a_line_is_left_out_and_the_next_process_goes_on(tmp_path):
    append_many(ProposalLog(tmp_path, LOGGER), 1, 2)
    (path,) = tmp_path.glob("*.jsonl")
    path.write_bytes(path.read_bytes()[:-30])
    append_many(ProposalLog(tmp_path, LOGGER), 2, 1)
    assert names(tmp_path) == ["00010000", "00020000"]


def test_a_line_that_is_no_answer_is_named(tmp_path):
    (tmp_path / "proposals-x.jsonl").write_text('{"time": 1}\n[]\nno json\n')
    with pytest.warns(UserWarning, match="proposals-x.jsonl line") as told:
        assert list(read_proposal_log(tmp_path)) == []
    assert len(told) == 3


def test_full_files_are_left_and_never_touched_again(tmp_path):
    log = ProposalLog(tmp_path, LOGGER, max_file_bytes=1000)
    append_many(log, 1, 20)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.jsonl")}
    append_many(log, 2, 20)
    after = {path: path.read_bytes() for path in tmp_path.glob("*.jsonl")}
    assert len(before) > 3 and len(after) > 2 * len(before) - 2
    grown = [path for path in before if before[path] != after[path]]
    assert len(grown) <= 1 and all(len(content) < 2000 for content in after.values())
    assert len(names(tmp_path)) == 40
    for path in before:  # files may be moved away at any time
        path.unlink()
    append_many(log, 3, 1)
    assert names(tmp_path)[-1] == "00030000"


def test_a_disk_that_fails_costs_a_log_line_not_the_answer(tmp_path, caplog):
    folder = tmp_path / "log"
    log = ProposalLog(folder, LOGGER)
    folder.rmdir()
    append_many(log, 1, 2)
    assert caplog.text.count("cannot write to") == 2 and str(folder) in caplog.text
    folder.mkdir()
    append_many(log, 2, 1)
    assert names(folder) == ["00020000"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        ProposalLog(tmp_path / "file", LOGGER)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this machine")
def test_a_full_disk(tmp_path, caplog, monkeypatch):
    log = ProposalLog(tmp_path, LOGGER)
    append_many(log, 1, 1)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, log._file)  # the file it writes to is on a full disk from now on
    append_many(log, 2, 1)
    append_many(log, 3, 1)
    assert caplog.text.count("No space left") == 1
    assert names(tmp_path) == ["00010000", "00030000"]


def test_a_file_that_cannot_be_closed_costs_a_log_line(tmp_path, caplog):
    log = ProposalLog(tmp_path, LOGGER, max_file_bytes=1)
    append_many(log, 1, 1)
    log._open()
    os.close(log._file)
    append_many(log, 2, 1)
    append_many(log, 3, 1)
    assert caplog.text.count("Bad file descriptor") == 2, "writing and closing"
    assert names(tmp_path) == ["00010000", "00030000"]


def test_it_needs_nothing_but_the_standard_library():
    code = "import sys, defectcam.proposal_log; print({'numpy', 'torch', 'sqlalchemy'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert out.stdout.strip() == "set()", out.stderr
