import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Int, PRNGKeyArray, ScalarLike, UInt8

from .._checks import check_at_least, check_positive_integer
from .._images import is_image
from ._transitions import Transitions


class RandomCrop(eqx.Module):
    """Shifts images at random, for the `augment` of [`fisher_flow.train`][]: each image is padded
    by the pixels at its edges, and cropped to its size at a random place.

    The two observations of a transition are cropped alike, and so are the frames of a stack. An
    image is a leaf of dtype `uint8` with three or four axes. Other leaves are left as they are.

    !!! example

        ```python
        import fisher_flow
        import jax
        import numpy as np

        rng = np.random.default_rng(0)
        o, next_o = rng.integers(0, 256, (2, 8, 32, 32, 3), dtype=np.uint8)
        a = rng.uniform(-1, 1, (8, 2)).astype(np.float32)
        batch = fisher_flow.Transitions(o, a, np.zeros(8), np.ones(8), next_o, a)
        cropped = fisher_flow.RandomCrop()(batch, key=jax.random.key(0))
        ```

    ??? cite "Reference"

        DrQ introduced this augmentation. Three pixels and a probability of one half are the
        settings of OGBench. OGBench draws once for a whole batch, and this class draws once for
        each transition.

        ```bibtex
        @inproceedings{yarats2021image,
            title={Image augmentation is all you need: Regularizing deep reinforcement learning
                   from pixels},
            author={Yarats, Denis and Kostrikov, Ilya and Fergus, Rob},
            booktitle={International Conference on Learning Representations},
            year={2021},
        }
        @inproceedings{park2025ogbench,
            title={{OGBench}: Benchmarking Offline Goal-Conditioned {RL}},
            author={Park, Seohong and Frans, Kevin and Eysenbach, Benjamin and Levine, Sergey},
            booktitle={International Conference on Learning Representations},
            year={2025},
        }
        ```
    """

    padding: int = eqx.field(static=True, default=3)
    probability: ScalarLike = 0.5

    def __check_init__(self):
        check_positive_integer("padding", self.padding, 3)
        check_at_least("probability", self.probability, 0, 0.5, maximum=1)

    def __call__(self, batch: Transitions, *, key: PRNGKeyArray) -> Transitions:
        """The batch, with its images cropped.

        **Arguments:**

        - `batch`: some transitions.
        - `key`: a `jax.random.key`.

        **Raises:**

        - `ValueError` if no observation is an image, or one has its channels not last.
        """
        o, structure = jax.tree.flatten(batch.observations)
        next_o = structure.flatten_up_to(batch.next_observations)
        images = [i for i, leaf in enumerate(o) if is_image(leaf, num_batch_axes=1)]
        if len(images) == 0:
            raise ValueError(
                "`batch.observations` must have an image to crop, of dtype uint8 and shape (batch, "
                "height, width, channels) or (batch, frames, height, width, channels), but got "
                f"{eqx.tree_pformat(batch.observations)}. Write `augment=None`."
            )
        for i in images:
            chance_key, shift_key = jr.split(jr.fold_in(key, i))
            num = len(batch)
            shifts = jr.randint(shift_key, (num, 2), -self.padding, self.padding + 1)
            cropped = jr.bernoulli(chance_key, self.probability, (num, 1))
            shifts = jnp.where(cropped, shifts, 0)
            o[i], next_o[i] = (
                jax.vmap(_shifted)(o[i], shifts),
                jax.vmap(_shifted)(next_o[i], shifts),
            )
        return eqx.tree_at(
            lambda t: (t.observations, t.next_observations),
            batch,
            (structure.unflatten(o), structure.unflatten(next_o)),
        )


RandomCrop.__init__.__doc__ = """**Arguments:**

- `padding`: the number of pixels by which an image is shifted at most, either way.
- `probability`: the probability with which a transition is cropped.
"""


def _shifted(image: UInt8[Array, "..."], shift: Int[Array, "2"]) -> UInt8[Array, "..."]:
    # A crop of the padded image, without the padding: beyond an edge are the pixels of the edge.
    height, width = image.shape[-3:-1]
    rows = jnp.clip(jnp.arange(height) + shift[0], 0, height - 1)
    columns = jnp.clip(jnp.arange(width) + shift[1], 0, width - 1)
    return jnp.take(jnp.take(image, rows, axis=-3), columns, axis=-2)
