"""A hook of the docs site: links that leave docs/ work in the repository and are plain text on the site."""

import logging
import re
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[1]
_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)(?:#[^)]*)?\)")
_log = logging.getLogger("mkdocs.hooks")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Returns the page without links to files of the repository. A link to a missing file is a warning."""

    def text_of(link: re.Match[str]) -> str:
        if not (_ROOT / link[2]).exists():
            _log.warning("%s links to %s, which does not exist", page.file.src_path, link[2])
        return link[1]

    return _OUTSIDE.sub(text_of, markdown)
