import gc
import os
from pathlib import Path

import jax
import pytest
from jaxtyping import install_import_hook


# Before anything imports the library, so that every annotation in it is checked at run time.
install_import_hook("fisher_flow", "typechecker.typechecker")

# With 64-bit floats enabled, float32 is the harder dtype to preserve.
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compiling takes most of the time of the suite, and its arrays are small. The flags are read by the
# first program, and by those that the tests start.
jax.config.update("jax_disable_most_optimizations", True)
os.environ["XLA_FLAGS"] = "--xla_llvm_disable_expensive_passes=true"
if jax.__version_info__ < (0, 10):  # later ones end the process at a flag that they do not know
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"


class _GetKey:
    def __init__(self, seed):
        self.seed, self.count = seed, 0

    def __call__(self):
        self.count += 1
        return jax.random.fold_in(jax.random.key(self.seed), self.count)

    def __repr__(self):
        return f"GetKey(seed={self.seed})"


def pytest_configure(config):
    # What takes long comes first, as it is collected; pytest-xdist would sort by number.
    config.option.loadscopereorder = False


def pytest_collection_finish():
    """Tracing makes many objects that live on, and the collector would walk them all every time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=0, help="the seed of `getkey`")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """With `--dist loadgroup` the tests of a file go to one worker: what they share is made once,
    and so are the programs that they compile. A test that is slow by itself goes to any worker, and
    comes first, as the pages do: at the end it would leave the other workers waiting."""
    is_slow = lambda item: item.get_closest_marker("slow") is not None
    items.sort(key=lambda item: not (is_slow(item) or item.path.stem == "test_documentation"))
    for item in items:
        if not is_slow(item) and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture
def getkey(request):
    """A new `jax.random.key` at every call. The seed is shown when a test fails."""
    seed = request.config.getoption("--seed")
    print(f"rerun with --seed={seed}")
    return _GetKey(seed)


@pytest.fixture(scope="module", autouse=True)
def _programs_are_freed():
    """Every program that is compiled maps memory, and a process has only so many maps: 65,530 on
    Linux, where the compiler then crashes. One test may leave a thousand."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or len(maps.read_bytes().splitlines()) > 30_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def standard_promotion():
    """For training: the schedules of Optax raise a float to an integer count."""
    with jax.numpy_dtype_promotion("standard"):
        yield
