"""The examples, at a small size and as their reader would run them, in two interpreters."""

import functools
import re
from pathlib import Path

import pytest
from helpers import run_scripts


pytestmark = pytest.mark.slow
examples = Path(__file__).parent.parent / "examples"

# What is run for each example; {out} is a folder for what it writes. Those of a group share an
# interpreter, and one worker.
together = {
    "composition": {
        "flax_policy": "flax_policy.main(num_updates=1000)",
        "diffusion_policy": "diffusion_policy.main(num_updates=1000)",
        "chunk_policy": "chunk_policy.main(num_updates=300)",
        "jax_environment": "jax_environment.main(num_updates=1500, num_episodes=64)",
        "rlax_training": "rlax_training.main(num_updates=60)",
        "plane": "plane.main(out={out}, num_updates=1000, num=256, resolution=20)",
    },
    "offline": {
        "pixels": "pixels.main(num_updates=2, num_episodes=1, seeds=[0], names=[])",
        "make_data": "make_data.main('pendulum', {out}, transitions=800)",
        "fidec": "",
        "fidec again": "",
        "ifql": "",
        "images": "",
    },
}
group = lambda name: pytest.mark.xdist_group(f"examples {name}")


def offline_rl(data, out, **options):
    """The example by its command line."""
    sizes = {"seeds": 2, "updates": 4, "width": 8, "depth": 1, "evaluations": 2, "episodes": 2}
    options = {"data": data, "out": out} | options | sizes
    arguments = [f"--{name}={value}" for name, value in options.items()]
    return f"""
import runpy, sys
sys.argv = ["offline_rl.py", *{arguments!r}]
runpy.run_path({str(examples / "offline_rl.py")!r}, run_name="__main__")
"""


def from_images(out):
    """On pictures of a pendulum that are made on the spot, by a small encoder."""
    return f"""
import fisher_flow, offline_rl, pathlib, pixels
encoder, large = fisher_flow.ImpalaEncoder(widths=(4,), output_size=8), fisher_flow.ImpalaEncoder
task = offline_rl.Task(pixels.play(1, seed=0), pixels.make_env)
offline_rl.load_task = lambda *arguments: task
fisher_flow.ImpalaEncoder = lambda: encoder
try:
    offline_rl.main(offline_rl.Settings(
        agent="bc", out=pathlib.Path({str(out)!r}), seeds=1, updates=1, batch_size=4,
        width=8, depth=1, evaluations=1, episodes=1,
    ))
finally:
    fisher_flow.ImpalaEncoder = large
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a group, once; for each example in it what it printed, and the folder that it wrote."""

    @functools.cache
    def printed(name):
        home = tmp_path_factory.mktemp("examples")
        data, (first, second, third) = home / "data", (home / x for x in ("a", "b", "c"))
        scripts = {
            example: f"import pathlib, sys\nsys.path.insert(0, {str(examples)!r})\n"
            + (
                f"import {example}\n{call.format(out=f'pathlib.Path({str(data)!r})')}"
                if call
                else ""
            )
            for example, call in together[name].items()
        }
        if name == "offline":
            fidec = offline_rl(data, first, agent="fidec", metric="paper")
            scripts["fidec"] += fidec
            scripts["fidec again"] += fidec  # there is nothing left to do
            scripts["ifql"] += offline_rl(data, second, agent="ifql")
            scripts["images"] += from_images(third)
        paths = {}
        for example, script in scripts.items():
            paths[example] = home / example.replace(" ", "_") / "script.py"
            paths[example].parent.mkdir()
            paths[example].write_text(script, encoding="utf-8")
        optimise = name == "composition"  # whose examples train
        found = run_scripts(list(paths.values()), home / "outcomes", optimise)
        folders = {"fidec": first, "ifql": second, "images": third, "plane": data}
        return {x: (*found[path], folders.get(x)) for x, path in paths.items()}

    def run(name, example):
        text, error, folder = printed(name)[example]
        assert error == "", f"{text}\n{error}"
        return text, folder

    return run


def number(text, label):
    match = re.search(rf"^{re.escape(label)}\s+(\S+) ±", text, re.MULTILINE)
    assert match is not None, text
    return float(match[1])


@group("composition")
@pytest.mark.parametrize("name", ["flax_policy", "diffusion_policy", "chunk_policy"])
def test_foreign_policies_are_refined_within_the_radius(name, run):
    printed, _ = run("composition", name)
    assert abs(number(printed, "measured KL (nats)") - 0.3) < 0.05
    assert number(printed, "gain in Q") > 0.03


@group("composition")
def test_a_loop_on_device_with_an_environment(run):
    pytest.importorskip("gymnax", reason="Gymnax is not installed: it forbids JAX 0.12")
    printed, _ = run("composition", "jax_environment")
    assert number(printed, "refined    return") > number(printed, "behaviour  return") + 100


@group("composition")
def test_a_training_step_of_rlax_and_optax(run):
    printed, _ = run("composition", "rlax_training")
    gains = [float(x) for x in re.findall(r"gain in reward.*: +(\S+)", printed)]
    assert gains[1] > 0.3


@group("composition")
def test_figures_of_a_refinement_in_the_plane(run):
    printed, folder = run("composition", "plane")
    assert abs(number(printed, "measured KL (nats)") - 0.1) < 0.02
    assert {x.name for x in folder.iterdir()} == {"plane.png", "certificate.png"}


@group("offline")
def test_agents_that_see(run):
    printed, _ = run("offline", "pixels")
    assert re.search(r"^behaviour, blank +-\d+$", printed, re.MULTILINE)


@group("offline")
@pytest.mark.parametrize("agent", ["fidec", "ifql"])
def test_offline_rl_from_a_file_to_a_table(agent, run):
    run("offline", "make_data")
    _, out = run("offline", agent)
    written = {x.name for x in out.iterdir()}
    figures_and_tables = {"settings.json", "evaluations.csv", "table.md", "learning_curves.png"}
    assert figures_and_tables | {"policy_seed_0.jax", "policy_seed_1.jax"} <= written
    rows = (out / "evaluations.csv").read_text().splitlines()
    # Of the second run of `fidec` too, which has nothing left to do.
    assert [row.split(",")[:2] for row in rows[1:]] == [
        [seed, updates] for updates in ("2", "4") for seed in ("0", "1")
    ]


@group("offline")
def test_offline_rl_that_is_done_prints_its_table(run):
    printed, _ = run("offline", "fidec again")
    _, out = run("offline", "fidec")
    assert (out / "table.md").read_text().strip() in printed


@group("offline")
def test_offline_rl_from_images(run):
    printed, out = run("offline", "images")
    assert "199 transitions" in printed and (out / "policy_seed_0.jax").exists()
