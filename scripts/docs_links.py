"""MkDocs hook: links from docs/ to files elsewhere in the repository.

On GitHub, relative links such as `../kernels/reference.py` work as they are. A documentation site does not contain
those files, so links to them lead to the repository if mkdocs.yml has a `repo_url`, and become plain text if not.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
"""An inline link to a relative path: its text, the path, and the anchor if there is one."""


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Rewrite the links of one page that leave docs/.

    Args:
        markdown: source of the page.
        page: MkDocs' page; its `file.src_uri` is the path inside docs/.
        config: MkDocs' configuration.

    Returns: the source with rewritten links.

    Raises:
        FileNotFoundError: if a link leads to a file that the repository does not contain.
    """
    root = Path(config["config_file_path"]).parent
    folder = posixpath.dirname(posixpath.join(Path(config["docs_dir"]).name, page.file.src_uri))

    def rewrite(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        path = posixpath.normpath(posixpath.join(folder, target))
        if path.startswith(Path(config["docs_dir"]).name + "/"):
            return link[0]
        if not (root / path).exists():
            raise FileNotFoundError(
                f"docs/{page.file.src_uri}: {target} leads to {path}, which does not exist"
            )
        if config["repo_url"]:
            kind = "tree" if (root / path).is_dir() else "blob"
            return f"[{text}]({config['repo_url'].rstrip('/')}/{kind}/main/{path}{anchor})"
        name = text.strip("`")
        return f"`{path}`" if path.endswith(name.rstrip("/")) else f"{text} (`{path}`)"

    return LINK.sub(rewrite, markdown)
