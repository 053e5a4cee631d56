from typing import Any

import jax
import jax.core
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree


_MOST_CHANNELS = 32  # of one frame: colours, or a few frames side by side


def is_image(leaf: Any, num_batch_axes: int = 0) -> bool:
    """Whether a leaf of an observation is an image, or a stack of frames: `uint8`, of shape
    `(height, width, channels)` or `(frames, height, width, channels)`. Refuses an image whose last
    axis is too long for channels, or whose first axis is short enough for channels."""
    if jnp.ndim(leaf) - num_batch_axes not in (3, 4) or leaf.dtype != np.uint8:
        return False
    shape = jnp.shape(leaf)[num_batch_axes:]
    if shape[-1] > _MOST_CHANNELS or shape[-3] <= 4 < min(shape[-2:]):
        raise ValueError(
            "`observation` must have images of shape (height, width, channels) or (frames, height, "
            f"width, channels), the channels last and at most {_MOST_CHANNELS}, but got shape "
            f"{shape}. For channels that come first write `np.moveaxis(image, -3, -1)`; for "
            "greyscale images `image[..., None]`, and `GrayscaleObservation(env, keep_dim=True)` "
            "before `FrameStackObservation`."
        )
    return True


def refuse_images(observation: PyTree[Any], example: str) -> None:
    """Refuses images where a network would flatten them."""
    for path, leaf in jax.tree.leaves_with_path(observation):
        if leaf.dtype == np.uint8 and jnp.ndim(leaf) == 2 and min(jnp.shape(leaf)) > 4:
            raise ValueError(
                f"`observation{jax.tree_util.keystr(path)}` looks like a greyscale image, of shape "
                f"{jnp.shape(leaf)}. Write `image[..., None]`, or "
                "`GrayscaleObservation(env, keep_dim=True)`, and "
                f"`{example}`. If it is not an image, write `observation.astype(np.float32)`."
            )
        if is_image(leaf):
            raise ValueError(
                f"`observation{jax.tree_util.keystr(path)}` is an image, of shape "
                f"{jnp.shape(leaf)}, and would be flattened to {jnp.size(leaf)} entries. Write "
                f"`{example}`."
            )
