from typing import Any, TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import check_instance, check_positive_integer
from .._custom_types import Critic, Observation
from .._geometry import AbstractMetric, ObservedInformation
from .._linalg import damped_matrix, mean_eigenvalue, value_and_jacobian
from ._executed_critic import check_critic, critic_value
from ._refined_policy import RefinedPolicy


if TYPE_CHECKING:
    import matplotlib.figure


def plot_refinement(
    policy: RefinedPolicy,
    observation: Observation,
    *,
    critic: Critic | None = None,
    metric: AbstractMetric | None = None,
    limits: tuple[float, float, float, float] | None = None,
    resolution: int = 80,
    num_arrows: int = 150,
    num_ellipses: int = 12,
    key: PRNGKeyArray | None = None,
) -> "matplotlib.figure.Figure":
    r"""Draws what a refinement does at one observation, for actions of two entries.

    On the left, the unrefined policy: its density, the critic as contour lines, the displacements
    of some of its actions as arrows, and the metric as ellipses: all the displacements in an
    ellipse cost at most the same, so that a step may go far along its major axis. On the right, the
    refined policy: its density, and where the arrows end. Everything is before the bounds.

    **Arguments:**

    - `policy`: the policy that `refine` returned. If it is a chain, the last step is drawn.
    - `observation`: one observation, any PyTree of arrays.

    **Other arguments:**

    - `critic`: by default the one that the policy was refined by.
    - `metric`: the metric whose ellipses are drawn, with the damping of the refinement. By default
        it is [`fisher_flow.ObservedInformation`][] with the score of the refinement.
    - `limits`: the smallest and largest first entry, and the smallest and largest second entry. By
        default where 99% of the actions of both policies lie, and a margin.
    - `resolution`: the number of points of the density along each axis.
    - `num_arrows`, `num_ellipses`: how many to draw.
    - `key`: a `jax.random.key` for the actions that are drawn.

    **Returns:**

    A Matplotlib figure. Needs Matplotlib: `pip install matplotlib`.

    **Raises:**

    - `ValueError` if an argument is not of its kind, or the actions do not have two entries.
    """
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    check_instance("policy", policy, RefinedPolicy, "fisher_flow.refine(policy, critic)")
    check_positive_integer("resolution", resolution, 80)
    check_positive_integer("num_arrows", num_arrows, 150)
    check_positive_integer("num_ellipses", num_ellipses, 12)
    _check_plane(policy.action_shape, limits)
    critic = policy.critic if critic is None else critic
    check_critic(critic)
    if metric is None:
        metric = ObservedInformation(policy.method.measure.score)
    check_instance("metric", metric, AbstractMetric, "fisher_flow.ObservedInformation()")
    sample_key, metric_key = jr.split(jr.key(0) if key is None else key)
    before, after = (np.asarray(x) for x in _samples(policy, observation, 2048, sample_key))
    if limits is None:
        low, high = np.nanquantile(np.concatenate([before, after]), [0.005, 0.995], axis=0)
        margin = 0.15 * (high - low)
        (x0, y0), (x1, y1) = low - margin, high + margin
    else:
        x0, x1, y0, y1 = limits
    before_grid, after_grid = _grids(policy, observation, (x0, x1, y0, y1), resolution, before)
    line = [np.linspace(low, high, resolution) for low, high in ((x0, x1), (y0, y1))]
    mesh = np.stack(np.meshgrid(*line), axis=-1)
    values = _values(policy, critic, observation, jnp.asarray(mesh.reshape(-1, 2), before.dtype))
    values = np.asarray(values).reshape(resolution, resolution)

    figure = Figure(figsize=(10, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    colours = colormaps["Blues"]
    # The square root, so that the tails show.
    norm = PowerNorm(0.5, 0, float(np.nanmax(before_grid[1])), clip=True)
    for panel, (points, density), title in (
        (left, before_grid, "before: metric and displacements"),
        (right, after_grid, "after"),
    ):
        panel.set_facecolor(colours(0.0))  # where the map is folded
        panel.pcolormesh(
            points[..., 0], points[..., 1], density,
            cmap=colours, norm=norm, shading="gouraud", rasterized=True,
        )  # fmt: skip
        lines = panel.contour(*mesh.transpose(2, 0, 1), values, 10, cmap="autumn", linewidths=0.8)
        panel.clabel(lines, fontsize=7)
        panel.set(title=title, xlim=(x0, x1), ylim=(y0, y1), xlabel="action, first entry")
        panel.set_aspect("equal", adjustable="box")
    left.set_ylabel("action, second entry")
    start, δ = before[:num_arrows], (after - before)[:num_arrows]
    left.quiver(
        *start.T, *δ.T, angles="xy", scale_units="xy", scale=1,
        width=0.004, color="k", alpha=0.8, zorder=3,
    )  # fmt: skip
    right.plot(*after[:num_arrows].T, "k.", markersize=3, alpha=0.8)

    # As many actions as the mean eigenvalue needs, which is the unit of the damping.
    metrics = _metrics(policy, metric, observation, jnp.asarray(before[:512]), metric_key)
    drawn = slice(num_arrows, num_arrows + num_ellipses)
    _draw_ellipses(left, before[drawn], np.asarray(metrics)[drawn], x1 - x0)
    left.plot([], [], color="C2", label=f"{type(metric).__name__}, damped")
    left.legend(loc="lower left", fontsize=8)
    return figure


def _check_plane(action_shape: tuple[int, ...], limits: Any) -> None:
    if int(np.prod(action_shape)) != 2:
        raise ValueError(
            "`policy` must have actions of two entries to be drawn in the plane, but its "
            f"`action_shape` is {action_shape}. Write "
            "`certify(policy, critic, observations, key=key).plot()`, which takes any size."
        )
    if limits is not None and not (
        len(limits) == 4 and limits[0] < limits[1] and limits[2] < limits[3]
    ):
        raise ValueError(
            "`limits` must be the smallest and largest first entry of an action, and the smallest "
            f"and largest second entry, but got `{limits}`. Write `limits=(-1.0, 1.0, -1.0, 1.0)`."
        )


def _grids(policy, observation, limits, resolution, like) -> list[tuple[np.ndarray, np.ndarray]]:
    """Points and densities before and after the refinement."""
    x0, x1, y0, y1 = limits
    # The grid is one of the flow, and is carried through the maps: no density needs an inverse. A
    # wider one, so that the right panel is covered too.
    wide = 0.25 * np.array([x1 - x0, y1 - y0])
    axes_of_grid = (
        np.linspace(low - pad, high + pad, int(1.5 * resolution) + 1)
        for low, high, pad in ((x0, x1, wide[0]), (y0, y1, wide[1]))
    )
    grid = np.stack(np.meshgrid(*axes_of_grid), axis=-1)
    carried = _carried(policy, observation, jnp.asarray(grid.reshape(-1, 2), like.dtype))
    carried = [np.asarray(x).reshape(*grid.shape[:2], *x.shape[1:]) for x in carried]
    return [(carried[0], carried[1]), (carried[2], carried[3])]


def _draw_ellipses(axes: Any, centres: np.ndarray, matrices: np.ndarray, width: float) -> None:
    """The displacements of one cost, about each centre. At this cost the median ellipse is as wide
    as a twelfth of the plot."""
    from matplotlib.patches import Ellipse

    eigenvalues, directions = np.linalg.eigh(matrices)
    cost = 0.5 * np.median(eigenvalues[:, 0]) * (width / 24) ** 2 if len(centres) else 0.0
    for centre, w, V in zip(centres, eigenvalues, directions, strict=True):
        axis, other = 2 * np.sqrt(2 * cost / w)
        angle = np.degrees(np.arctan2(V[1, 0], V[0, 0]))
        axes.add_patch(
            Ellipse(tuple(centre), axis, other, angle=angle, fill=False, color="C2", linewidth=1.5)
        )


@eqx.filter_jit
def _samples(policy, observation, num, key):
    def one(key):
        a = policy.policy.draw(observation, key=key).reshape(-1)
        shaped = a.reshape(policy.action_shape)
        return a, a + policy.displacement(observation, shaped).reshape(-1)

    return jax.vmap(one)(jr.split(key, num))


@eqx.filter_jit
def _carried(policy, observation, grid: Float[Array, "points 2"]):
    """Where both policies carry actions of the flow, and their densities there."""

    def one(b):
        b = b.reshape(policy.action_shape)
        log_p = policy.flow_policy.log_prob(observation, b)

        def density(of):
            a, jacobian = value_and_jacobian(lambda b: of.from_flow(observation, b), b)
            sign, log_det = jnp.linalg.slogdet(jacobian)
            return a.reshape(-1), jnp.where(sign > 0, jnp.exp(log_p - log_det), jnp.nan)

        return *density(policy.policy), *density(policy)

    return lax.map(one, grid, batch_size=256)


@eqx.filter_jit
def _values(policy, critic, observation, points: Float[Array, "points 2"]):
    value = lambda a: critic_value(policy, critic, observation, a.reshape(policy.action_shape))
    return lax.map(value, points, batch_size=256)


@eqx.filter_jit
def _metrics(policy, metric, observation, centres: Float[Array, "n 2"], key):
    """The damped metric at each action."""

    def operator(a):
        flow, a = policy.flow_policy, a.reshape(policy.action_shape)
        return metric.operator(flow, observation, a, key=key), a

    # The same damping for all: a step settles it in absolute terms, others relative to the mean.
    damping = getattr(policy.displacement_field, "damping", None)
    if damping is None:
        eigenvalues = jax.vmap(lambda a: mean_eigenvalue(*operator(a)))(centres)
        mean = jnp.mean(jnp.where(jnp.isfinite(eigenvalues), eigenvalues, 0))
        damping = jnp.asarray(getattr(policy.method, "damping", 0.1), centres.dtype) * mean
    damping = jnp.asarray(damping, centres.dtype)
    return jax.vmap(lambda a: damped_matrix(operator(a)[0], damping))(centres)
