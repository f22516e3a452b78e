"""What `mkdocs.yml` runs while it builds the site: pages from outside of docs/, and links into the repository.

On a forge a page links to files of the repository. In the site README.md is the overview, CONTRIBUTING.md and
CHANGELOG.md are pages, and a link to any other file becomes its text, unless `repo_url` in mkdocs.yml says where
the repository is.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

CHECKOUT = Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "index.md",
    "docs/index.md": "contents.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
_FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside of docs/, and the list of pages by another name: README.md is the first page."""
    for name, page in PAGES.items():
        if (old := files.get_file_from_path(page)) is not None:
            files.remove(old)
        text = linked((CHECKOUT / name).read_text(encoding="utf-8"), name, config.repo_url)
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Mend the links of a page of docs/."""
    if page.file.src_uri in PAGES.values():
        return markdown
    return linked(markdown, f"docs/{page.file.src_uri}", config.repo_url)


def linked(markdown: str, name: str, repository: str | None) -> str:
    """The text of a file with links as the site needs them. Raises PluginError for a link to no file."""

    def mended(link: re.Match[str]) -> str:
        image, text, target = link.groups()
        if re.match(r"\w+:|#", target):
            return link.group()
        path, sharp, anchor = target.partition("#")
        meant = posixpath.normpath(posixpath.join(posixpath.dirname(name), path))
        if not (CHECKOUT / meant).exists():
            raise PluginError(f"{name}: a link to {target}, which does not exist")
        page = PAGES.get(meant, meant.removeprefix("docs/") if meant.startswith("docs/") else None)
        if page is not None:
            return f"{image}[{text}]({page}{sharp}{anchor})"
        return f"[{text}]({repository.rstrip('/')}/blob/main/{meant}{sharp}{anchor})" if repository else text

    parts, end = [], 0
    for code in _FENCED.finditer(markdown):
        parts += [_LINK.sub(mended, markdown[end : code.start()]), code.group()]
        end = code.end()
    return "".join([*parts, _LINK.sub(mended, markdown[end:])])
