"""Makes datasets on this machine, without downloading anything.

    python examples/make_data.py pendulum --out data

writes 100k transitions of Gymnasium's Pendulum-v1 in two seconds. The other tasks are `halfcheetah`
(the replay of a SAC agent that learns to run; two minutes) and those that the oracles of OGBench
play: `cube-single`, `cube-double`, `scene`, `puzzle-3x3` and `pointmaze` (one to three minutes).
`load_d4rl` reads the files of the first two, `load_ogbench` the others.

They need `pip install "fisher_flow[data]" "gymnasium[mujoco]" tyro`.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import equinox as eqx
import gymnasium
import h5py
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import tyro
from tqdm.auto import tqdm


Columns = dict[str, np.ndarray]


# --- Files ------------------------------------------------------------------------------------


def write(path: Path, save: Callable[[Path], None]) -> None:
    """Writes a file that is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"partial-{os.getpid()}-{path.name}")
    try:
        save(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    print(f"Wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


def write_hdf5(path: Path, columns: Columns) -> None:
    """Writes columns in the layout of D4RL."""

    def save(partial: Path) -> None:
        with h5py.File(partial, "w") as file:
            for name, column in columns.items():
                file.create_dataset(name, data=column, compression="gzip")

    write(path, save)


def write_npz(path: Path, columns: Columns) -> None:
    """Writes columns in the layout of OGBench."""
    write(path, lambda partial: np.savez_compressed(partial, **columns))  # pyright: ignore


# --- Pendulum: a controller, more or less of whose steps are random ---------------------------


def swing_up(observations: np.ndarray) -> np.ndarray:
    """Pumps energy until the pendulum can reach the top, and balances it there."""
    cos, sin, velocity = observations.T
    angle = np.arctan2(sin, cos)  # zero is upright
    missing_energy = 5.0 * (1.0 - cos) - velocity**2 / 6.0
    pump = np.sign(velocity) * missing_energy
    balance = -(10.0 * angle + 2.0 * velocity)
    return np.where(np.abs(angle) < 0.4, balance, pump) / 2.0  # the torque is at most 2


def make_pendulum(out: Path, transitions: int, seed: int) -> None:
    """Episodes of 200 steps, of which a share, 0 to 1, is random. Actions are halves of torques."""
    steps, num_episodes = 200, -(-transitions // 200)
    rng = np.random.default_rng(seed)
    random_share = np.resize([0.0, 0.3, 0.6, 1.0], num_episodes)
    envs = gymnasium.vector.SyncVectorEnv([lambda: gymnasium.make("Pendulum-v1")] * num_episodes)
    o, _ = envs.reset(seed=seed)
    columns: dict[str, list[np.ndarray]] = {"observations": [], "actions": [], "rewards": []}
    for _ in tqdm(range(steps), desc="pendulum"):
        a = swing_up(o) + 0.15 * rng.normal(size=num_episodes)
        explore = rng.random(num_episodes) < random_share
        a = np.where(explore, rng.uniform(-1, 1, num_episodes), np.clip(a, -1, 1))
        a = a[:, None].astype(np.float32)
        columns["observations"].append(o)
        columns["actions"].append(a)
        o, r, _, _, _ = envs.step(2 * a)
        columns["rewards"].append(r)
    envs.close()
    returns = np.sum(columns["rewards"], axis=0)
    for share in np.unique(random_share):
        mean = returns[random_share == share].mean()
        print(f"{share:4.0%} of the steps random: a mean return of {mean:.0f}")

    def episode_by_episode(column: list[np.ndarray]) -> np.ndarray:
        rows = np.stack(column, axis=1).astype(np.float32)
        return rows.reshape(-1, *rows.shape[2:])

    written = {name: episode_by_episode(column) for name, column in columns.items()}
    written["terminals"] = np.zeros(steps * num_episodes, bool)
    written["timeouts"] = np.tile(np.arange(steps) == steps - 1, num_episodes)
    write_hdf5(out / "pendulum-mixture.hdf5", written)


# --- HalfCheetah: all that a soft actor-critic went through while it learned ------------------


class Learner(NamedTuple):
    """What one optimiser trains, all parts at once: each term of the loss has its own."""

    actor: eqx.nn.MLP
    critics: eqx.nn.MLP  # two of them, stacked
    log_temperature: jax.Array


class Batch(NamedTuple):
    observation: Any
    action: Any
    reward: Any
    next_observation: Any
    mask: Any


OPTIMISER = optax.adam(1e-3)
DISCOUNT, POLYAK, UPDATES, BATCH_SIZE = 0.99, 0.005, 64, 256


def make_learner(observation_size: int, action_size: int, key: jax.Array) -> Learner:
    actor_key, critic_key = jr.split(key)

    def critic(key):
        return eqx.nn.MLP(observation_size + action_size, "scalar", 128, 2, key=key)

    actor = eqx.nn.MLP(observation_size, 2 * action_size, 128, 2, key=actor_key)
    return Learner(actor, eqx.filter_vmap(critic)(jr.split(critic_key)), jnp.array(0.0))


def values(critics: Any, o: jax.Array, a: jax.Array) -> jax.Array:
    oa = jnp.concatenate([o, a])
    return eqx.filter_vmap(lambda critic: critic(oa), in_axes=eqx.if_array(0))(critics)


def draw(actor: eqx.nn.MLP, o: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """An action, the tanh of a Gaussian, and the logarithm of its density."""
    mean, log_deviation = jnp.split(actor(o), 2)
    log_deviation = jnp.clip(log_deviation, -5, 2)
    noise = jr.normal(key, mean.shape)
    x = mean + jnp.exp(log_deviation) * noise
    log_slope = 2 * (jnp.log(2.0) - x - jax.nn.softplus(-2 * x))  # of the tanh
    return jnp.tanh(x), jnp.sum(jax.scipy.stats.norm.logpdf(noise) - log_deviation - log_slope)


def constant(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.lax.stop_gradient(x) if eqx.is_array(x) else x, tree)


def in_numpy(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x) if eqx.is_array(x) else x, tree)


def draw_numpy(actor: Any, o: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same action in NumPy, since calling JAX for each step of one environment is slow."""
    for i, layer in enumerate(actor.layers):
        o = np.maximum(o, 0) if i > 0 else o
        o = layer.weight @ o + layer.bias
    mean, log_deviation = np.split(o, 2)
    return np.tanh(mean + np.exp(np.clip(log_deviation, -5, 2)) * rng.normal(size=mean.size))


def loss(learner: Learner, target: Any, transition: Batch, key: jax.Array) -> jax.Array:
    o, a, r, next_o, mask = transition
    next_key, key = jr.split(key)
    temperature = jnp.exp(learner.log_temperature)
    # The critics regress on the soft value of what follows.
    next_a, next_log_p = draw(learner.actor, next_o, next_key)
    next_value = jnp.min(values(target, next_o, next_a)) - temperature * next_log_p
    y = jax.lax.stop_gradient(r + DISCOUNT * mask * next_value)
    critic_loss = jnp.sum((values(learner.critics, o, a) - y) ** 2)
    # The actor climbs them, which stay as they are.
    new_a, log_p = draw(learner.actor, o, key)
    q = jnp.min(values(constant(learner.critics), o, new_a))
    actor_loss = jax.lax.stop_gradient(temperature) * log_p - q
    # The temperature rises while the entropy is below its target, minus one for each dimension.
    missing_entropy = jax.lax.stop_gradient(log_p) - a.size
    return critic_loss + actor_loss - learner.log_temperature * missing_entropy


@eqx.filter_jit
def improve(learner, target, state, batches, key):
    """One update for each of the batches."""
    arrays, static = eqx.partition((learner, target), eqx.is_array)

    def update(carry, inputs):
        arrays, state = carry
        batch, key = inputs
        learner, target = eqx.combine(arrays, static)

        @eqx.filter_grad
        def gradient(learner):
            keys = jr.split(key, BATCH_SIZE)
            return jnp.mean(jax.vmap(loss, (None, None, 0, 0))(learner, target, batch, keys))

        updates, state = OPTIMISER.update(gradient(learner), state)
        learner = eqx.apply_updates(learner, updates)
        critics, target = eqx.filter((learner.critics, target), eqx.is_array)
        target = jax.tree.map(lambda old, new: old + POLYAK * (new - old), target, critics)
        return ((eqx.filter(learner, eqx.is_array), target), state), None

    keys = jr.split(key, UPDATES)
    (arrays, state), _ = jax.lax.scan(update, (arrays, state), (batches, keys))
    return *eqx.combine(arrays, static), state


def make_halfcheetah(out: Path, transitions: int, seed: int) -> None:
    """The replay buffer of a soft actor-critic, in the order in which it was filled."""
    transitions = 1000 * -(-transitions // 1000)
    env = gymnasium.make("HalfCheetah-v5")
    rng = np.random.default_rng(seed)
    learner_key, key = jr.split(jr.key(seed))
    o, _ = env.reset(seed=seed)
    action_size = env.action_space.shape[0]  # pyright: ignore
    learner = make_learner(o.size, action_size, learner_key)
    target: Any = learner.critics
    state = OPTIMISER.init(eqx.filter(learner, eqx.is_array))
    actor = in_numpy(learner.actor)
    shapes = Batch((o.size,), (action_size,), (), (o.size,), ())
    replay = Batch(*(np.zeros((transitions, *shape), np.float32) for shape in shapes))
    timeouts = np.zeros(transitions, bool)
    total, returns = 0.0, []
    bar = tqdm(range(transitions), desc="halfcheetah", mininterval=2)
    for i in bar:
        explore = i < 2000
        a = rng.uniform(-1, 1, action_size) if explore else draw_numpy(actor, o, rng)
        a = a.astype(np.float32)
        next_o, r, terminated, timeouts[i], _ = env.step(a)
        for column, value in zip(replay, (o, a, r, next_o, not terminated), strict=True):
            column[i] = value
        o, total = next_o, total + float(r)
        if timeouts[i]:
            returns.append(total)
            bar.set_postfix_str(f"return {total:.0f}")
            o, total = env.reset()[0], 0.0
        if not explore and (i + 1) % UPDATES == 0:
            rows = rng.integers(i + 1, size=(UPDATES, BATCH_SIZE))
            batches = jax.tree.map(lambda column, rows=rows: column[rows], replay)
            key, update_key = jr.split(key)
            learner, target, state = improve(learner, target, state, batches, update_key)
            actor = in_numpy(learner.actor)
    print("The return of each episode:", *(f"{x:.0f}" for x in returns))
    columns = dict(zip(("observations", "actions", "rewards"), replay[:3], strict=True))
    columns |= {"terminals": replay.mask == 0, "timeouts": timeouts}
    write_hdf5(out / "halfcheetah-replay.hdf5", columns)


# --- OGBench: its oracles play without a goal of their own ------------------------------------


class ManipulationPlay:
    """An oracle moves one thing after the other to where the environment wants it."""

    def __init__(self, name: str):
        from ogbench.manipspace.oracles.plan import button_plan, cube_plan, drawer_plan, window_plan

        self.env = gymnasium.make(
            f"{name}-v0", terminate_at_goal=False, mode="data_collection", max_episode_steps=1001
        )
        options: dict[str, Any] = dict(env=self.env, noise=0.1, noise_smoothing=0.5)
        closed = name.startswith("puzzle")
        self.oracles = {
            "cube": cube_plan.CubePlanOracle(**options),
            "button": button_plan.ButtonPlanOracle(gripper_always_closed=closed, **options),
            "drawer": drawer_plan.DrawerPlanOracle(**options),
            "window": window_plan.WindowPlanOracle(**options),
        }
        self.most_stacked = 0.25 if name == "cube-double" else 0.0

    def reset(self, seed: int | None) -> tuple[np.ndarray, dict]:
        o, info = self.env.reset(seed=seed)
        # The share of the cubes that are put on top of another, in this episode.
        self.stacked = np.random.uniform(0, self.most_stacked)
        self.choose_oracle(o, info)
        return o, info

    def choose_oracle(self, o: np.ndarray, info: dict) -> None:
        self.oracle = self.oracles[info["privileged/target_task"]]
        self.oracle.reset(o, info)

    def act(self, o: np.ndarray, info: dict) -> np.ndarray:
        return self.oracle.select_action(o, info)

    def follow_up(self, info: dict) -> None:
        if self.oracle.done:
            world: Any = self.env.unwrapped
            self.choose_oracle(*world.set_new_target(p_stack=self.stacked))


class MazePlay:
    """Walks along the shortest way, with much noise, to one random place after the other."""

    def __init__(self, name: str):
        self.env = gymnasium.make(name, terminate_at_goal=False, max_episode_steps=1001)
        self.maze: Any = self.env.unwrapped
        self.cells = np.argwhere(self.maze.maze_map == 0)

    def place(self) -> tuple[int, int]:
        return tuple(self.cells[np.random.randint(len(self.cells))])

    def reset(self, seed: int | None) -> tuple[np.ndarray, dict]:
        task = {"init_ij": self.place(), "goal_ij": self.place()}
        return self.env.reset(seed=seed, options={"task_info": task})

    def act(self, o: np.ndarray, info: dict) -> np.ndarray:
        way = self.maze.get_oracle_subgoal(self.maze.get_xy(), self.maze.cur_goal_xy)[0]
        way = way - self.maze.get_xy()
        return way / (np.linalg.norm(way) + 1e-6) + np.random.normal(0, 0.5, 2)

    def follow_up(self, info: dict) -> None:
        if info["success"]:
            goal = self.maze.ij_to_xy(self.place())
            self.maze.set_goal(goal_xy=self.maze.add_noise(goal))


def make_ogbench(
    play: ManipulationPlay | MazePlay, name: str, out: Path, transitions: int, seed: int
) -> None:
    """Trajectories of 1001 rows, and a tenth as many for validation."""
    num_episodes = -(-transitions // 1000)
    num_held_out = -(-num_episodes // 10)
    np.random.seed(seed)  # the oracles and the mazes draw from these too
    play.env.action_space.seed(seed)
    columns: dict[str, list[Any]] = {}
    for episode in tqdm(range(num_episodes + num_held_out), desc=name):
        o, info = play.reset(seed if episode == 0 else None)
        done = False
        while not done:
            a = np.clip(play.act(o, info), -1, 1)
            next_o, _, terminated, truncated, info = play.env.step(a)
            done = terminated or truncated
            row = {"observations": o, "actions": a, "terminals": done}
            # Of the state in which the action was taken, as the observation is.
            states = ("qpos", "qvel", "button_states")
            row |= {key: info[f"prev_{key}"] for key in states if f"prev_{key}" in info}
            for key, value in row.items():
                columns.setdefault(key, []).append(value)
            play.follow_up(info)
            o = next_o
    play.env.close()
    split = 1001 * num_episodes
    for suffix, rows in (("", slice(split)), ("-val", slice(split, None))):
        written = {key: np.asarray(column[rows]) for key, column in columns.items()}
        for key, column in written.items():
            written[key] = column.astype(np.float32) if column.dtype == np.float64 else column
        write_npz(out / f"{name}-v0{suffix}.npz", written)


Task = Literal[
    "pendulum", "halfcheetah", "cube-single", "cube-double", "scene", "puzzle-3x3", "pointmaze"
]


def main(
    task: tyro.conf.Positional[Task],
    out: Path = Path("data"),
    transitions: int | None = None,
    seed: int = 0,
) -> None:
    """Makes a dataset on this machine, without downloading anything.

    Args:
        task: what to make.
        out: the folder to write to.
        transitions: how many, rounded up to whole episodes; by default 100 000 for `pendulum`
            and 50 000 otherwise.
        seed: the same seed makes the same data on the same machine.
    """
    if transitions is None:
        transitions = 100_000 if task == "pendulum" else 50_000
    if task == "pendulum":
        make_pendulum(out, transitions, seed)
    elif task == "halfcheetah":
        make_halfcheetah(out, transitions, seed)
    else:
        os.environ.setdefault("MUJOCO_GL", "disabled")  # nothing is drawn
        import ogbench  # noqa: F401  (registers its environments)

        if task == "pointmaze":
            play, name = MazePlay("pointmaze-medium-v0"), "pointmaze-medium-navigate"
        else:
            play, name = ManipulationPlay(task), f"{task}-play"
        make_ogbench(play, name, out, transitions, seed)


if __name__ == "__main__":
    tyro.cli(main)
