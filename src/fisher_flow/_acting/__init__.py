from ._actor import Actor as Actor
from ._export import export_sampler as export_sampler
from ._rollout import (
    collect as collect,
    Episodes as Episodes,
    evaluate as evaluate,
    rollout as rollout,
)
from ._video import record_video as record_video
