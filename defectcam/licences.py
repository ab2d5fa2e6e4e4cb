"""What the photos that weights have learnt from allow: "free", "research only", or "unknown" where no terms are known.

A file of licences is a JSON object, {SET: {"licence": ..., "terms": one of TERMS, "source": ...}}; SET is the name of a
data set. `defectcam calibrate --licences FILE` keeps what it says of an entry's sets in the manifest's `training.licences`.

Weights that did not begin at random know more than their own sets. What they began with is one more set, "start" and the
first START_LETTERS letters of its sha256. The same file may name its terms.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

TERMS = FREE, RESEARCH_ONLY, UNKNOWN = ("free", "research only", "unknown")  # the later, the stricter
START_LETTERS = 12
NOT_STATED = {"licence": "not stated", "terms": UNKNOWN, "source": "not stated"}


def strictest(terms: Iterable[str]) -> str:
    """The strictest of TERMS; UNKNOWN where there are none."""
    return max(terms, key=TERMS.index, default=UNKNOWN)


def sets_of(training: Mapping) -> list[str]:
    """The data sets that a defect's weights were trained or calibrated on, and what they began with.

    Args:
        training: of the manifest's entry, see `DefectConfig`; nothing in it is taken for granted.
    """
    network = training.get("network")
    network = network if isinstance(network, Mapping) else {}
    found = [name for key in ("sets", "wide_sets", "none_sets") for name in network.get(key) or ()]
    found += [pair.split(":", 1)[0] for pair in network.get("none_regions") or ()]
    found += [name for key in ("sets", "healthy_sets") for name in training.get(key) or ()]
    if network.get("init_sha256"):
        found.append(f"start {network['init_sha256'][:START_LETTERS]}")
    return list(dict.fromkeys(found))


def licences_of(training: Mapping, known: Mapping[str, dict]) -> dict[str, dict]:
    """The licence of every set of `sets_of`: what `known` says of it, else NOT_STATED."""
    return {name: dict(known.get(name, NOT_STATED)) for name in sets_of(training)}


def read_licences(path: Path) -> dict[str, dict]:
    """Read a file of licences.

    Raises:
        ValueError: it cannot be read or is no such file; the message names file, set, value and remedy.
    """
    try:
        licences = json.loads(path.read_bytes())
        check_licences(licences)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): name a file such as weights/licences.json") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}; weights/licences.json shows how it must look") from error
    return licences


def check_licences(licences: object) -> None:
    """Check what a file or a manifest says of licences.

    Raises:
        ValueError: naming the set and the value.
    """
    if not isinstance(licences, dict):
        raise ValueError(f"licences must be an object with an entry for each set, not {licences!r:.80}")
    for name, licence in licences.items():
        fields = ("licence", "terms", "source")
        if not isinstance(licence, dict) or sorted(licence) != sorted(fields):
            raise ValueError(f"the licence of set {name!r} must be an object with {', '.join(fields)}, not {licence!r:.200}")
        for field in fields:
            if not isinstance(licence[field], str):
                raise ValueError(f"{field} of set {name!r} must be a text, not {licence[field]!r:.80}")
        if licence["terms"] not in TERMS:
            allowed = ", ".join(map(repr, TERMS))
            raise ValueError(f"terms of set {name!r} must be one of {allowed}, not {licence['terms']!r:.80}")
