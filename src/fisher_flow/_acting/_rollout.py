import dataclasses
from collections.abc import Mapping
from typing import Any, TYPE_CHECKING

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
from jaxtyping import Float, Int

from .._checks import check_positive_integer, check_vector_environment
from .._data import single_precision, Transitions
from .._trees import plain
from ._actor import Actor


if TYPE_CHECKING:
    import gymnasium


@dataclasses.dataclass(frozen=True, eq=False)
class Episodes:
    """The results of the episodes that [`fisher_flow.rollout`][] played."""

    returns: Float[np.ndarray, " episodes"]
    """The undiscounted return of each episode."""

    lengths: Int[np.ndarray, " episodes"]
    """The number of steps of each episode."""

    successes: Float[np.ndarray, " episodes"]
    """Whether each episode ended in success, 1 or 0: the value of `info["success"]`, or else of
    `info["is_success"]`, at its last step, as in OGBench. A success that was lost again does not
    count. NaN where `info` has neither. Some environments report a success only if there is one:
    for these take `successes == 1`."""

    seeds: Int[np.ndarray, " episodes"]
    """The seed of each episode. `rollout(policy, envs, num_episodes=1, seed=seeds[i])` and
    `record_video(policy, env, path, seed=seeds[i])` play episode `i` again."""


def evaluate(
    policy: Any,
    envs: "gymnasium.vector.VectorEnv",
    *,
    seed: int = 0,
    max_steps: int = 100_000,
) -> np.ndarray:
    """Plays one episode in each environment of a Gymnasium vector environment.

    !!! example

        ```python
        import functools
        import fisher_flow
        import gymnasium
        import jax.numpy as jnp

        def velocity(t, x, observation):  # noise of standard deviation 1/4 in every state
            return (t / 16 - (1 - t)) / (t**2 / 16 + (1 - t) ** 2) * x

        policy = fisher_flow.FlowPolicy(velocity, action_shape=(1,), bounds=(-2, 2))
        make = functools.partial(gymnasium.make, "Pendulum-v1")
        envs = gymnasium.vector.SyncVectorEnv([make] * 4)
        returns = fisher_flow.evaluate(policy, envs, seed=0)
        ```

    **Arguments:**

    - `policy`: any policy, as for [`fisher_flow.Actor`][]. It acts in all environments at once, as
        one batch.
    - `envs`: the environments, one episode each.

    **Other arguments:**

    - `seed`: the seed of the start states and of the actions: environment `i` starts from
        `seed + i`. The same seed gives every policy the same start states.
    - `max_steps`: the number of steps after which episodes that have not ended raise.

    **Returns:**

    The undiscounted return of each episode. [`fisher_flow.rollout`][] returns lengths and successes
    too.

    **Raises:**

    - `RuntimeError` if an episode does not end within `max_steps`.
    """
    return rollout(policy, envs, seed=seed, max_steps=max_steps).returns


def rollout(
    policy: Any,
    envs: "gymnasium.vector.VectorEnv",
    *,
    num_episodes: int | None = None,
    seed: int | np.integer = 0,
    max_steps: int = 100_000,
) -> Episodes:
    """Plays episodes in a Gymnasium vector environment, in rounds of one episode each environment.

    Episode `i` is reset with the seed `seed + i`, and its actions are drawn with noise of that
    seed. So the episode does not depend on the number of environments, and can be played again
    alone. It is the same up to rounding: a batch of another size may be summed in another order.

    A round lasts as long as its longest episode. What an environment plays after its episode has
    ended is not counted. Stopping after the first `num_episodes` that end would favour short
    episodes.

    !!! warning

        This holds for environments that draw all their random numbers from the generator that
        `reset(seed=...)` seeds. Some, the mazes of OGBench among them, use NumPy's global one.

    !!! example

        ```python
        import functools
        import fisher_flow
        import gymnasium
        import numpy as np

        velocity = lambda t, x, observation: (2 * t - 1) / (t**2 + (1 - t) ** 2) * x
        policy = fisher_flow.FlowPolicy(velocity, action_shape=(1,), bounds=(-2, 2))
        make = functools.partial(gymnasium.make, "Pendulum-v1")
        envs = gymnasium.vector.SyncVectorEnv([make] * 4)
        episodes = fisher_flow.rollout(policy, envs, num_episodes=10)

        worst = np.argmin(episodes.returns)
        again = fisher_flow.rollout(policy, envs, num_episodes=1, seed=episodes.seeds[worst])
        assert np.allclose(again.returns, episodes.returns[worst], rtol=1e-3)
        ```

    **Arguments:**

    - `policy`: any policy, as for [`fisher_flow.Actor`][].
    - `envs`: the environments, a `SyncVectorEnv` or an `AsyncVectorEnv`, in any autoreset mode.

    **Other arguments:**

    - `num_episodes`: the number of episodes; by default one for each environment.
    - `seed`: the seed of the first episode.
    - `max_steps`: the number of steps after which episodes that have not ended raise.

    **Returns:**

    The [`fisher_flow.Episodes`][].

    **Raises:**

    - `RuntimeError` if an episode does not end within `max_steps`.
    """
    return _play(policy, envs, num_episodes, seed, max_steps)


def collect(
    policy: Any,
    envs: "gymnasium.vector.VectorEnv",
    *,
    num_episodes: int | None = None,
    seed: int | np.integer = 0,
    max_steps: int = 100_000,
) -> Transitions:
    """Plays the episodes of [`fisher_flow.rollout`][] and returns all their steps, to learn from.

    A mask is 0 where an episode has ended, and 1 where a time limit cut it off. The next
    observations are right in every autoreset mode. `next_actions` are the actions that the policy
    took next. At the last step of an episode, that is the action that it would have taken.

    !!! example

        ```python
        import functools
        import fisher_flow
        import gymnasium

        velocity = lambda t, x, observation: (2 * t - 1) / (t**2 + (1 - t) ** 2) * x
        policy = fisher_flow.FlowPolicy(velocity, action_shape=(1,), bounds=(-2, 2))
        make = functools.partial(gymnasium.make, "Pendulum-v1")
        envs = gymnasium.vector.SyncVectorEnv([make] * 4)
        transitions = fisher_flow.collect(policy, envs)
        assert len(transitions) == 4 * 200
        ```

    **Arguments:**

    - `policy`, `envs`: as for [`fisher_flow.rollout`][].

    **Other arguments:**

    - `num_episodes`, `seed`, `max_steps`: as for [`fisher_flow.rollout`][], which plays the same
        episodes.

    **Returns:**

    [`fisher_flow.Transitions`][] in NumPy, episode after episode, with a row for each step. Double
    precision is cut to single precision, as the loaders do.

    **Raises:**

    - `RuntimeError` if an episode does not end within `max_steps`.
    - `ValueError` if the environments reset themselves without saying how the episode ended.
    """
    parts = []
    _play(policy, envs, num_episodes, seed, max_steps, parts.append)
    return Transitions(*jax.tree.map(lambda *columns: np.concatenate(columns), *parts))


def _play(policy, envs, num_episodes, seed, max_steps, write=None):
    """Plays episodes, and hands the columns of the transitions of each to `write`, if given."""
    check_vector_environment(envs)
    num_episodes = envs.num_envs if num_episodes is None else num_episodes
    check_positive_integer("num_episodes", num_episodes, 10)
    check_positive_integer("max_steps", max_steps, 100_000)
    actor = replaying_actor(policy, envs)
    rounds = []
    for first in range(0, num_episodes, envs.num_envs):
        counted = np.arange(first, first + envs.num_envs) < num_episodes
        steps = None if write is None else []
        played = _play_round(actor, envs, int(seed) + first, counted, max_steps, steps)
        rounds.append([column[counted] for column in played])
        if write is not None and steps is not None:
            o, a, r, terminated = jax.tree.map(lambda *leaves: np.stack(leaves), *steps)
            for i in np.flatnonzero(counted).tolist():
                write(_episode(o, a, r, terminated, i, played[1][i]))
    returns, lengths, successes = (np.concatenate(x) for x in zip(*rounds, strict=True))
    return Episodes(returns, lengths, successes, int(seed) + np.arange(num_episodes))


def _play_round(actor, envs, seed, counted, max_steps, steps=None):
    """Plays an episode in each environment, and returns the returns, lengths and successes. They
    hold where the episode is `counted`.

    If `steps` is given, appends to it the observations, actions, rewards and terminations of every
    step. One more entry has the last observations, and the actions that would follow.
    """
    observations, _ = envs.reset(seed=seed)  # environment i with the seed `seed + i`
    observations = _copied(observations)
    actor.reset()
    mode = (getattr(envs, "metadata", None) or {}).get("autoreset_mode")
    seeds = seed + np.arange(envs.num_envs)
    returns, lengths = np.zeros(envs.num_envs), np.zeros(envs.num_envs, int)
    successes = np.full(envs.num_envs, np.nan)
    running = counted.copy()
    for step in range(max_steps):
        actions = actor(labelled(seeds, step, observations))
        led_to, rewards, terminated, truncated, infos = envs.step(actions)
        done = terminated | truncated
        led_to = _where_it_led(led_to, done, infos)
        if steps is not None:
            _require_final_observations(mode, done, infos)
            steps.append((observations, actions, np.array(rewards), np.array(terminated)))
        returns += np.where(running, rewards, 0)
        lengths += running
        # Of an environment that is reset at once, the infos of its last step are kept apart.
        infos = infos.get("final_info", infos)
        for i in np.flatnonzero(running & done).tolist():
            successes[i] = success_of(infos, i)
        running &= ~done
        if not running.any():
            if steps is not None:
                actions = actor(labelled(seeds, step + 1, led_to))
                steps.append((led_to, actions, np.zeros_like(rewards), terminated))
            return returns, lengths, successes
        if done.any() and getattr(mode, "name", None) == "DISABLED":
            envs.reset(options={"reset_mask": done})
        # Where an episode has ended, the next action is one that would have followed. What is
        # played there from now on is not counted.
        observations = led_to
    raise RuntimeError(
        f"{running.sum()} of {counted.sum()} episodes did not end within `max_steps={max_steps}`. "
        'Give the environment a time limit: `gymnasium.make("Pendulum-v1", max_episode_steps=200)`.'
    )


def _copied(observations):
    return jax.tree.map(
        np.array, plain(observations)
    )  # environments may write to the same array again


def _where_it_led(observations, done, infos):
    """The observations after a step, also where the environment was reset at once."""
    observations = _copied(observations)
    if "final_obs" in infos:
        for i in np.flatnonzero(done).tolist():
            final = jax.tree.leaves(jax.tree.map(lambda leaf, i=i: leaf[i], infos["final_obs"]))
            for leaf, value in zip(jax.tree.leaves(observations), final, strict=True):
                leaf[i] = value
    return observations


def _require_final_observations(mode, done, infos):
    if getattr(mode, "name", None) == "SAME_STEP" and done.any() and "final_obs" not in infos:
        raise ValueError(
            "`envs` must say in `final_obs` what was seen last, since they reset themselves at "
            f"once, but they returned only {sorted(infos)}. Write "
            "`envs=gymnasium.vector.SyncVectorEnv([make_env] * 10)`."
        )


def _episode(observations, actions, rewards, terminated, i, length):
    """The columns of `Transitions` of the episode that environment `i` played first."""
    rows, following = (slice(length), i), (slice(1, length + 1), i)
    columns = (
        jax.tree.map(lambda leaf: leaf[rows], observations),
        actions[rows],
        rewards[rows].astype(np.float32),
        np.where(terminated[rows], 0, 1).astype(np.float32),
        jax.tree.map(lambda leaf: leaf[following], observations),
        actions[following],
        np.arange(length) == length - 1,
    )
    return single_precision(columns)


class _Replaying(eqx.Module):
    """Draws actions with noise that depends only on the seed of the episode and the step in it."""

    policy: Any

    def sample(self, observation, *, key):
        del key  # of the place in the batch
        seed, step, observation = observation
        return self.policy.sample(observation, key=jr.fold_in(jr.key(seed), step))


def replaying_actor(policy, env):
    actor = Actor(policy, env)
    actor.policy = _Replaying(policy)  # now that the policy itself has passed the checks
    return actor


def labelled(seeds, step, observations):
    """Observations as `_Replaying` takes them; unsigned, as seeds are cut to 32 bits anyway."""
    seeds = (np.asarray(seeds) & 0xFFFFFFFF).astype(np.uint32)
    return seeds, np.full_like(seeds, step), observations


def success_of(infos: Mapping[str, Any], i: int) -> float:
    """What environment `i` says of its success, if it does."""
    for name in ("success", "is_success"):
        reported = infos.get(f"_{name}")  # a vector environment says so for each of its own
        if name in infos and (reported is None or reported[i]):
            return float(infos[name][i])
    return np.nan
