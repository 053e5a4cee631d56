from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.scipy as jsp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar, ScalarLike

from .._checks import check_at_least, check_discount, check_positive_integer
from .._custom_types import Action, Data, Observation
from .._networks import AbstractEncoder, encode, EncoderNetwork, make_encoder, QNetwork
from .._trees import ravel_inputs
from ._critic_learning import AbstractCriticLearning, check_aggregate


class CategoricalEnsemble(eqx.Module):
    """Several networks that predict logits of returns; the critic of [`fisher_flow.HLGauss`][]."""

    members: QNetwork  # every array in it has a leading axis, one entry a member
    encoder: EncoderNetwork | None  # one for all members
    aggregate: Callable[[Array], Array] = eqx.field(static=True)
    support: tuple[float, float] = eqx.field(static=True)
    num_atoms: int = eqx.field(static=True)

    def __call__(self, observation: Observation, action: Action) -> Scalar:
        """The value of an action, a scalar in the units of the rewards."""
        return self.aggregate(self.values(observation, action))

    def values(self, observation: Observation, action: Action) -> Float[Array, " members"]:
        """The mean return of an action by each member."""
        logits = self.logits(observation, action)
        atoms = jnp.linspace(*self.support, self.num_atoms, dtype=logits.dtype)
        return jax.nn.softmax(logits) @ atoms

    def logits(self, observation: Observation, action: Action) -> Float[Array, "members atoms"]:
        """The logits of the returns of an action by each member."""
        inputs = ravel_inputs(encode(self.encoder, observation), action)
        return eqx.filter_vmap(lambda member: member(inputs))(self.members)


class HLGauss(AbstractCriticLearning):
    r"""A critic that classifies returns: the cross-entropy to a histogram of a Gaussian about the
    target of [`fisher_flow.TemporalDifference`][],

    $$-\sum_i \sum_k p_k(y) \log \operatorname{softmax}(\ell_i(o, a))_k, \qquad
        Q_i(o, a) = \sum_k z_k \operatorname{softmax}(\ell_i(o, a))_k.$$

    Bin $k$ is centred on the atom $z_k$. The spread of the histogram is a choice, not that of the
    return. Logs `target_clipped` too, the share of targets outside of the support: widen the
    support unless it stays near 0.

    !!! tip

        With rewards between $r_-$ and $r_+$ every return is between $r_- / (1 - \gamma)$ and
        $r_+ / (1 - \gamma)$ (with 0 between them too if episodes end). Take the range of the
        returns in the data and a tenth of it on either side, if that is much narrower.

    ??? cite "Reference"

        ```bibtex
        @inproceedings{farebrother2024stop,
            title={Stop regressing: Training value functions via classification for scalable deep
                   {RL}},
            author={Farebrother, Jesse and Orbay, Jordi and Vuong, Quan and others},
            booktitle={International Conference on Machine Learning},
            year={2024},
        }
        ```
    """

    support: tuple[float, float] = eqx.field(static=True)
    num_atoms: int = eqx.field(static=True)
    sigma: ScalarLike
    num_members: int = eqx.field(static=True)
    width_size: int = eqx.field(static=True)
    depth: int = eqx.field(static=True)
    aggregate: Callable[[Array], Array] = eqx.field(static=True)
    encoder: AbstractEncoder | None
    discount: ScalarLike
    target_rate: ScalarLike

    def __init__(
        self,
        support: tuple[float, float],
        num_atoms: int = 101,
        *,
        sigma: ScalarLike = 0.75,
        num_members: int = 2,
        width_size: int = 512,
        depth: int = 4,
        aggregate: Callable[[Array], Array] = jnp.mean,
        encoder: AbstractEncoder | None = None,
        discount: ScalarLike = 0.99,
        target_rate: ScalarLike = 0.005,
    ):
        r"""**Arguments:**

        - `support`: the least and the largest return. Targets outside are clipped.
        - `num_atoms`: the number of returns, evenly between them, and of logits.
        - `sigma`: the standard deviation of the Gaussian, in widths of a bin.
        - the others: as of [`fisher_flow.TemporalDifference`][].

        **Raises:**

        - `ValueError` if `support` is not an increasing pair, or a number is out of range.
        """
        if np.shape(support) != (2,) or not support[0] < support[1]:
            raise ValueError(
                f"`support` must be an increasing pair of returns, but got `{support!r}`. Write "
                "`support=(-10.0, 0.0)`."
            )
        check_positive_integer("num_atoms", num_atoms, 101)
        check_at_least("num_atoms", num_atoms, 2, 101)
        check_at_least("sigma", sigma, 1e-3, 0.75)
        self.support = (float(support[0]), float(support[1]))
        self.num_atoms = num_atoms
        self.sigma = sigma
        check_positive_integer("num_members", num_members, 2)
        check_positive_integer("width_size", width_size, 512)
        check_positive_integer("depth", depth, 4)
        check_discount(discount)
        check_aggregate(aggregate)
        check_at_least("target_rate", target_rate, 0, 0.005, maximum=1)
        self.num_members = num_members
        self.width_size = width_size
        self.depth = depth
        self.aggregate = aggregate
        self.encoder = encoder
        self.discount = discount
        self.target_rate = target_rate

    def init(
        self, observation: Observation, action: Action, *, key: PRNGKeyArray
    ) -> CategoricalEnsemble:
        example = f"HLGauss({self.support}, encoder=fisher_flow.ImpalaEncoder())"
        network, size, key = make_encoder(self.encoder, observation, action.dtype, key, example)
        size += action.size
        members = eqx.filter_vmap(
            lambda key: QNetwork(
                size, self.width_size, self.depth, action.dtype, key, self.num_atoms
            )
        )(jr.split(key, self.num_members))
        return CategoricalEnsemble(members, network, self.aggregate, self.support, self.num_atoms)

    def histogram(self, target: Scalar) -> Float[Array, " atoms"]:
        """The probabilities of the bins for one target, clipped to the support."""
        low, high = self.support
        width = (high - low) / (self.num_atoms - 1)
        edges = jnp.linspace(
            low - width / 2, high + width / 2, self.num_atoms + 1, dtype=target.dtype
        )
        σ = jnp.asarray(self.sigma, target.dtype) * width
        cdf = jsp.stats.norm.cdf((edges - jnp.clip(target, low, high)) / σ)
        return jnp.diff(cdf) / (cdf[-1] - cdf[0])

    def loss(
        self,
        critic: CategoricalEnsemble,
        observations: PyTree[Any],
        actions: Float[Data, "batch ..."],
        targets: Float[Array, " batch"],
        *,
        key: PRNGKeyArray,
    ) -> tuple[Scalar, dict[str, Scalar]]:
        del key
        logits = jax.vmap(critic.logits)(observations, jnp.asarray(actions))
        p = jax.vmap(self.histogram)(targets)
        cross_entropy = -jnp.sum(p[:, None] * jax.nn.log_softmax(logits), axis=-1)
        loss = jnp.mean(jnp.sum(cross_entropy, axis=1))
        atoms = jnp.linspace(*self.support, self.num_atoms, dtype=logits.dtype)
        values = jax.nn.softmax(logits) @ atoms
        low, high = self.support
        clipped = jnp.mean((targets < low) | (targets > high), dtype=loss.dtype)
        return loss, {
            "critic_loss": loss,
            "q_mean": jnp.mean(values),
            "q_max": jnp.max(values),
            "target_clipped": clipped,
        }
