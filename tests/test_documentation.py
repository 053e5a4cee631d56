"""Runs every Python block of the README, of the documentation and of the docstrings.

The blocks of one page run in order, in one namespace, in an interpreter and a folder of their own:
what a reader gets who pastes them one after the other.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


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
    path.relative_to(root): script
    for path in [root / "README.md", *root.glob("docs/**/*.md"), *root.glob("src/**/*.py")]
    if (script := _python_blocks(path.read_text(encoding="utf-8"))).strip()
}
pages = sorted(page for page in scripts if page.suffix == ".md")
modules = sorted(page for page in scripts if page.suffix == ".py")


def run(command, folder):
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        # Compiling takes most of the time.
        env=os.environ
        | {"JAX_ENABLE_X64": "0", "MPLBACKEND": "agg", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_readme_has_an_example():
    assert Path("README.md") in scripts


@pytest.mark.parametrize("page", pages, ids=str)
def test_python_blocks(page, tmp_path):
    (tmp_path / page.name).write_text(scripts[page], encoding="utf-8")
    result = run([page.name], tmp_path)
    # The traceback names the page and the line in it, and shows the code.
    assert result.returncode == 0, f"a block of {page} fails:\n\n{result.stdout}"


# Namespaces of their own, but one interpreter for all: starting it takes longer than they do.
run_all = """
import pathlib, runpy, sys, traceback
failed = 0
for name in sys.argv[1:]:
    try:
        runpy.run_path(name)
    except Exception:
        failed += 1
        traceback.print_exc()
sys.exit(failed)
"""


def test_python_blocks_of_docstrings(tmp_path):
    for module in modules:
        (tmp_path / module).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / module).write_text(scripts[module], encoding="utf-8")
    (tmp_path / "run_all.py").write_text(run_all, encoding="utf-8")
    assert len(modules) > 10
    result = run(["run_all.py", *map(str, modules)], tmp_path)
    assert result.returncode == 0, result.stdout
