"""MkDocs hook: adds CHANGELOG.md and bench/results to the site, which lie outside docs/.

In the repository, links from docs/ to these files have one more ``../`` than on the site, and links
back contain the folder ``docs/``, which the site does not have. The hook adapts both.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("CHANGELOG.md", "bench/results")


def on_files(files: Files, config: Any) -> Files:
    """Adds the files that lie outside docs/."""
    for start in OUTSIDE:
        found = [ROOT / start] if (ROOT / start).is_file() else (ROOT / start).rglob("*.*")
        for path in sorted(found):
            source = path.relative_to(ROOT).as_posix()
            files.append(File(source, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Rewrites the links between docs/ and the files that lie outside."""
    if page.file.src_uri.startswith(OUTSIDE):
        return re.sub(r"\]\(((?:\.\./)*)docs/", r"](\1", markdown)
    targets = "|".join(map(re.escape, OUTSIDE))
    return re.sub(rf"\]\(\.\./((?:\.\./)*(?:{targets}))", r"](\1", markdown)
