"""Offline RL from pixels: a pendulum that is seen, in stacks of frames, and not told.

    python examples/pixels.py
    python examples/pixels.py --names behaviour ifql

draws Gymnasium's Pendulum-v1 at 24 x 24 pixels, plays it with a controller of whose steps some are
random, and trains agents on the pictures. The same flow trained on blank pictures shows what there
is to see.

It needs `pip install "fisher_flow[offline,data]"`. `--help` lists the settings.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import tyro
from gymnasium.wrappers import AddRenderObservation, FrameStackObservation, RescaleAction
from make_data import swing_up

import fisher_flow


size, num_frames = 24, 3


class Drawn(gymnasium.Wrapper):
    """Draws the pendulum with NumPy: Gymnasium's own picture needs pygame, and a larger one."""

    def render(self) -> Any:
        angle, _ = self.unwrapped.state  # pyright: ignore  (zero is upright)
        pixels = (np.arange(size) + 0.5) / size * 2 - 1
        x, y = np.meshgrid(pixels, -pixels)
        direction = 0.8 * np.array([-np.sin(angle), np.cos(angle)])
        along = np.clip((x * direction[0] + y * direction[1]) / 0.64, 0, 1)
        distance = np.hypot(x - along * direction[0], y - along * direction[1])
        ink = np.clip(1.5 - 10 * distance, 0, 1)[..., None]  # a rod with soft edges
        return (255 - ink * np.array([55, 180, 180])).astype(np.uint8)


def make_env() -> gymnasium.Env:
    env = Drawn(gymnasium.make("Pendulum-v1", render_mode="rgb_array"))
    return RescaleAction(AddRenderObservation(env), np.float32(-1), np.float32(1))


def make_stacked_env() -> gymnasium.Env:
    return FrameStackObservation(make_env(), num_frames)


def play(
    num_episodes: int, seed: int, shares: Sequence[float] = (0.0, 0.3, 0.6)
) -> fisher_flow.Transitions:
    """Episodes of 200 steps, of which one of these shares is random."""
    rng = np.random.default_rng(seed)
    episodes = []
    for episode in range(num_episodes):
        env, randomness = make_env(), rng.choice(shares)
        images, actions, rewards = [env.reset(seed=seed + episode)[0]], [], []
        truncated = False
        while not truncated:
            angle, speed = env.unwrapped.state  # pyright: ignore
            told = np.array([[np.cos(angle), np.sin(angle), speed]])
            random = rng.random() < randomness
            action = rng.uniform(-1, 1, 1) if random else np.clip(swing_up(told), -1, 1)
            actions.append(action.astype(np.float32))
            image, reward, _, truncated, _ = env.step(actions[-1])
            images.append(image)
            rewards.append(float(reward) / 8)  # of order one
        episodes.append((np.stack(images), np.stack(actions), np.array(rewards, np.float32)))
    return fisher_flow.Transitions.from_episodes(
        *map(list, zip(*episodes, strict=True)), terminated=[False] * num_episodes
    )


def agents(learning_rate: float = 1e-3) -> dict[str, fisher_flow.AbstractAgent]:
    sizes: Any = dict(width_size=128, depth=2)
    encoder = fisher_flow.ImpalaEncoder(widths=(8, 16), output_size=64)
    flow = fisher_flow.BehaviourFlow(**sizes, encoder=encoder, learning_rate=learning_rate)
    critic = fisher_flow.TemporalDifference(**sizes, encoder=encoder, discount=0.98)
    return {
        "behaviour": fisher_flow.BehaviourCloning(flow=flow),
        "ifql": fisher_flow.ImplicitQLearning(
            flow=flow, critic=critic, num_candidates=8, learning_rate=learning_rate
        ),
    }


def main(
    num_updates: int = 2000,
    num_episodes: int = 40,
    seeds: Sequence[int] = (0, 1, 2),
    names: Sequence[str] = ("behaviour",),
) -> None:
    data = play(num_episodes, seed=0).stack_frames(num_frames)
    blank = dataclasses.replace(
        data,
        observations=np.zeros_like(data.observations),
        next_observations=np.zeros_like(data.next_observations),
    )
    envs = gymnasium.vector.SyncVectorEnv([make_stacked_env] * 20)

    def report(label: str, agent: fisher_flow.AbstractAgent, data: fisher_flow.Transitions) -> None:
        augment = fisher_flow.RandomCrop(padding=1)
        trained = fisher_flow.train(
            agent,
            data,
            num_updates,
            seeds=seeds,
            batch_size=64,
            augment=augment,
        )
        returns = [
            fisher_flow.evaluate(trained.policy(seed), envs, seed=1000 * (seed + 1)).mean()
            for seed in seeds
        ]
        interval = ""
        if len(seeds) > 1:
            low, high = fisher_flow.bootstrap_interval(np.array(returns)[None])
            interval = f" [{low:.0f}, {high:.0f}]"
        print(f"{label:24s} {np.mean(returns):6.0f}{interval}", flush=True)

    report("behaviour, blank", agents()["behaviour"], blank)
    for name in names:
        report(name, agents()[name], data)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
