"""Runs every Python block of the README, of the documentation and of the docstrings.

The blocks of one page run in order, in a namespace and a folder of their own: what a reader gets
who pastes them one after the other. The pages share a few interpreters: to start one, and to
compile the same small programs again, takes longer than most pages do.
"""

import functools
import re
from pathlib import Path

import pytest
from helpers import run_scripts


root = Path(__file__).parent.parent


def _python_blocks(text: str) -> str:
    """The page with all but its Python blocks blanked, so that the lines keep their numbers."""
    lines, indent = [], None
    for line in text.splitlines():
        code = ""
        if indent is None:
            fence = re.match(r"( *)```python\b", line)
            indent = len(fence[1]) if fence else None
        elif line.strip() == "```":
            indent = None
        else:
            code = line[indent:]
        lines.append(code)
    return "\n".join(lines) + "\n"


scripts = {
    path.relative_to(root).as_posix(): script
    for path in [root / "README.md", *root.glob("docs/**/*.md"), *root.glob("src/**/*.py")]
    if (script := _python_blocks(path.read_text(encoding="utf-8"))).strip()
}


def _shares():
    """The pages of each interpreter: the README and the docstrings in one, the site in two. The
    longest pages are dealt out first, in turn, so that the two shares are alike."""
    site = sorted(
        (page for page in scripts if page.startswith("docs/")),
        key=lambda page: -len(scripts[page].split()),
    )
    rest = [page for page in scripts if page not in site]
    return [sorted(pages) for pages in (rest, site[::2], site[1::2])]


shares = _shares()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each page of a share came to, all from one interpreter."""

    @functools.cache
    def run(share):
        home, paths = tmp_path_factory.mktemp("pages"), {}
        for page in shares[share]:
            paths[page] = home / page.replace("/", "__") / Path(page).name
            paths[page].parent.mkdir()
            paths[page].write_text(scripts[page], encoding="utf-8")
        found = run_scripts(list(paths.values()), home / "outcomes")
        return {page: found[path] for page, path in paths.items()}

    return run


def test_the_readme_and_the_docstrings_have_examples():
    assert "README.md" in scripts
    assert sum(page.startswith("src/") for page in scripts) > 10


def _marks(share):
    # One worker for each share, so that it runs once; the shares of the site take minutes.
    marks = [pytest.mark.xdist_group(f"pages {share}")]
    return marks + ([pytest.mark.slow] if share > 0 else [])


@pytest.mark.parametrize(
    "page, share",
    [
        pytest.param(page, share, id=page, marks=_marks(share))
        for share, pages in enumerate(shares)
        for page in pages
    ],
)
def test_python_blocks(page, share, outcomes):
    printed, error = outcomes(share)[page]
    # The traceback names the page and the line in it, and shows the code.
    assert error == "", f"a block of {page} fails:\n\n{printed}\n{error}"
