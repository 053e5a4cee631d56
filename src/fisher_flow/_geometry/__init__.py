from ._calibration import (
    calibrate as calibrate,
    calibrate_score as calibrate_score,
    CalibratedScore as CalibratedScore,
    has_open_score as has_open_score,
    is_open as is_open,
    measure_whitening as measure_whitening,
    unsettled_score as unsettled_score,
)
from ._constant_entries import (
    constant_entries as constant_entries,
    constants_at as constants_at,
    free_constant_entries as free_constant_entries,
)
from ._continuous_time import (
    continuous_flow as continuous_flow,
    in_continuous_time as in_continuous_time,
    with_flow as with_flow,
)
from ._costs import (
    AbstractCost as AbstractCost,
    AbstractMetric as AbstractMetric,
    AveragedFisher as AveragedFisher,
    Euclidean as Euclidean,
    FisherRao as FisherRao,
    ObservedInformation as ObservedInformation,
    ScoreOuterProduct as ScoreOuterProduct,
)
from ._log_ratios import (
    AbstractLogRatio as AbstractLogRatio,
    check_steps as check_steps,
    DensityLogRatio as DensityLogRatio,
    executed_draw as executed_draw,
    executed_log_prob as executed_log_prob,
    ExecutedLogRatio as ExecutedLogRatio,
    has_executed_steps as has_executed_steps,
    mean_log_ratio as mean_log_ratio,
    PathLogRatio as PathLogRatio,
    SteeredAction as SteeredAction,
    SteeredPair as SteeredPair,
)
from ._score import (
    AbstractScore as AbstractScore,
    PaperScore as PaperScore,
    PerturbedScore as PerturbedScore,
)
from ._transport_kl import TransportKL as TransportKL, TransportTerms as TransportTerms
