"""What MkDocs does beyond its configuration: two pages live at the top of the repository."""

import re
from pathlib import Path

from mkdocs.structure.files import File


root = Path(__file__).parent.parent
sources = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md"}

# The target of a link or an image, in Markdown or in HTML, unless it is an address or an anchor.
link = re.compile(r"""(?:(?<=\]\()|(?<=src=")|(?<=href="))(?![a-z]+:|#)[^)"\s]+""")


def _on_site(target: str) -> str:
    """A link from the top of the repository, as a link from the top of the site."""
    path, *anchor = target.split("#")
    pages = {source: page for page, source in sources.items()}
    return "#".join([pages.get(path, path.removeprefix("docs/")), *anchor])


def on_page_markdown(markdown, page, config, files):
    if page.file.src_uri in sources:
        text = (root / sources[page.file.src_uri]).read_text(encoding="utf-8")
        return link.sub(lambda match: _on_site(match[0]), text)


def on_files(files, config):
    """Publishes the files outside `docs/` that those pages link to, such as the licence."""
    for source in sources.values():
        for target in link.findall((root / source).read_text(encoding="utf-8")):
            path = _on_site(target).split("#")[0]
            if (root / path).is_file() and files.get_file_from_path(path) is None:
                files.append(File.generated(config, path, abs_src_path=str(root / path)))
