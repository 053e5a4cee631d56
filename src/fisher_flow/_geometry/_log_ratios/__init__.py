from ._density_log_ratio import DensityLogRatio as DensityLogRatio
from ._executed_log_ratio import (
    check_steps as check_steps,
    executed_draw as executed_draw,
    executed_log_prob as executed_log_prob,
    ExecutedLogRatio as ExecutedLogRatio,
    has_executed_steps as has_executed_steps,
)
from ._log_ratio import (
    AbstractLogRatio as AbstractLogRatio,
    mean_log_ratio as mean_log_ratio,
    SteeredAction as SteeredAction,
    SteeredPair as SteeredPair,
)
from ._path_log_ratio import PathLogRatio as PathLogRatio
