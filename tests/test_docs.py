"""What the documentation and the messages point to is there: pages, sections, pictures, files and functions."""

import os
import re
from pathlib import Path

from tests.conftest import ROOT

FOLDERS = ("defectcam", "docs", "benchmarks", "weights", "tests")
ENDINGS = (".md", ".py", ".sh", ".yaml", ".html", ".js", ".toml", ".in", "Makefile", "Dockerfile")
CODE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)


def texts() -> dict[Path, str]:
    """The text files of the repository."""
    found = [path for path in ROOT.iterdir() if path.is_file()]
    found += [Path(inner, name) for folder in FOLDERS for inner, _, names in os.walk(ROOT / folder) for name in names]
    return {path: path.read_text() for path in found if path.name.endswith(ENDINGS)}


TEXTS = texts()
PAGES = {path: CODE.sub("", text) for path, text in TEXTS.items() if path.suffix == ".md"}


def headings(page: Path) -> list[str]:
    return re.findall(r"^#+ (.+)$", PAGES[page], re.MULTILINE)


def anchor(heading: str) -> str:
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_pages_and_files_that_are_named_are_there():
    missing = {
        (path.relative_to(ROOT).as_posix(), name)
        for path, text in TEXTS.items()
        for name in re.findall(r"\b(?:docs|defectcam|benchmarks)/[\w/-]+\.(?:md|jpg|png|py)\b", text)
        if not (ROOT / name).is_file()
    }
    assert not missing


def test_links_lead_to_a_file_and_a_section():
    broken = []
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)]+)\)", text):
            if target.startswith("https://"):
                continue
            name, _, section = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            if not file.is_file() or section and section not in map(anchor, headings(file)):
                broken.append((page.name, target))
    assert not broken


def test_sections_that_messages_quote_are_there():
    quoted = [
        (name, section)
        for text in TEXTS.values()
        for name, section in re.findall(r"((?:docs/[\w-]+|README)\.md), \\*\"([^\"\\]+)", text)
    ]
    assert len(quoted) >= 3
    assert not [one for one in quoted if not any(one[1] in heading for heading in headings(ROOT / one[0]))]


def test_functions_that_pages_name_are_in_that_file():
    named = re.findall(r"`(defectcam/[\w/]+\.py)`: `([\w.]+)`", "".join(PAGES.values()))
    assert len(named) >= 20
    for file, name in named:
        *_, last = name.split(".")
        assert re.search(rf"^ *(def|class) {last}\b", (ROOT / file).read_text(), re.MULTILINE), (file, name)


def test_every_page_is_on_the_map():
    readme = PAGES[ROOT / "README.md"]
    assert not [page.name for page in PAGES if page.parent.name == "docs" and f"(docs/{page.name})" not in readme]
