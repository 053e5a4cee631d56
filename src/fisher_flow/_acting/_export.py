import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.export  # with JAX 0.7 `import jax` leaves it out
import jax.numpy as jnp
import jax.random as jr

from .._custom_types import Observation


def export_sampler(
    policy: Any,
    observation: Observation,
    path: str | os.PathLike | None = None,
    *,
    platforms: Sequence[str] | None = None,
) -> bytes:
    """Compiles the sampler of a policy into a file that runs without this library.

    The file holds the network, the flow and the refinement as one program, in the stable format of
    `jax.export`. It needs nothing but JAX and `flatbuffers`:

    !!! example

        ```python
        import fisher_flow
        import jax.export
        import jax.numpy as jnp

        velocity = lambda t, x, o: o + (2 * t - 1) * (x - t * o) / (t**2 + (1 - t) ** 2)
        policy = fisher_flow.FlowPolicy(velocity, action_shape=(2,))
        fisher_flow.export_sampler(policy, jnp.zeros(2), "policy.jax")

        with open("policy.jax", "rb") as file:  # elsewhere, later
            sampler = jax.export.deserialize(bytearray(file.read()))
        jnp.linalg.eigh(jnp.eye(1))  # before 0.12, JAX on CPUs crashes if this has not been called
        actions = sampler.call(jnp.zeros((16, 2)), jnp.uint32(0))  # observations and a seed
        ```

    **Arguments:**

    - `policy`: any policy with `sample(observation, key=key)`.
    - `observation`: one observation, any PyTree of arrays, for its shapes and dtypes.
    - `path`: where to write the file. A reader sees the old file or the new one, never a part. With
        `None` no file is written.

    **Other arguments:**

    - `platforms`: the platforms to compile for, such as `("cpu", "cuda", "tpu")`. By default the
        platform of this machine.

    **Returns:**

    The bytes of the file. The program in it takes a batch of observations of any length and a seed
    of dtype `uint32`, and returns a batch of actions.

    **Raises:**

    - `ValueError` if the policy has an adaptive step-size controller. The solver of such a policy
        can fail, and a file cannot raise.
    """
    arrays, static = eqx.partition(policy, eqx.is_array)

    def sample(observations, seed):
        policy = eqx.combine(arrays, static)
        (batch,) = {leaf.shape[0] for leaf in jax.tree.leaves(observations)}
        key = jr.key(seed)
        keys = jax.vmap(lambda row: jr.fold_in(key, row))(jnp.arange(batch))
        return jax.vmap(lambda o, key: policy.sample(o, key=key))(observations, keys)

    (batch,) = jax.export.symbolic_shape("batch")
    observations = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((batch, *jnp.shape(leaf)), jnp.asarray(leaf).dtype),
        observation,
    )
    try:
        export = jax.export.export(jax.jit(sample), platforms=platforms)
        exported = export(observations, jax.ShapeDtypeStruct((), jnp.uint32))
        data = bytes(exported.serialize())
    except NotImplementedError as error:
        if "callback" not in str(error):
            raise
        raise ValueError(
            "`policy` cannot be exported: its program calls back into Python, as solvers with "
            "adaptive steps do to raise errors. Write `FlowPolicy(velocity, action_shape, "
            "num_steps=10)` without a `stepsize_controller`."
        ) from error
    if path is not None:
        _write_atomically(Path(path), data)
    return data


def _write_atomically(path: Path, data: bytes) -> None:
    """A reader sees the old file or the new one, never a part."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
