"""What the data of weights allow: read from a file, kept in the manifest, told by `defectcam info` and by the function."""

import json
from pathlib import Path

import pytest

from defectcam import info
from defectcam.licences import FREE, NOT_STATED, RESEARCH_ONLY, UNKNOWN, licences_of, read_licences, sets_of, strictest
from defectcam.weights import WeightsError, load_weights, read_manifest
from tests.conftest import DATA, tiny_weights

OWN = {"licence": "own photos", "terms": "free", "source": "us"}
RESEARCH = {"licence": "for research", "terms": "research only", "source": "a university"}


def write(path: Path, content) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_sets_are_those_of_training_and_calibration_and_the_start():
    network = {
        "sets": ["a", "b"], "wide_sets": ["c"], "none_sets": ["d"], "none_regions": ["e:spalling", "a:rust"],
        "init_sha256": "0123456789abcdef",
    }  # fmt: skip
    training = {"network": network, "sets": ["a", "f"], "healthy_sets": ["g"]}
    assert sets_of(training) == [*"abcdefg", "start 0123456789ab"]
    assert sets_of({}) == [] == sets_of({"network": None, "sets": None})
    assert sets_of({"network": {"init_sha256": None, "sets": ["a"]}}) == ["a"]


def test_the_strictest_terms_count():
    assert strictest([FREE, RESEARCH_ONLY, FREE]) == RESEARCH_ONLY
    assert strictest([RESEARCH_ONLY, UNKNOWN, FREE]) == UNKNOWN
    assert strictest([FREE, FREE]) == FREE
    assert strictest([]) == UNKNOWN, "no source says that it is free"


def test_a_set_that_the_file_does_not_name_is_unknown(tmp_path):
    known = read_licences(write(tmp_path / "licences.json", {"mine": OWN, "other": RESEARCH}))
    training = {"sets": ["mine"], "network": {"sets": ["mine"], "init_sha256": "f" * 64}}
    assert licences_of(training, known) == {"mine": OWN, "start ffffffffffff": NOT_STATED}
    assert licences_of(training, {}) == {"mine": NOT_STATED, "start ffffffffffff": NOT_STATED}


@pytest.mark.parametrize(
    "content, words",
    [
        (None, ["cannot be read"]),
        ("{", ["weights/licences.json shows"]),
        ("[1]", ["an entry for each set", "[1]"]),
        ({"mine": "CC0"}, ["'mine'", "'CC0'", "licence, terms, source"]),
        ({"mine": {"licence": "CC0", "terms": "free"}}, ["'mine'", "licence, terms, source"]),
        ({"mine": OWN | {"terms": "Free"}}, ["'mine'", "'Free'", "'free', 'research only', 'unknown'"]),
        ({"mine": OWN | {"source": None}}, ["source of set 'mine'", "None"]),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path, content, words):
    path = tmp_path / "licences.json"
    if content is not None:
        write(path, content)
    with pytest.raises(ValueError) as caught:
        read_licences(path)
    assert all(word in str(caught.value) for word in [str(path), *words])


@pytest.fixture
def weights(tmp_path):
    """Cracks learnt from one's own photos, rust from a set for research, too."""
    folder = tiny_weights(tmp_path / "weights", ("crack", "rust"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["defects"]["crack"]["training"] = {"sets": ["mine"], "licences": {"mine": OWN}}
    manifest["defects"]["rust"]["training"] = {"sets": ["mine", "lab"], "licences": {"mine": OWN, "lab": RESEARCH}}
    write(folder / "manifest.json", manifest)
    return folder


def test_each_defect_and_all_weights_have_terms(weights):
    loaded = load_weights(weights)
    assert {defect: config.terms for defect, config in loaded.configs.items()} == {"crack": FREE, "rust": RESEARCH_ONLY}
    assert loaded.terms == RESEARCH_ONLY
    manifest = json.loads((weights / "manifest.json").read_text())
    manifest["defects"]["crack"]["training"]["sets"].append("found on the web")
    write(weights / "manifest.json", manifest)
    assert load_weights(weights).terms == UNKNOWN == load_weights(weights).configs["crack"].terms


def test_terms_that_a_manifest_cannot_have_are_named(weights):
    manifest = json.loads((weights / "manifest.json").read_text())
    manifest["defects"]["rust"]["training"]["licences"]["lab"]["terms"] = "yes"
    write(weights / "manifest.json", manifest)
    with pytest.raises(WeightsError, match="manifest.json, defect 'rust': terms of set 'lab' must be one of .*'yes'"):
        read_manifest(weights)


def test_info_tells_what_weights_are(weights, capsys):
    info.main(["--weights", str(weights)])
    version, terms, _, crack, crack_terms, mine, _, rust, rust_terms, *rust_sets = capsys.readouterr().out.splitlines()
    assert version == f"weights {load_weights(weights).version} in {weights}" and terms == "terms: research only"
    assert crack == "crack: encoder efficientnet-lite0, finest scale 1, T 2, threshold 0.5, theta 0.8"
    assert crack_terms == "  terms: free" and mine.split() == "mine free own photos (us)".split()
    assert rust.startswith("rust: ") and rust_terms == "  terms: research only"
    assert [line.split()[:2] for line in rust_sets] == [["mine", "free"], ["lab", "research"]]


def test_info_names_what_is_wrong(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        info.main(["--weights", str(tmp_path / "nowhere")])
    error = capsys.readouterr().err
    assert "nowhere" in error and "manifest.json" in error


def test_the_shipped_weights_say_of_every_set_what_is_known(shipped_weights):
    known = read_licences(shipped_weights / "licences.json")
    weights = load_weights(shipped_weights)
    for config in weights.configs.values():
        assert set(config.licences) >= set(sets_of(config.training)) | {"rissbilder_volker", "phinet_labelled"}
        assert all(known[name] == licence for name, licence in config.licences.items())
    assert weights.terms == UNKNOWN
    terms = {name: licence["terms"] for name, licence in known.items()}
    assert terms["deepcrack"] == RESEARCH_ONLY and terms["uav_kaggle315"] == FREE and terms["phinet_labelled"] == UNKNOWN
    card = (shipped_weights / "README.md").read_text()
    assert all(name in card for name in known if not name.startswith("start "))
    if DATA.exists():
        public = {name for name in json.loads((DATA / "splits.json").read_text())}
        assert public <= set(known)
