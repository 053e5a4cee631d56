from typing import Any, TYPE_CHECKING

import numpy as np

from .._misc import check_positive_integer
from ..acting import Actor


if TYPE_CHECKING:
    import gymnasium


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

        def velocity(t, x, observation):  # noise of standard deviation 1/4, whatever the state
            return (t / 16 - (1 - t)) / (t**2 / 16 + (1 - t) ** 2) * x

        policy = fisher_flow.FlowPolicy(velocity, action_shape=(1,), bounds=(-2, 2))
        make = functools.partial(gymnasium.make, "Pendulum-v1")
        envs = gymnasium.vector.SyncVectorEnv([make] * 4)
        returns = fisher_flow.evaluate(policy, envs, seed=0)
        ```

    **Arguments:**

    - `policy`: any policy, as for [`fisher_flow.Actor`][]. All environments are acted in by one
        batch.
    - `envs`: the environments, one episode each.

    **Other arguments:**

    - `seed`: seeds the start states (environment `i` starts from `seed + i`) and the actions. The
        same seed gives every policy the same start states.
    - `max_steps`: the number of steps after which episodes that have not ended raise.

    **Returns:**

    The undiscounted return of each episode.

    **Raises:**

    - `RuntimeError` if an episode does not end within `max_steps`.
    """
    check_positive_integer("max_steps", max_steps, 100_000)
    actor = Actor(policy, envs, seed=seed)
    observations, _ = envs.reset(seed=seed)
    returns = np.zeros(envs.num_envs)
    running = np.ones(envs.num_envs, bool)
    for _ in range(max_steps):
        observations, rewards, terminated, truncated, _ = envs.step(actor(observations))
        returns += np.where(running, rewards, 0)
        done = terminated | truncated
        actor.reset(done)
        running &= ~done
        if not running.any():
            return returns
    raise RuntimeError(
        f"{running.sum()} of {envs.num_envs} episodes did not end within `max_steps={max_steps}`. "
        'Give the environment a time limit: `gymnasium.make("Pendulum-v1", max_episode_steps=200)`.'
    )
