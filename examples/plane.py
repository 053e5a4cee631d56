"""Refines a learned flow over two-dimensional actions, and draws what happens to it.

    python examples/plane.py --out plane

learns a flow from samples of three modes, refines it by a critic, and writes two figures: the
refinement in the plane, and its certificate.
"""

import argparse
from pathlib import Path

import jax.numpy as jnp
import jax.random as jr

import fisher_flow


def sample_data(num, *, key):
    """Three modes of different shapes, which turn with the observation."""
    observation_key, mode_key, noise_key = jr.split(key, 3)
    angles = jr.uniform(observation_key, (num, 1), minval=-0.5, maxval=0.5)
    mode = jr.randint(mode_key, (num,), 0, 3)
    centres = jnp.array([[-1.2, -0.2], [0.9, 0.9], [0.8, -0.9]])[mode]
    factors = jnp.array(
        [[[0.5, 0.0], [0.3, 0.15]], [[0.15, 0.0], [0.0, 0.4]], [[0.3, 0.0], [0.0, 0.3]]]
    )
    offsets = (factors[mode] @ jr.normal(noise_key, (num, 2, 1)))[..., 0]
    c, s = jnp.cos(angles[:, 0]), jnp.sin(angles[:, 0])
    x, y = (centres + offsets).T
    return angles, jnp.stack([c * x - s * y, s * x + c * y], axis=1)


def critic(observation, action):
    return jnp.sin(1.5 * action[0] + observation[0]) + 0.7 * action[1] - 0.2 * jnp.sum(action**2)


def main(
    out: Path = Path("plane"), num_updates: int = 20_000, num: int = 4096, resolution: int = 80
) -> None:
    data_key, network_key, fit_key, refine_key, certify_key = jr.split(jr.key(0), 5)
    observations, actions = sample_data(50_000, key=data_key)
    velocity = fisher_flow.VelocityMLP(1, (2,), width_size=128, key=network_key)
    policy = fisher_flow.FlowPolicy(velocity, action_shape=(2,), num_steps=20)
    policy = fisher_flow.fit_flow(
        policy, observations, actions, num_updates=num_updates, key=fit_key
    )
    training, held_out = observations[:num], observations[num : 2 * num]

    step = fisher_flow.NaturalStep(radius=0.1)
    refined = fisher_flow.refine(policy, critic, step, observations=training, key=refine_key)
    report = fisher_flow.certify(refined, critic, held_out, key=certify_key)
    print(report)

    out.mkdir(parents=True, exist_ok=True)
    for name, figure in (
        ("plane", fisher_flow.plot_refinement(refined, jnp.array([0.2]), resolution=resolution)),
        ("certificate", report.plot()),
    ):
        figure.savefig(out / f"{name}.png", dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("plane"), help="the folder to write to")
    parser.add_argument("--num-updates", type=int, default=20_000, help="of the flow")
    parser.add_argument("--num", type=int, default=4096, help="of observations to measure at")
    parser.add_argument("--resolution", type=int, default=80, help="of the densities")
    main(**vars(parser.parse_args()))
