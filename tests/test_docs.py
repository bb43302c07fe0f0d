"""What the README and the manual say about the tree. `.ci/docs` builds the pages, strictly."""

import csv
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
if not (ROOT / "mkdocs.yml").exists():
    pytest.skip("the documentation is in the source tree alone", allow_module_level=True)

RESULTS = ROOT / "bench" / "results"
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")])
PATH = re.compile(
    r"(?<![\w/.-])((?:bench|docs|examples|python|tests|tools|csrc|hivtp_kernels|\.ci)/[\w./<>-]*[\w>])"
)
MODULE = re.compile(r"python -m ((?:bench|tools|hivtp_\w+)[\w.]*)")
LINK = re.compile(r"\]\(([^)#\s]+)(#[\w-]+)?\)")
# Pages that docs/hooks.py makes of files elsewhere.
GENERATED = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def anchors(page):
    """The anchors of a page's headings, as Python-Markdown makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    plain = [re.sub(r"[^\w\s-]", "", heading.lower()).strip() for heading in headings]
    return {"#" + re.sub(r"[\s-]+", "-", heading) for heading in plain}


def figure(row, column):
    return f"{100 * float(row[column]):.1f}"


def table(page, header):
    """The cells of the rows of a table that begins with such a line."""
    lines = iter((ROOT / "docs" / page).read_text().splitlines())
    assert any(line.startswith(header) for line in lines), f"{page} has no table {header}"
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100


def test_the_readme_has_the_two_commands():
    text = (ROOT / "README.md").read_text()
    for number in (1, 2):
        block = re.search(rf"<!-- command {number} -->\n```bash\n(.+?)^```$", text, re.M | re.S)
        assert block and "constraints.txt" in block[1]


@pages
def test_every_path_exists(page):
    text = page.read_text()
    for path in PATH.findall(text):
        # An example is a new file.
        if "<" not in path and f"\n# {path}\n" not in text:
            assert (ROOT / path).exists(), f"{page.name} names {path}, which does not exist"


@pages
def test_every_module_exists(page):
    for module in MODULE.findall(page.read_text()):
        path = module.replace(".", "/")
        files = [
            root / f
            for root in (ROOT, ROOT / "python")
            for f in (f"{path}.py", f"{path}/__main__.py")
        ]
        assert any(map(Path.exists, files)), f"{page.name} runs {module}, which does not exist"


@pages
def test_every_link_resolves(page):
    for target, anchor in LINK.findall(page.read_text()):
        if target.startswith(("http", "mailto")):
            continue
        path = page.parent / target
        if page.parent == ROOT / "docs":
            if target.startswith("figures/"):
                path = RESULTS / target.removeprefix("figures/")
            path = ROOT / GENERATED.get(target, path)
        assert path.exists(), f"{page.name} links to {target}, which does not exist"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), f"{page.name} links to {target}{anchor}"


def test_code_fits_the_page():
    """Wider lines would have to be scrolled; commands may be long."""
    for page in PAGES:
        blocks = re.findall(r"^ *```python\n(.+?)^ *```$", page.read_text(), re.M | re.S)
        for line in "".join(blocks).splitlines():
            assert len(line) <= 90, f"{page.name}: {line}"


def test_accuracy_is_that_of_the_results():
    with (RESULTS / "accuracy" / "curve.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == "all"]
    middle = [r for r in rows if (r["layers"], r["regions"], r["window"]) == ("(1, 2)", "2", "0")]
    (full,) = (row for row in rows if row["method"] == "full")
    for tokens, *cells in table("accuracy.md", "| tokens |"):
        if tokens.startswith("576"):
            assert cells[0] == figure(full, "accuracy")
            continue
        by_name = {(r["method"], r["rows"]): r for r in middle if r["budget"] == tokens}
        names = [(m, rows) for rows in ("cls", "all") for m in ("hivtp", "topk")]
        names += [("uniform", "cls"), ("random", "cls")]
        assert cells == [figure(by_name[name], "accuracy") for name in names]
    by_type = [
        ("hivtp", "| question | example |", 1, [full]),
        ("topk", "| question | 288 |", 0, []),
    ]
    for method, header, skipped, first in by_type:
        own = {r["budget"]: r for r in middle if (r["method"], r["rows"]) == (method, "cls")}
        for question, *cells in table("accuracy.md", header):
            expected = [*first, *(own[budget] for budget in ("288", "192", "128", "64", "32"))]
            assert cells[skipped:] == [figure(row, question) for row in expected]


def test_times_are_those_of_the_results():
    with (RESULTS / "ttft.csv").open() as file:
        rows = [
            r for r in csv.DictReader(file) if (r["case"], r["batch"]) == ("LLaVA-1.5 0.9B", "1")
        ]
    (unpruned,) = (row for row in rows if row["method"] == "unpruned, SDPA")
    shown = table("performance.md", "| LLaVA-1.5,")
    for row, (_, tokens, seconds, ratio, flops) in zip(rows, shown, strict=False):
        assert (tokens, seconds) == (row["visual_tokens"], f"{float(row['ttft_s']):.2f} s")
        assert float(ratio) == pytest.approx(float(row["of_unpruned"]), abs=0.006)
        predicted = float(row["predicted_ttft_s"]) / float(unpruned["predicted_ttft_s"])
        assert float(flops) == pytest.approx(predicted, abs=0.006)
