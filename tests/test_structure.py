"""The shape of the library: what is public, what is documented, and what may import what."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import equinox as eqx
import pytest

import fisher_flow


root = Path(__file__).parent.parent
package = root / "src" / "fisher_flow"
public = {
    name: value
    for name, value in vars(fisher_flow).items()
    if not name.startswith("_") and not inspect.ismodule(value)
}
modules = [x for x in public.values() if inspect.isclass(x) and issubclass(x, eqx.Module)]

# The arrows of the design: a folder may import itself, the folders named here, and the private
# modules beside them (`_misc.py` and the like), which in turn import no folder.
may_import = {
    "_linalg": set(),
    "_networks": set(),
    "_data": set(),
    "_evaluation": set(),
    "_flows": {"_linalg"},
    "_values": {"_networks"},
    "_geometry": {"_linalg", "_flows"},
    "_refinement": {"_linalg", "_networks", "_flows", "_geometry"},
    "_acting": {"_data"},
    "_agents": {"_data", "_networks", "_flows", "_values", "_geometry", "_refinement"},
    "_training": {"_data", "_acting", "_flows", "_agents"},
}


@pytest.mark.parametrize("cls", modules, ids=lambda cls: cls.__name__)
def test_abstract_or_final(cls):
    if cls.__name__.startswith("Abstract"):
        with pytest.raises(TypeError, match="instantiate abstract class"):
            cls()
    else:
        assert cls.__subclasses__() == [], "final classes may be wrapped, not subclassed"
        assert not inspect.isabstract(cls), "abstract classes are called Abstract..."


@pytest.mark.parametrize("name", public)
def test_public_names_have_a_docstring(name):
    docstring = public[name].__doc__ or ""
    assert docstring and not docstring.startswith(f"{name}("), "(a dataclass writes one by itself)"


def _documented():
    """What the pages of the API name: pairs of a public name and the members listed under it."""
    entry = re.compile(r"^ *::: fisher_flow\.(\S+)\n((?: +.*\n)*)", re.MULTILINE)
    for page in sorted((root / "docs" / "api").rglob("*.md")):
        for name, options in entry.findall(page.read_text(encoding="utf-8") + "\n"):
            yield name, re.findall(r"^ +- (\w+)$", options, re.MULTILINE)


def test_every_public_name_is_documented_once():
    assert Counter(name for name, _ in _documented()) == Counter(list(public))


@pytest.mark.parametrize("name, members", list(_documented()))
def test_documented_members_exist(name, members):
    fields = getattr(public[name], "__dataclass_fields__", {})  # the site reads their docstrings
    for member in members:
        documented = member in fields or getattr(public[name], member).__doc__
        assert documented, f"{name}.{member} has no docstring of its own"


def _imports(path):
    """The modules that a file imports, as full dotted names, wherever in the file it does so."""
    parents = ("fisher_flow", *path.relative_to(package).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (x.name for x in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) + 1 - node.level] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            yield from (f"{module}.{x.name}" for x in node.names)


def test_folders_are_those_of_the_design():
    assert {x.parent.name for x in package.glob("*/__init__.py")} == set(may_import)


@pytest.mark.parametrize(
    "path",
    [x for x in sorted(package.rglob("*.py")) if x != package / "__init__.py"],
    ids=lambda path: path.relative_to(package).as_posix(),
)
def test_import_arrows(path):
    folder = path.relative_to(package).parts[0]
    allowed = {folder, *may_import[folder]} if folder in may_import else set()
    private = {x.stem for x in package.glob("_*.py")} - {"__init__"}
    for target in _imports(path):
        if target.split(".")[0] == "fisher_flow":
            assert [*target.split("."), ""][1] in allowed | private, f"{path} imports {target}"


def _only_copies(function):
    """Whether a constructor stores its arguments as they come, and does no more than check them."""
    arguments = function.args
    names = {x.arg for x in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
    stored = []
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.discard(node.id)  # converted before it is stored
        elif isinstance(node, ast.Assign):
            values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            stored += [x for x in values if any("self." in ast.unparse(y) for y in node.targets)]
    return len(stored) > 0 and all(isinstance(x, ast.Name) and x.id in names for x in stored)


def _has_property_for_a_field(cls):
    """Type checkers take a field of a base for an argument of the constructor that is made from the
    fields, even where a property stands for it. Such a class writes its constructor out."""
    fields = [name for base in cls.__mro__ for name in vars(base).get("__annotations__", ())]
    return any(isinstance(getattr(cls, name, None), property) for name in fields)


@pytest.mark.parametrize(
    "path",
    [x for x in sorted(package.rglob("*.py")) if x.stem != "__init__"],
    ids=lambda path: path.relative_to(package).as_posix(),
)
def test_no_constructor_only_copies(path):
    """Settings are fields, checked in `__check_init__`: each is written twice, not four times."""
    module = importlib.import_module(".".join(path.relative_to(root / "src").with_suffix("").parts))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            for function in node.body:
                if isinstance(function, ast.FunctionDef) and function.name == "__init__":
                    exempt = _has_property_for_a_field(getattr(module, node.name))
                    assert exempt or not _only_copies(function), node.name


def test_importing_the_library_is_light():
    check = "import sys, fisher_flow; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = {
        "matplotlib",
        "gymnasium",
        "tqdm",
        "flax",
        "orbax",
        "h5py",
        "ogbench",
        "minari",
        "tyro",
        "grain",
        "wandb",
        "av",
    }
    assert heavy.isdisjoint(loaded)
