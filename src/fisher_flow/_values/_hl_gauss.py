import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy as jsp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar, ScalarLike

from .._checks import check_at_least, check_positive_integer
from .._custom_types import Action, Data, Observation
from .._networks import AbstractEncoder, encode, EncoderNetwork, make_encoder, QNetwork
from .._trees import ravel_inputs
from ._categorical import checked_support
from ._critic_learning import AbstractCriticLearning, check_members
from ._network_ensemble import AbstractNetworkEnsemble, make_members


class CategoricalEnsemble(AbstractNetworkEnsemble):
    """Several networks that predict logits of returns; the critic of [`fisher_flow.HLGauss`][]."""

    members: QNetwork
    encoder: EncoderNetwork | None
    aggregate: Callable[[Array], Array] = eqx.field(static=True)
    support: tuple[float, float] = eqx.field(static=True)
    num_atoms: int = eqx.field(static=True)

    def values(self, observation: Observation, action: Action) -> Float[Array, " members"]:
        """The mean return of an action by each member."""
        return self.mean_returns(self.logits(observation, action))

    def logits(self, observation: Observation, action: Action) -> Float[Array, "members atoms"]:
        """The logits of the returns of an action by each member."""
        inputs = ravel_inputs(encode(self.encoder, observation), action)
        return eqx.filter_vmap(lambda member: member(inputs))(self.members)

    def mean_returns(self, logits: Float[Array, "*batch atoms"]) -> Float[Array, "*batch"]:
        """The mean returns that logits stand for."""
        atoms = jnp.linspace(*self.support, self.num_atoms, dtype=logits.dtype)
        return jax.nn.softmax(logits) @ atoms


class HLGauss(AbstractCriticLearning):
    r"""A critic that classifies returns: the cross-entropy to a histogram of a Gaussian about the
    target of [`fisher_flow.TemporalDifference`][],

    $$-\sum_i \sum_k p_k(y) \log \operatorname{softmax}(\ell_i(o, a))_k, \qquad
        Q_i(o, a) = \sum_k z_k \operatorname{softmax}(\ell_i(o, a))_k.$$

    Bin $k$ is centred on the atom $z_k$. The spread of the histogram is a setting; it is not
    the spread of the return. Logs `target_clipped` too, the share of targets outside of the
    support: widen the support unless it stays near 0.

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

    support: tuple[float, float] = eqx.field(converter=checked_support, static=True)
    num_atoms: int = eqx.field(default=101, static=True)
    _: dataclasses.KW_ONLY
    sigma: ScalarLike = 0.75
    num_members: int = eqx.field(default=2, static=True)
    width_size: int = eqx.field(default=512, static=True)
    depth: int = eqx.field(default=4, static=True)
    aggregate: Callable[[Array], Array] = eqx.field(default=jnp.mean, static=True)
    encoder: AbstractEncoder | None = None
    discount: ScalarLike = 0.99
    target_rate: ScalarLike = 0.005

    def __check_init__(self):
        check_positive_integer("num_atoms", self.num_atoms, 101)
        check_at_least("num_atoms", self.num_atoms, 2, 101)
        check_at_least("sigma", self.sigma, 1e-3, 0.75)
        check_members(self)

    def init(
        self, observation: Observation, action: Action, *, key: PRNGKeyArray
    ) -> CategoricalEnsemble:
        example = f"HLGauss({self.support}, encoder=fisher_flow.ImpalaEncoder())"
        network, size, key = make_encoder(self.encoder, observation, action.dtype, key, example)
        members = make_members(
            self.num_members,
            size + action.size,
            self.width_size,
            self.depth,
            action.dtype,
            key,
            self.num_atoms,
        )
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
        values = critic.mean_returns(logits)
        low, high = self.support
        clipped = jnp.mean((targets < low) | (targets > high), dtype=loss.dtype)
        return loss, {
            "critic_loss": loss,
            "q_mean": jnp.mean(values),
            "q_max": jnp.max(values),
            "target_clipped": clipped,
        }


HLGauss.__init__.__doc__ = r"""**Arguments:**

- `support`: the least and the largest return. Targets outside are clipped.
- `num_atoms`: the number of returns, evenly between them, and of logits.
- `sigma`: the standard deviation of the Gaussian, in widths of a bin.
- the others: as in [`fisher_flow.TemporalDifference`][].

**Raises:**

- `ValueError` if `support` is not an increasing pair, or a number is out of range.
"""
