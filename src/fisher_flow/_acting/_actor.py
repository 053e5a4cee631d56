from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from .._checks import check_positive_integer, short
from .._trees import plain


@runtime_checkable
class _Samples(Protocol):
    def sample(self, observation: Any, *, key: Any) -> Any: ...


class Actor:
    """Acts with a policy in a Gymnasium environment, or in a vector of them.

    !!! example

        ```python
        import fisher_flow
        import gymnasium

        env = gymnasium.make("Pendulum-v1")
        velocity = lambda t, x, observation: (2 * t - 1) / (t**2 + (1 - t) ** 2) * x
        policy = fisher_flow.FlowPolicy(velocity, action_shape=(1,), bounds=env.action_space)
        actor = fisher_flow.Actor(policy, env, seed=0)

        observation, _ = env.reset(seed=0)
        for _ in range(10):
            observation, reward, terminated, truncated, _ = env.step(actor(observation))
        ```

    A chunk is an action of shape `(horizon, *shape)`, where `shape` is the shape of the actions of
    the environment. The actor draws a new chunk when the last one is used up.
    """

    def __init__(
        self,
        policy: Any,
        env: Any,
        *,
        seed: int = 0,
        deterministic: bool = False,
        num_executed: int | None = None,
    ):
        """**Arguments:**

        - `policy`: any policy: an object with `sample(observation, key=key)` for one observation.
        - `env`: a Gymnasium environment or vector environment. Only its action space is used.

        **Other arguments:**

        - `seed`: the seed of the actions.
        - `deterministic`: whether to use the same noise at every step, which makes the action a
            function of the observation.
        - `num_executed`: the number of actions of a chunk to execute before the next chunk is
            drawn. By default all of them.

        **Raises:**

        - `ValueError` if the actions of the policy do not fit the environment.
        """
        if not isinstance(policy, _Samples):
            example = "Actor(FlowPolicy(velocity, action_shape), env)"
            raise ValueError(
                "`policy` must have `sample(observation, key=key)`, but got "
                f"`{short(policy)}`. Write "
                f"`{'trained.policy()' if callable(getattr(policy, 'policy', None)) else example}`."
            )
        self.policy = policy
        self.deterministic = deterministic
        self.num_envs = getattr(env, "num_envs", None)
        self.action_space = getattr(env, "single_action_space", None) or env.action_space
        is_box = hasattr(self.action_space, "low")
        if not is_box or not np.issubdtype(self.action_space.dtype, np.floating):
            raise ValueError(
                f"`env` must have continuous actions, but its action space is "
                f"`{self.action_space}`. Write `Actor(policy, env)` with an environment whose "
                "`action_space` is a `Box` of floating point numbers."
            )
        shape = tuple(self.action_space.shape)
        arrived = getattr(policy, "action_shape", shape)
        if arrived != shape and arrived[1:] != shape:
            raise ValueError(
                f"`policy` draws actions of shape {arrived}, but the actions of `env` have shape "
                f"{shape}. Write `action_shape={shape}`, or `action_shape=(horizon, *{shape})` "
                "for chunks of actions."
            )
        self._chunked = arrived != shape
        horizon = arrived[0] if self._chunked else 1
        self.num_executed = horizon if num_executed is None else num_executed
        check_positive_integer("num_executed", self.num_executed, horizon)
        if self.num_executed > horizon:
            raise ValueError(
                f"`num_executed` must be at most the {horizon} actions of a chunk, but got "
                f"`{num_executed}`. Write `num_executed={horizon}`."
            )
        self._key = jr.key(seed)
        self._step = 0
        # A vector environment that resets at the next step ignores the action of that step.
        mode = (getattr(env, "metadata", None) or {}).get("autoreset_mode")
        # That is the default, and in Gymnasium 1.0 the only way, not named there.
        is_vector = self.num_envs is not None
        self._num_ignored = int(is_vector and getattr(mode, "name", "NEXT_STEP") == "NEXT_STEP")
        num_envs = 1 if self.num_envs is None else self.num_envs
        self._age = np.full(num_envs, self.num_executed)
        self._chunks: np.ndarray | None = None

    def reset(self, done: Any = None) -> None:
        """Forgets what is left of a chunk. Call it after `env.reset`, or with what a step says.

        **Arguments:**

        - `done`: `None` after a reset of all environments; or whether each episode has ended with
            the last step, `terminated | truncated`.
        """
        if done is None:
            self._age = np.full_like(self._age, self.num_executed)
        else:
            self._age = np.where(done, self.num_executed - self._num_ignored, self._age)

    def __call__(self, observation: Any) -> np.ndarray:
        """The action to take, in the dtype of the action space and within its bounds.

        **Arguments:**

        - `observation`: what the environment returned: of a vector environment, a batch.

        **Returns:**

        An array of the shape of `env.action_space`.
        """
        observation = jax.tree.map(np.asarray, plain(observation))
        for path, leaf in jax.tree.leaves_with_path(observation):
            if leaf.dtype.kind in "OUSMm":
                raise ValueError(
                    f"`observation{jax.tree_util.keystr(path)}` must be numbers in an array, but "
                    f"got `{short(leaf)}` of dtype {leaf.dtype}. Write "
                    "`env=gymnasium.wrappers.TransformObservation(env, numbers_of, space)`."
                )
        if self.num_envs is None:
            observation = jax.tree.map(lambda leaf: leaf[None], observation)
        if self._chunks is None or np.any(self._age >= self.num_executed):
            step = jnp.asarray(0 if self.deterministic else self._step)
            drawn = np.asarray(_sample(self.policy, observation, self._key, step))
            if not self._chunked:
                drawn = drawn[:, None]
            renew = self._age >= self.num_executed
            where = renew.reshape(-1, *[1] * (drawn.ndim - 1))
            self._chunks = drawn if self._chunks is None else np.where(where, drawn, self._chunks)
            self._age = np.where(renew, 0, self._age)
        assert self._chunks is not None
        actions = self._chunks[np.arange(len(self._age)), self._age]
        self._age = self._age + 1
        self._step += 1
        space = self.action_space
        actions = np.clip(actions, space.low, space.high).astype(space.dtype)
        return actions[0] if self.num_envs is None else actions


@eqx.filter_jit
def _sample(policy, observations, key, step):
    observations = jax.tree.map(
        lambda leaf: leaf.astype(jnp.result_type(float)) if leaf.dtype == jnp.float64 else leaf,
        observations,
    )
    (num_envs,) = {leaf.shape[0] for leaf in jax.tree.leaves(observations)}
    keys = jr.split(jr.fold_in(key, step), num_envs)
    return jax.vmap(lambda o, key: policy.sample(o, key=key))(observations, keys)
