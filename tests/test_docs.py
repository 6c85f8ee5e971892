"""Documents say what the raw results say, and their links lead somewhere."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import report
from train.report.tables import render

ROOT = Path(__file__).parent.parent
PAGES = [
    path
    for path in sorted(ROOT.glob("**/*.md"))
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
]


def test_no_figure_in_the_documents_is_stale() -> None:
    assert not list(report.stale()), "run python -m benchmarks.report"


def test_the_papers_page_is_what_its_numbers_render_to() -> None:
    paper = json.loads((ROOT / "docs" / "paper.json").read_text())
    assert (ROOT / "docs" / "paper.md").read_text() == render(paper), "run veilcam-train report"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for link, _, heading in re.findall(r"\]\(([^)#\s]*)(#([^)]*))?\)", page.read_text()):
        if "://" in link:
            continue
        there = page.parent / link if link else page
        assert there.exists(), f"{page}: {link}"
        assert not heading or heading in headings(there), f"{page}: {link}#{heading}"


def headings(page: Path) -> list[str]:
    """As a link names them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
