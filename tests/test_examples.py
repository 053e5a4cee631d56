"""The examples of composition, at a small size and as their reader would run them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


examples = Path(__file__).parent.parent / "examples"


def run(name, arguments, **environment):
    return execute(f"import {name}; {name}.main({arguments})", **environment)


def execute(code, **environment):
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=examples,
        env=os.environ | {"JAX_ENABLE_X64": "0"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def number(text, label):
    match = re.search(rf"^{re.escape(label)}\s+(\S+) ±", text, re.MULTILINE)
    assert match is not None, text
    return float(match[1])


@pytest.mark.parametrize(
    "name, num_updates, environment",
    [
        ("flax_policy", 2000, {}),
        ("diffusion_policy", 2000, {}),
        # Compiling takes most of its time.
        ("chunk_policy", 300, {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}),
    ],
)
def test_foreign_policies_are_refined_within_the_radius(name, num_updates, environment):
    printed = run(name, f"num_updates={num_updates}", **environment)
    assert abs(number(printed, "measured KL (nats)") - 0.3) < 0.05
    assert number(printed, "gain in Q") > 0.03


def test_a_loop_on_device_with_an_environment():
    pytest.importorskip("gymnax", reason="Gymnax is not installed: it forbids JAX 0.12")
    printed = run("jax_environment", "num_updates=2000, num_episodes=64")
    assert number(printed, "refined    return") > number(printed, "behaviour  return") + 100


def test_a_training_step_of_rlax_and_optax():
    printed = run("rlax_training", "num_updates=60")
    gains = [float(x) for x in re.findall(r"gain in reward.*: +(\S+)", printed)]
    assert gains[1] > 0.3


def test_figures_of_a_refinement_in_the_plane(tmp_path):
    setup = f"__import__('pathlib').Path({str(tmp_path)!r})"
    printed = run("plane", f"out={setup}, num_updates=1000, num=256, resolution=20")
    assert abs(number(printed, "measured KL (nats)") - 0.1) < 0.02
    assert {x.name for x in tmp_path.iterdir()} == {"plane.png", "certificate.png"}


def test_agents_that_see():
    printed = run("pixels", "num_updates=2, num_episodes=1, seeds=[0], names=[]")
    assert re.search(r"^behaviour, blank +-\d+$", printed, re.MULTILINE)


@pytest.mark.parametrize("agent", [{"agent": "fidec", "metric": "paper"}, {"agent": "ifql"}])
def test_offline_rl_from_a_file_to_a_table(agent, tmp_path):
    data, out = tmp_path / "data", tmp_path / "results"
    run("make_data", f"'pendulum', __import__('pathlib').Path({str(data)!r}), transitions=800")
    sizes = {"seeds": 2, "updates": 4, "width": 8, "depth": 1, "evaluations": 2, "episodes": 2}
    command = [sys.executable, "offline_rl.py", f"--data={data}", f"--out={out}"]
    for name, value in (agent | sizes).items():
        command += [f"--{name}", str(value)]

    def train():
        # Compiling takes most of its time.
        environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        return subprocess.run(
            command, cwd=examples, env=environment, check=True, capture_output=True, text=True
        )

    train()
    written = {x.name for x in out.iterdir()}
    figures_and_tables = {"settings.json", "evaluations.csv", "table.md", "learning_curves.png"}
    assert figures_and_tables | {"policy_seed_0.jax", "policy_seed_1.jax"} <= written
    rows = (out / "evaluations.csv").read_text().splitlines()
    assert [row.split(",")[:2] for row in rows[1:]] == [
        [seed, updates] for updates in ("2", "4") for seed in ("0", "1")
    ]
    again = train()  # there is nothing left to do
    assert (out / "evaluations.csv").read_text().splitlines() == rows
    assert (out / "table.md").read_text().strip() in again.stdout


def test_offline_rl_from_images(tmp_path):
    code = f"""
import fisher_flow, offline_rl, pathlib, pixels
encoder = fisher_flow.ImpalaEncoder(widths=(4,), output_size=8)
fisher_flow.ImpalaEncoder = lambda: encoder
task = offline_rl.Task(pixels.play(1, seed=0), pixels.make_env)
offline_rl.load_task = lambda *arguments: task
offline_rl.main(offline_rl.Settings(
    agent="bc", out=pathlib.Path({str(tmp_path)!r}), seeds=1, updates=1, batch_size=4,
    width=8, depth=1, evaluations=1, episodes=1,
))
"""
    printed = execute(code)
    assert "199 transitions" in printed and (tmp_path / "policy_seed_0.jax").exists()
