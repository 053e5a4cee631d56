"""The shape of the library: what is public, what is documented, and what may import what."""

import ast
import graphlib
import importlib
import inspect
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import equinox as eqx
import helpers
import jax.numpy as jnp
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


# Every file of the library, by its dotted name; a folder goes by that of its `__init__`.
files = {
    ".".join(("fisher_flow", *path.relative_to(package).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in sorted(package.rglob("*.py"))
}
trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in files.items()}
folders = {name for name, path in files.items() if path.name == "__init__.py"} - {"fisher_flow"}
every_file = pytest.mark.parametrize("name", files)


def _imports(name):
    """What a file imports from the library, as full dotted names, wherever in the file it does so:
    where only types are checked, too."""
    parents = name.split(".") if files[name].name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(trees[name]):
        targets = []
        if isinstance(node, ast.Import):
            targets = [x.name for x in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) + 1 - node.level] if node.level else []
            module = ".".join((*base, *filter(None, [node.module])))
            targets = [f"{module}.{x.name}" for x in node.names]
        yield from (target for target in targets if target.split(".")[0] == "fisher_flow")


def _file_of(target):
    """The file that holds what is imported."""
    while target not in files:
        target = target.rpartition(".")[0]
    return target


def _names_of(folder):
    """What the `__init__` of a folder names."""
    imports = (node for node in trees[folder].body if isinstance(node, ast.ImportFrom))
    return {x.asname for node in imports for x in node.names}


def _classes():
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                yield name, node


def _method(cls, name):
    return next((x for x in cls.body if isinstance(x, ast.FunctionDef) and x.name == name), None)


def test_folders_are_those_of_the_design():
    assert {x.parent.name for x in package.glob("*/__init__.py")} == set(may_import)


@pytest.mark.parametrize("name", [name for name in files if name != "fisher_flow"])
def test_import_arrows(name):
    folder = name.split(".")[1]
    allowed = {folder, *may_import[folder]} if folder in may_import else set()
    private = {x.stem for x in package.glob("_*.py")} - {"__init__"}
    for target in _imports(name):
        assert [*target.split("."), ""][1] in allowed | private, f"{name} imports {target}"


@every_file
def test_of_another_folder_only_what_its_init_names(name):
    for target in _imports(name):
        for folder in folders:
            within = name == folder or name.startswith(f"{folder}.")
            if target.startswith(f"{folder}.") and not within:
                what = target.removeprefix(f"{folder}.")
                assert what in _names_of(folder), f"{name} imports {target}"


def test_no_import_cycle():
    graph = {name: {_file_of(target) for target in _imports(name)} for name in files}
    graphlib.TopologicalSorter(graph).prepare()  # raises, and names a cycle


def test_a_module_at_the_root_has_at_least_two_folders_that_use_it():
    users = {name: set() for name in files if name.count(".") == 1 and name not in folders}
    for name in files:
        for target in map(_file_of, _imports(name)):
            if target in users and name.count(".") > 1:
                users[target].add(name.split(".")[1])
    assert {name: used for name, used in users.items() if len(used) < 2} == {}


def test_abstract_classes_have_abstract_fields_only():
    found = []
    for name, cls in _classes():
        if cls.name.startswith("Abstract"):
            fields = (x for x in cls.body if isinstance(x, ast.AnnAssign))
            kinds = (ast.unparse(x.annotation).split("[")[0].split(".")[-1] for x in fields)
            if _method(cls, "__init__") or set(kinds) - {"AbstractVar", "AbstractClassVar"}:
                found.append(f"{name}.{cls.name}")
    assert found == []


def test_no_two_files_share_a_name():
    names = Counter(path.name for path in files.values() if path.name != "__init__.py")
    assert [name for name, count in names.items() if count > 1] == []


def test_no_function_is_long():
    """None has more than 80 lines, without its docstring."""
    found = {}
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                docstring = node.body[0] if ast.get_docstring(node) else None
                lines = (node.end_lineno or 0) - node.lineno + 1
                if docstring is not None:
                    lines -= (docstring.end_lineno or 0) - docstring.lineno + 1
                if lines > 80:
                    found[f"{name}.{node.name}"] = lines
    assert found == {}


def _lists_of_laws():
    """The classes in each list of `helpers.py`, and the class that they are of."""
    sizes = dict(width_size=8, depth=1)
    flow = helpers.shifted_policy(helpers.correlated(jnp.float32))
    critic = helpers.Critic([0.8, -0.5], jnp.float32)
    yield fisher_flow.AbstractAffineGaussianPath, helpers.paths
    yield fisher_flow.AbstractScore, helpers.scores
    yield fisher_flow.AbstractCost, [make(helpers.scores[0]) for make in helpers.costs.values()]
    yield fisher_flow.AbstractRefinement, [make(0.1) for make in helpers.refinements.values()]
    yield fisher_flow.AbstractPotential, helpers.potentials
    yield fisher_flow.AbstractLogRatio, helpers.log_ratios
    yield fisher_flow.AbstractEncoder, helpers.encoders
    yield fisher_flow.AbstractAgent, helpers.agents(**sizes)
    yield fisher_flow.AbstractPolicy, [make(flow, critic) for make in helpers.policies.values()]
    selections = [make(flow, critic, 2) for make in helpers.selections.values()]
    yield fisher_flow.AbstractSelection, selections
    critics = [make(**sizes) for make in helpers.critic_learnings.values()]
    yield fisher_flow.AbstractCriticLearning, critics
    network = lambda t, x, o: x
    predictions = [kind(network, helpers.paths[0]) for kind in helpers.predictions]
    yield fisher_flow.AbstractPrediction, predictions


def test_every_class_stands_in_its_list_of_laws():
    listed = {abstract: set(map(type, instances)) for abstract, instances in _lists_of_laws()}
    for abstract in filter(inspect.isabstract, modules):
        # The list of the class itself, or of a wider one.
        lists = [classes for of, classes in listed.items() if issubclass(abstract, of)]
        final = {x for x in modules if issubclass(x, abstract) and not inspect.isabstract(x)}
        assert lists or not final, f"{abstract.__name__} has no list"
        for classes in lists:
            assert final <= classes, f"{final - classes} stand in no list of {abstract.__name__}"


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
