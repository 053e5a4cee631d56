import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from .._checks import check_positive_integer
from .._custom_types import Observation
from .._images import is_image
from ._encoder import AbstractEncoder


def _as_tuple(widths: Sequence[int]) -> tuple[int, ...]:
    return tuple(widths)


class ImpalaEncoder(AbstractEncoder):
    r"""The residual convolutional network of IMPALA, for observations that are or hold images.

    An image is a leaf of dtype `uint8` and of shape `(height, width, channels)`, or
    `(frames, height, width, channels)` for a stack of frames, which are laid side by side as
    channels. It is divided by 255 on the device. Each stack of layers convolves, halves the image
    by max pooling and adds residual blocks. Every image of an observation has stacks of its own;
    other leaves are appended to the features as they are.

    !!! example

        ```python
        import fisher_flow
        import jax
        import jax.numpy as jnp

        encoder = fisher_flow.ImpalaEncoder(widths=(8, 8), output_size=32)
        observation = {"camera": jnp.zeros((64, 64, 3), jnp.uint8), "joints": jnp.zeros(7)}
        network = encoder.init(observation, key=jax.random.key(0))
        assert network(observation).shape == (32 + 7,)

        flow = fisher_flow.BehaviourFlow(encoder=encoder)
        critic = fisher_flow.TemporalDifference(encoder=encoder)
        agent = fisher_flow.OneStep(flow=flow, critic=critic)
        ```

    ??? cite "Reference"

        IMPALA has two residual blocks a stack and 256 outputs. One block and 512 outputs, the
        defaults here, are what OGBench trains with offline (`impala_small` there).

        ```bibtex
        @inproceedings{espeholt2018impala,
            title={{IMPALA}: Scalable distributed deep-{RL} with importance weighted actor-learner
                   architectures},
            author={Espeholt, Lasse and Soyer, Hubert and Munos, R{\'e}mi and Simonyan, Karen
                    and Mnih, Vlad and Ward, Tom and Doron, Yotam and Firoiu, Vlad and Harley, Tim
                    and Dunning, Iain and Legg, Shane and Kavukcuoglu, Koray},
            booktitle={International Conference on Machine Learning},
            year={2018},
        }
        @inproceedings{park2025ogbench,
            title={{OGBench}: Benchmarking Offline Goal-Conditioned {RL}},
            author={Park, Seohong and Frans, Kevin and Eysenbach, Benjamin and Levine, Sergey},
            booktitle={International Conference on Learning Representations},
            year={2025},
        }
        ```
    """

    _: dataclasses.KW_ONLY
    widths: tuple[int, ...] = eqx.field(converter=_as_tuple, default=(16, 32, 32), static=True)
    num_blocks: int = eqx.field(default=1, static=True)
    output_size: int = eqx.field(default=512, static=True)
    layer_norm: bool = eqx.field(default=False, static=True)

    def __check_init__(self):
        if len(self.widths) == 0:
            raise ValueError(
                f"`widths` must have one entry a stack of layers, but got `{self.widths!r}`. Write "
                "`widths=(16, 32, 32)`."
            )
        for width in self.widths:
            check_positive_integer("widths", width, 16)
        check_positive_integer("num_blocks", self.num_blocks, 1)
        check_positive_integer("output_size", self.output_size, 512)

    def init(
        self, observation: Observation, *, dtype: Any = None, key: PRNGKeyArray
    ) -> "ImpalaNetwork":
        """A network for observations like this one: a function of one observation to a vector.

        **Arguments:**

        - `observation`: one observation, for its shapes and dtypes.
        - `dtype`: the dtype of the parameters.
        - `key`: a `jax.random.key` for the initial parameters.

        **Raises:**

        - `ValueError` if the observation holds no image, or one whose channels are not last. The
            network raises it too, for images of other shapes.
        """
        shapes = tuple(jnp.shape(x) for x in jax.tree.leaves(observation) if is_image(x))
        if len(shapes) == 0:
            raise ValueError(
                "`observation` must have an image for `ImpalaEncoder`, of dtype uint8 and shape "
                "(height, width, channels) or (frames, height, width, channels), but got "
                f"{eqx.tree_pformat(observation)}. Write `encoder=None` without images, and "
                "`(255 * image).astype(np.uint8)` for images between 0 and 1."
            )
        keys = jr.split(key, len(shapes))
        return ImpalaNetwork(
            [ImageNetwork(self, shape, dtype, k) for shape, k in zip(shapes, keys, strict=True)],
            shapes,
        )


ImpalaEncoder.__init__.__doc__ = """**Arguments:**

- `widths`: the number of channels of each stack of layers.
- `num_blocks`: the number of residual blocks of each.
- `output_size`: the number of features of an image.
- `layer_norm`: whether to normalise the channels of every pixel after the last stack, and
    the features.
"""


class ImpalaNetwork(eqx.Module):
    """What [`fisher_flow.ImpalaEncoder`][] makes."""

    networks: list["ImageNetwork"]  # one an image, in the order of the leaves
    shapes: tuple[tuple[int, ...], ...] = eqx.field(static=True)

    def __call__(self, observation: Observation) -> Float[Array, " features"]:
        leaves = jax.tree.leaves(observation)
        images = [leaf for leaf in leaves if is_image(leaf)]
        shapes = tuple(jnp.shape(image) for image in images)
        if shapes != self.shapes:
            raise ValueError(
                f"`observation` must have images of shapes {self.shapes}, for which the encoder "
                f"was made, but got {shapes or 'none'} in {eqx.tree_pformat(observation)}. If the "
                "encoder was made for a stack of frames, write "
                "`gymnasium.wrappers.FrameStackObservation(env, num_frames)` around the "
                "environment."
            )
        features = [f(x) for f, x in zip(self.networks, images, strict=True)]
        dtype = features[0].dtype
        others = [jnp.ravel(leaf).astype(dtype) for leaf in leaves if not is_image(leaf)]
        return jnp.concatenate([*features, *others])


class ImageNetwork(eqx.Module):
    """The features of one image."""

    stacks: list["Stack"]
    norms: tuple[eqx.nn.LayerNorm, eqx.nn.LayerNorm] | None
    last: eqx.nn.Linear

    def __init__(
        self, settings: ImpalaEncoder, shape: tuple[int, ...], dtype: Any, key: PRNGKeyArray
    ):
        *frames, height, width, colours = shape
        channels = [math.prod(frames) * colours, *settings.widths]
        *keys, last_key = jr.split(key, len(channels))
        self.stacks = []
        for fan_in, fan_out, k in zip(channels[:-1], channels[1:], keys, strict=True):
            self.stacks.append(Stack(fan_in, fan_out, settings.num_blocks, dtype, k))
            height, width = math.ceil(height / 2), math.ceil(width / 2)
        size = settings.output_size
        self.last = eqx.nn.Linear(height * width * channels[-1], size, dtype=dtype, key=last_key)
        norm = lambda size: eqx.nn.LayerNorm(size, dtype=dtype)
        self.norms = (norm(channels[-1]), norm(size)) if settings.layer_norm else None

    def __call__(self, image: UInt8[Array, "..."]) -> Float[Array, " features"]:
        if image.ndim == 4:  # the channels of all frames, side by side
            image = jnp.moveaxis(image, 0, -2).reshape(*image.shape[1:3], -1)
        x = image.astype(self.last.weight.dtype) / 255
        for stack in self.stacks:
            x = stack(x)
        x = jax.nn.relu(x)
        if self.norms is None:
            return jax.nn.relu(self.last(x.reshape(-1)))
        norm_pixel, norm_features = self.norms
        x = jax.vmap(jax.vmap(norm_pixel))(x)
        return jax.nn.relu(norm_features(self.last(x.reshape(-1))))


class Stack(eqx.Module):
    """A convolution, a pooling that halves the image, and residual blocks."""

    first: "Convolution"
    blocks: list[tuple["Convolution", "Convolution"]]

    def __init__(self, fan_in: int, fan_out: int, num_blocks: int, dtype: Any, key: PRNGKeyArray):
        first_key, *keys = jr.split(key, 1 + 2 * num_blocks)
        convolutions = [Convolution(fan_out, fan_out, dtype, k) for k in keys]
        self.first = Convolution(fan_in, fan_out, dtype, first_key)
        self.blocks = list(zip(convolutions[::2], convolutions[1::2], strict=True))

    def __call__(self, x: Float[Array, "height width channels"]) -> Float[Array, "..."]:
        x = self.first(x)
        x = lax.reduce_window(x, -jnp.inf, lax.max, (3, 3, 1), (2, 2, 1), "SAME")
        for first, second in self.blocks:
            x = x + second(jax.nn.relu(first(jax.nn.relu(x))))
        return x


class Convolution(eqx.Module):
    """A convolution by a kernel of 3 x 3, for images whose channels come last."""

    weight: Float[Array, "3 3 channels_in channels_out"]
    bias: Float[Array, " channels_out"]

    def __init__(self, fan_in: int, fan_out: int, dtype: Any, key: PRNGKeyArray):
        dtype = jnp.result_type(float) if dtype is None else dtype
        self.weight = jax.nn.initializers.glorot_uniform()(key, (3, 3, fan_in, fan_out), dtype)
        self.bias = jnp.zeros(fan_out, dtype)

    def __call__(
        self, x: Float[Array, "height width channels_in"]
    ) -> Float[Array, "height width channels_out"]:
        # In a loop, such as the training, XLA on CPUs takes up to a hundred times longer
        # for the gradient of a convolution: https://github.com/jax-ml/jax/issues/12868
        x = lax.platform_dependent(x, self.weight, cpu=_as_product, default=_as_convolution)
        return x + jnp.broadcast_to(self.bias, x.shape)


def _as_convolution(x: Array, weight: Array) -> Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x[None], weight, (1, 1), "SAME", dimension_numbers=layout)[0]


def _as_product(x: Array, weight: Array) -> Array:
    height, width, _ = x.shape
    padded = jnp.pad(x, ((1, 1), (1, 1), (0, 0)))
    neighbours = [padded[i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return jnp.concatenate(neighbours, axis=-1) @ weight.reshape(-1, weight.shape[-1])
