"""A new version of the weights: the new files of some defects, and the running ones of the others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from defectcam.feedback.replay import FOLDER as REPLAY
from defectcam.paths import file_name
from defectcam.weights import read_manifest, sha256_of, write_manifest, write_whole

NOT_PROMOTED = 3  # exit status where the new weights are worse


def parent_of(weights: Path) -> dict:
    """How a new version's manifest names the version that it was made from."""
    return {"version": read_manifest(weights)[0], "manifest_sha256": sha256_of(weights / "manifest.json")}


def assemble(weights: Path, new_dirs: dict[str, Path], folder: Path) -> Path:
    """Write a new version to a folder: all defects, and the replay pack of the running weights.

    Args:
        weights: folder of the running weights.
        new_dirs: defect -> folder of its new weights.
    """
    folder.mkdir(exist_ok=True)
    if (weights / REPLAY).is_dir():
        shutil.copytree(weights / REPLAY, folder / REPLAY, dirs_exist_ok=True)
    entries = json.loads((weights / "manifest.json").read_text())["defects"]
    for defect in entries:
        source = new_dirs.get(defect, weights)
        entry = json.loads((source / "manifest.json").read_text())["defects"][defect]
        for field, suffix in (("file", ".safetensors"), ("graph", ".onnx")):
            if entry.get(field):
                name = file_name(defect, suffix)  # the same name may stand for another defect's file in the other folder
                shutil.copyfile(source / entry[field], folder / name)
                entry[field] = name
        entries[defect] = entry
    write_manifest(folder, entries, parent_of(weights))
    return folder


def publish(candidate: Path, folder: Path) -> None:
    """Copy a weights folder, its manifest last and in one move, so a manifest is never there without its files."""
    shutil.copytree(candidate, folder, ignore=shutil.ignore_patterns("manifest.json"), dirs_exist_ok=True)
    write_whole(folder / "manifest.json", (candidate / "manifest.json").read_bytes())
