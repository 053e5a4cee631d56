"""Offline RL from a file of transitions to a table of results.

Trains an agent on logged transitions, with several seeds, and plays it in the real task:

    python examples/make_data.py pendulum --out data
    python examples/offline_rl.py --task pendulum --agent fidec --out results

leaves in the folder `--out` the settings, `train.csv`, `evaluations.csv`, checkpoints, a table, the
learning curves, and the policies as programs that run with JAX alone. Those take observations as
they come (images in stacks of three) and return actions between -1 and 1, as the environments here
do through `RescaleAction`. With `--online-steps 20000` the policies then play, and learn from what
they play. A run that was stopped goes on when the same command is given again.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import tyro

import fisher_flow


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to train, on what, and for how long."""

    task: str = "pendulum"
    """`pendulum`, `halfcheetah`, an OGBench task such as `cube-single-play-singletask-v0`, the id
    of a Minari dataset, or an HDF5 file in the layout of D4RL."""
    data: Path = Path("data")
    """The folder with the files that `make_data.py` wrote, or those of OGBench."""
    env: str | None = None
    """For a file of D4RL: the Gymnasium environment to play, such as `HalfCheetah-v5`."""
    maze_rewards: bool | None = None
    """For a file of D4RL's antmaze: whether rewards are -1 and 0 instead of 0 and 1."""
    agent: Literal["fidec", "one-step", "deflow", "fql", "ifql", "bc"] = "fidec"
    """Which agent to train."""
    metric: Literal["fisher-rao", "paper", "released"] = "fisher-rao"
    """For `fidec`: what a displacement costs."""
    radius: float | None = None
    """For `fidec` and `one-step`: the KL to spend, in nats, by default 0.5. The published metrics
    are no KLs: the paper takes 0.001 to 0.01 for them, by default 0.001. For `deflow`, the mean
    squared displacement, by default 0.001."""
    coefficient: float = 0.3
    """For `fql`: the weight of the distillation."""
    best_of: int | None = None
    """The number of actions of which the best by the critic is taken: by default 2 for `one-step`
    and for `fidec` with its own metric, 32 for `ifql`, 1 otherwise."""
    seeds: int = 3
    """The number of seeds: 0, 1, ..."""
    updates: int = 10_000
    """The number of gradient steps."""
    batch_size: int = 256
    """The number of transitions in each."""
    width: int = 128
    """The width of all networks. (Published results: 512.)"""
    depth: int = 3
    """The number of their hidden layers. (Published results: 4.)"""
    learning_rate: float = 1e-3
    """The rate of Adam. (Published results: 3e-4.)"""
    discount: float = 0.99
    """The discount of one step."""
    critic: Literal["td", "hl-gauss", "flow"] = "td"
    """What the critic predicts: a value, a histogram of returns, or their whole distribution."""
    pessimist: bool = False
    """Whether the critic is the minimum of its two members, not their mean."""
    num_steps: int = 1
    """The number of rewards in a target, before the critic says what follows."""
    horizon: int = 1
    """The number of actions that are chosen at once, as a chunk; and of rewards in its target."""
    online_steps: int = 0
    """The number of steps to play with each seed after that, one update for each."""
    evaluations: int = 5
    """How many times to evaluate in the course of the training, and again online."""
    episodes: int = 20
    """The number of episodes of each evaluation."""
    out: Path = Path("offline_rl_results")
    """Where to write."""


class Task(NamedTuple):
    """Transitions to learn from, and the environment that they come from."""

    transitions: fisher_flow.Transitions
    make_env: Callable[[], gymnasium.Env]
    is_success: bool = False  # whether the score is the share of successes, not the return


def load_task(
    name: str, folder: Path, env: str | None = None, maze_rewards: bool | None = None
) -> Task:
    """The transitions and the environment of a task, actions between -1 and 1."""
    if name == "pendulum":
        return load_file(folder / "pendulum-mixture.hdf5", "Pendulum-v1")
    if name == "halfcheetah":
        return load_file(folder / "halfcheetah-replay.hdf5", "HalfCheetah-v5")
    if name.endswith((".hdf5", ".h5")):
        if env is None:
            raise ValueError(
                f"`env` must be the environment in which `{name}` was recorded, but got none. "
                "Write, for example, `--env HalfCheetah-v5`."
            )
        return load_file(Path(name), env, maze_rewards)
    if "singletask" in name:
        import ogbench

        make: Any = ogbench.make_env_and_datasets
        make_env = functools.partial(make, name, env_only=True)
        return Task(fisher_flow.load_ogbench(name, folder), make_env, is_success=True)
    import minari

    if name not in minari.list_local_datasets():
        raise ValueError(
            f"`task` must be `pendulum`, `halfcheetah`, an OGBench task, a file that ends in "
            f"`.hdf5`, or one of the Minari datasets here, {sorted(minari.list_local_datasets())}, "
            f"but got `{name}`. Write `--task cube-single-play-singletask-v0`."
        )
    dataset = minari.load_dataset(name)
    space: Any = dataset.action_space
    if not isinstance(space, gymnasium.spaces.Box) or not space.is_bounded():
        raise ValueError(
            f"`task` must have actions between bounds, from which they are rescaled, but those of "
            f"`{name}` are {space}. Rescale them in Python: `fisher_flow.load_minari({name!r})`."
        )
    bounds = (float(space.low.min()), float(space.high.max()))
    transitions = fisher_flow.load_minari(dataset, bounds=bounds)
    rescale = lambda a: (2 * (a - space.low) / (space.high - space.low) - 1).astype(a.dtype)
    transitions = dataclasses.replace(
        transitions,
        actions=rescale(transitions.actions),
        next_actions=rescale(transitions.next_actions),
    )
    return Task(transitions, lambda: rescaled(dataset.recover_environment(eval_env=True)))


def load_file(path: Path, env: str, maze_rewards: bool | None = None) -> Task:
    """A file in the layout of D4RL, whose actions are between -1 and 1 whatever the environment."""
    make_env = lambda: rescaled(gymnasium.make(env))
    spec: Any = make_env().spec
    transitions = fisher_flow.load_d4rl(
        path, maze_rewards=maze_rewards, max_episode_steps=spec.max_episode_steps
    )
    return Task(transitions, make_env)


def rescaled(env: gymnasium.Env) -> gymnasium.Env:
    return gymnasium.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))


def stack_images(task: Task, num_frames: int = 3) -> Task:
    """Several frames at a time, which show velocities, and take as many times the memory."""
    make_env = lambda: gymnasium.wrappers.FrameStackObservation(task.make_env(), num_frames)
    return task._replace(transitions=task.transitions.stack_frames(num_frames), make_env=make_env)


def over_several_steps(
    transitions: fisher_flow.Transitions, settings: Settings
) -> fisher_flow.Transitions:
    """Transitions over as many steps, or of chunks of as many actions, as the settings say."""
    if settings.horizon > 1 and settings.num_steps > 1:
        raise ValueError(
            f"`num_steps` must be 1 for chunks, which take the rewards of their {settings.horizon} "
            f"steps, but got {settings.num_steps}. Write `--num-steps 1`."
        )
    if settings.horizon > 1:
        return transitions.chunks(settings.horizon, settings.discount)
    if settings.num_steps > 1:
        return transitions.n_step(settings.num_steps, settings.discount)
    return transitions


def range_of_returns(transitions: fisher_flow.Transitions, discount: float) -> tuple[float, float]:
    """The least and the largest discounted return in the data, of what has not ended as if it went
    on at the same rate, and a tenth more on either side."""
    horizon = math.ceil(1 / max(1 - discount, 1e-3))
    long = transitions.n_step(horizon, discount)
    # Not of what is cut off sooner than the rest: a single reward says little of the rate.
    rest = discount * np.asarray(long.masks)
    rows = rest <= 1.0001 * np.min(rest[rest > 0], initial=1)
    returns = np.asarray(long.rewards)[rows] / (1 - np.minimum(rest[rows], 0.999))
    low, high = float(np.min(returns)), float(np.max(returns))
    margin = 0.1 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def make_agent(
    settings: Settings, transitions: fisher_flow.Transitions, has_images: bool
) -> fisher_flow.AbstractAgent:
    """The agent that the settings describe, for transitions of single steps."""
    action_size = settings.horizon * int(np.prod(transitions.actions.shape[1:]))
    encoder = fisher_flow.ImpalaEncoder() if has_images else None
    networks: Any = dict(width_size=settings.width, depth=settings.depth, encoder=encoder)
    rate = settings.learning_rate
    flow = fisher_flow.BehaviourFlow(**networks, learning_rate=rate)
    learning: Any = dict(
        networks, discount=settings.discount, aggregate=jnp.min if settings.pessimist else jnp.mean
    )
    match settings.critic:
        case "td":
            critic = fisher_flow.TemporalDifference(**learning)
        case "hl-gauss":
            returns = range_of_returns(transitions, settings.discount)
            critic = fisher_flow.HLGauss(returns, **learning)
        case "flow":
            critic = fisher_flow.ValueFlow(**learning)
    nats = 0.5 if settings.radius is None else settings.radius
    published_radius = 0.001 if settings.radius is None else settings.radius  # no KL
    options: Any = dict(flow=flow, critic=critic, learning_rate=rate)
    if settings.best_of is not None:
        options["num_candidates"] = settings.best_of
    match settings.agent, settings.metric:
        case "bc", _:
            return fisher_flow.BehaviourCloning(flow=flow)
        case "ifql", _:
            return fisher_flow.ImplicitQLearning(**options)
        case "fql", _:
            return fisher_flow.FlowQLearning(coefficient=settings.coefficient, **options)
        case "deflow", _:
            return fisher_flow.FisherDecorator.deflow(action_size, published_radius, **options)
        case "fidec", "paper":
            return fisher_flow.FisherDecorator.paper(published_radius, **options)
        case "fidec", "released":
            return fisher_flow.FisherDecorator.released(published_radius, **options)
        case "fidec", _:
            return fisher_flow.FisherDecorator(radius=nats, **options)
    refinement = fisher_flow.NaturalStep(radius=nats)
    return fisher_flow.OneStep(refinement=refinement, **options)


def main(settings: Settings) -> None:
    task = load_task(settings.task, settings.data, settings.env, settings.maze_rewards)
    columns = jax.tree.leaves(task.transitions.observations)
    has_images = any(column.dtype == np.uint8 for column in columns)
    if has_images:
        task = stack_images(task)
        normaliser, augment = None, fisher_flow.RandomCrop()
    else:
        normaliser, augment = fisher_flow.Normaliser.of(task.transitions), None
    mean_reward = task.transitions.rewards.mean()
    print(f"{len(task.transitions)} transitions; a mean reward of {mean_reward:.3g}")
    # Critics want values of order one.
    scale = float(np.std(task.transitions.rewards)) or 1.0
    rescale = lambda t: dataclasses.replace(t, rewards=t.rewards / scale)
    prepare = lambda t: over_several_steps(rescale(t), settings)
    transitions = task.transitions
    if normaliser is not None:
        transitions = normaliser.transitions(transitions)
    agent = make_agent(settings, rescale(transitions), has_images)
    transitions = prepare(transitions)

    envs = gymnasium.vector.SyncVectorEnv([task.make_env] * settings.episodes)

    def of_raw_observations(policy: fisher_flow.AbstractPolicy) -> fisher_flow.AbstractPolicy:
        return policy if normaliser is None else fisher_flow.NormalisedPolicy(policy, normaliser)

    def evaluate(policy: fisher_flow.AbstractPolicy, seed: int) -> dict[str, float]:
        policy = of_raw_observations(policy)
        episodes = fisher_flow.rollout(policy, envs, seed=1_000_000 * (seed + 1))
        score = 100 * episodes.successes if task.is_success else episodes.returns
        return {"score": float(score.mean()), "return": float(episodes.returns.mean())}

    def write_settings() -> None:
        settings.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dataclasses.asdict(settings), indent=1, default=str)
        (settings.out / "settings.json").write_text(text)

    if not (settings.out / "run.json").exists():
        write_settings()

    trained = fisher_flow.train(
        agent,
        transitions,
        settings.updates,
        seeds=range(settings.seeds),
        batch_size=settings.batch_size,
        augment=augment,
        evaluate=evaluate,
        evaluate_every=max(1, settings.updates // settings.evaluations),
        folder=settings.out,
    )
    write_settings()  # only now over those of a run that was taken up: other runs are refused
    files = [settings.out / "evaluations.csv"]
    if settings.online_steps > 0:
        players = gymnasium.vector.SyncVectorEnv([task.make_env] * 4)
        trained = fisher_flow.fine_tune(
            trained,
            players,
            settings.online_steps,
            normaliser=normaliser,
            prepare=prepare,
            batch_size=settings.batch_size,
            evaluate=evaluate,
            evaluate_every=max(1, settings.online_steps // settings.evaluations),
            folder=settings.out / "online",
        )
        players.close()
        files.append(settings.out / "online" / "evaluations.csv")
    envs.close()
    observation = jax.tree.map(lambda column: column[0], task.transitions.observations)
    for seed in trained.seeds:  # programs that take raw observations, and need nothing but JAX
        path = settings.out / f"policy_seed_{seed}.jax"
        fisher_flow.export_sampler(of_raw_observations(trained.policy(seed)), observation, path)
    results = fisher_flow.Results.read(*files, task=settings.task, method=settings.agent)
    table = results.table()
    (settings.out / "table.md").write_text(table + "\n")
    results.plot_learning_curves().savefig(settings.out / "learning_curves.png", dpi=110)
    print(f"\n{table}\n\nWrote table.md, learning_curves.png, the policies, the logs and the "
          f"checkpoints to {settings.out}.")  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
