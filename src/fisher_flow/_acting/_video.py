import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, TYPE_CHECKING

import numpy as np

from .._checks import check_positive_integer
from ._rollout import Episodes, labelled, replaying_actor, success_of


if TYPE_CHECKING:
    import gymnasium


def record_video(
    policy: Any,
    env: "gymnasium.Env",
    path: str | os.PathLike[str],
    *,
    seed: int | np.integer = 0,
    every: int = 1,
    max_steps: int = 10_000,
) -> Episodes:
    """Plays one episode and writes a video of it.

    With the seed of an episode of [`fisher_flow.rollout`][] it plays that episode again. So you can
    look at the worst of many: `record_video(policy, env, "worst.gif",
    seed=episodes.seeds[np.argmin(episodes.returns)])`. An MP4 is the smallest file, and its frames
    are written one by one.

    **Arguments:**

    - `policy`: any policy, as for [`fisher_flow.Actor`][].
    - `env`: one environment, made with `render_mode="rgb_array"`.
    - `path`: the file to write: `.mp4`, `.gif`, `.webp` or `.png`. An `.mp4` needs PyAV, and the
        others need Pillow: `pip install av pillow`.

    **Other arguments:**

    - `seed`: the seed of the episode.
    - `every`: the number of steps from frame to frame. All frames are held in memory, except for
        an MP4: raise this number for long episodes.
    - `max_steps`: the number of steps after which the recording stops.

    **Returns:**

    The [`fisher_flow.Episodes`][] of this one episode.

    **Raises:**

    - `ValueError` if the environment renders no frames, or `path` has another ending.
    - `ImportError` if the library that writes such a file is not installed.
    """
    check_positive_integer("every", every, 1)
    check_positive_integer("max_steps", max_steps, 10_000)
    if getattr(env, "num_envs", None) is not None or env.render_mode != "rgb_array":
        raise ValueError(
            f"`env` must be a single environment that renders frames, but got `{env!r}` with "
            f"`render_mode={env.render_mode!r}`. Write "
            '`env=gymnasium.make("Pendulum-v1", render_mode="rgb_array")`.'
        )
    path = Path(path)
    if path.suffix not in (".mp4", ".gif", ".webp", ".png"):
        raise ValueError(
            "`path` must end in `.mp4`, `.gif`, `.webp` or `.png`, but got "
            f'`{str(path)}`. Write `path="{path.with_suffix(".gif")}"`.'
        )
    write = _write_mp4 if path.suffix == ".mp4" else _write_picture
    actor = replaying_actor(policy, env)
    total, length, info = 0.0, 0, {}

    def frames():
        nonlocal total, length, info
        observation, info = env.reset(seed=int(seed))
        yield np.asarray(env.render())
        done = False
        while not done and length < max_steps:
            action = actor(labelled(seed, length, observation))
            observation, reward, terminated, truncated, info = env.step(action)
            total, length, done = total + float(reward), length + 1, terminated or truncated
            if length % every == 0 or done:
                yield np.asarray(env.render())

    rate = (getattr(env, "metadata", None) or {}).get("render_fps") or 30
    write(path, frames(), Fraction(rate).limit_denominator(1000) / every)
    success = success_of({name: [value] for name, value in info.items()}, 0)
    return Episodes(*map(np.array, ([total], [length], [success], [int(seed)])))


def _write_picture(path: Path, frames: Iterator[np.ndarray], rate: Fraction) -> None:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            f"`{path.suffix}` files are written by Pillow, which is not installed. Write "
            '`pip install "fisher_flow[video]"`.'
        ) from error
    first, *rest = map(Image.fromarray, frames)
    first.save(path, save_all=True, append_images=rest, duration=round(1000 / rate), loop=0)


def _write_mp4(path: Path, frames: Iterator[np.ndarray], rate: Fraction) -> None:
    try:
        import av
    except ImportError as error:
        raise ImportError(
            "`.mp4` files are written by PyAV, which is not installed. Write "
            f'`pip install "fisher_flow[video]"`, or `path="{path.with_suffix(".gif")}"`.'
        ) from error
    with av.open(str(path), "w") as file:
        stream: Any = None
        for frame in frames:
            height, width = frame.shape[:2]
            # Players want colours at half the resolution, so both sides have to be even.
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), "edge")
            if stream is None:
                stream = file.add_stream("h264", rate=rate)
                stream.height, stream.width = frame.shape[:2]
                stream.pix_fmt = "yuv420p"
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
