"""Pages and figures of the manual whose source is elsewhere in the tree."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
FIGURES = ROOT / "bench" / "results"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add CONTRIBUTING.md and CHANGELOG.md as pages, and the figures of bench/results."""
    for uri, source in PAGES.items():
        # Links from the root of the repository into the manual lead through docs/.
        text = (ROOT / source).read_text().replace("](docs/", "](")
        files.append(File.generated(config, uri, content=text))
    for path in sorted(FIGURES.rglob("*")):
        if path.suffix in (".png", ".jpg"):
            uri = f"figures/{path.relative_to(FIGURES).as_posix()}"
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files
