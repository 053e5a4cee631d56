from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import PRNGKeyArray, PyTree, ScalarLike

from .._checks import check_at_least, check_positive_integer
from .._custom_types import Critic
from .._fit import apply_gradient, decaying_adam, fit
from .._flows import as_flow_policy, OneStepPolicy
from .._networks import AbstractEncoder, ActionMLP, make_encoder
from .._trees import in_full_precision, random_rows, with_dtypes_of
from ._fidelity import checked_held_out, critic_of, measure_fidelity, Refit
from ._selections import AbstractSelection


def distill(
    policy: Any,
    observations: PyTree[Any],
    *,
    critic: Critic | None = None,
    network: Callable[[Any, Any], Any] | None = None,
    encoder: AbstractEncoder | None = None,
    width_size: int = 256,
    depth: int = 3,
    held_out: PyTree[Any] | None = None,
    num_samples: int = 65_536,
    num_updates: int = 20_000,
    batch_size: int = 256,
    learning_rate: ScalarLike = 1e-3,
    progress: bool = True,
    key: PRNGKeyArray,
) -> Refit:
    r"""Distils a flow policy, refined or not, into one network from noise to action.

    The network learns where the flow and its transport maps $T$ carry each noise,

    $$\min_\mu\; \mathbb E_{o, z}\bigl\|\mu(o, z) - T(\mathrm{flow}(o, z))\bigr\|^2,$$

    so that an action costs one evaluation of it. The square is an upper bound of the squared
    Wasserstein distance $W_2^2$ between the two policies.

    Where the flow tears neighbouring noises apart, as between two modes, no smooth network follows:
    it puts some actions in between. The fidelity shows it as `energy` and `lost`.

    **Arguments:**

    - `policy`: the flow policy to distil. A choice among several actions is not a function of one
        noise: [`fisher_flow.absorb`][] it first.
    - `observations`: the observations to learn at, any PyTree of arrays with a leading axis.

    **Other arguments:**

    - `critic`: by which the loss is judged; by default the critic of the policy.
    - `network`: called as `network(observation, noise)` for one sample; returns an action. By
        default a multilayer perceptron of `depth` hidden layers of `width_size` units.
    - `encoder`: what that perceptron, if there is one, sees images through, such as
        [`fisher_flow.ImpalaEncoder`][].
    - `held_out`: the observations to measure the loss at; by default `observations`.
    - `num_samples`: the number of pairs of noise and action that are made to learn from.
    - `num_updates`, `batch_size`, `learning_rate`: of Adam, whose rate falls to zero along a
        cosine.
    - `progress`: whether to show a progress bar with the loss.
    - `key`: a `jax.random.key`; the same key gives the same policy.

    **Returns:**

    A named tuple of the `policy`, a [`fisher_flow.OneStepPolicy`][], and its `fidelity`, a
    [`fisher_flow.Fidelity`][].

    **Raises:**

    - `ValueError` if an argument is not of its kind, the network holds no arrays to train, or the
        policy draws an action that is not finite.
    - `FloatingPointError` if the training ends in NaN.

    ??? cite "Reference"

        Distilling a flow policy into one step by the squared distance at equal noise is part of

        ```bibtex
        @inproceedings{park2025flow,
            title={Flow {Q}-learning},
            author={Park, Seohong and Li, Qiyang and Levine, Sergey},
            booktitle={International Conference on Machine Learning},
            year={2025},
        }
        ```
    """
    if isinstance(policy, AbstractSelection):
        raise ValueError(
            "`policy` must be a flow policy, refined or not, but got a "
            f"`{type(policy).__name__}`, whose action is not a function of one noise. Write "
            "`policy=absorb(policy, observations, key=key).policy`."
        )
    policy = as_flow_policy(policy)
    critic = critic_of(policy, critic, observations)
    held_out = checked_held_out(held_out, observations)
    for name, value, example in (
        ("width_size", width_size, 256),
        ("depth", depth, 3),
        ("num_samples", num_samples, 65_536),
        ("num_updates", num_updates, 20_000),
        ("batch_size", batch_size, 256),
    ):
        check_positive_integer(name, value, example)
    check_at_least("learning_rate", learning_rate, 0, 1e-3)
    # An array, so that another rate does not compile again.
    learning_rate = jnp.asarray(learning_rate)
    row_key, noise_key, network_key, train_key, measure_key = jr.split(key, 5)
    o = random_rows(observations, num_samples, key=row_key)
    z, a = _noise_and_actions(policy, o, jr.split(noise_key, num_samples))
    if not jnp.all(jnp.isfinite(a)):
        raise ValueError(
            "`policy` must draw finite actions at all `observations`, but some are not. Drop the "
            "rows that are not finite: `keep = jnp.isfinite(observations).all(-1)`, then "
            "`observations=observations[keep]`."
        )
    if network is None:
        observation, action = jax.tree.map(lambda leaf: leaf[0], (o, a))
        encode, _, network_key = make_encoder(
            encoder,
            observation,
            a.dtype,
            network_key,
            "distill(policy, observations, encoder=fisher_flow.ImpalaEncoder(), key=key)",
        )
        network = ActionMLP(observation, action, width_size, depth, encoder=encode, key=network_key)
    original: Any = network
    lifted: Any = in_full_precision(network)
    student = OneStepPolicy(lifted, policy.action_shape, bounds=policy.bounds, dtype=a.dtype)
    parameters = eqx.filter(student, eqx.is_inexact_array)
    if len(jax.tree.leaves(parameters)) == 0:
        raise ValueError(
            f"`network` must hold arrays to train, but `{network!r}` has none. Make it a module "
            "with parameters, or leave it out: `distill(policy, observations, key=key)`."
        )
    optimiser_state = decaying_adam(learning_rate, num_updates).init(parameters)
    student, _ = fit(
        _update,
        (o, z, a, batch_size, learning_rate, num_updates),
        (student, optimiser_state),
        num_updates,
        key=train_key,
        progress=progress,
        description="distillation",
    )
    trained = with_dtypes_of(original, student.network)
    student = eqx.tree_at(lambda student: student.network, student, trained)
    return Refit(student, measure_fidelity(policy, student, critic, held_out, key=measure_key))


@eqx.filter_jit
def _noise_and_actions(policy, observations, keys):
    flow = policy.flow_policy

    def one(row):
        o, key = row
        z = flow.noise(o, key=key)
        return z, policy.from_flow(o, flow.flow(o, z))

    return lax.map(one, (observations, keys), batch_size=256)


def _update(args, state, key, step):
    del step
    observations, noises, actions, batch_size, learning_rate, num_updates = args
    student, optimiser_state = state
    rows = jr.randint(key, (batch_size,), 0, actions.shape[0])
    o, z, a = jax.tree.map(lambda leaf: leaf[rows], (observations, noises, actions))

    @eqx.filter_value_and_grad
    def loss_and_gradient(student):
        return jnp.mean((jax.vmap(student)(o, z) - a) ** 2)

    loss, gradient = loss_and_gradient(student)
    optimiser = decaying_adam(learning_rate, num_updates)
    student, optimiser_state = apply_gradient(optimiser, gradient, optimiser_state, student)
    return (student, optimiser_state), {"loss": loss}
