from ._calibrate_score import (
    calibrate_score as calibrate_score,
    CalibratedScore as CalibratedScore,
)
from ._metric import (
    AbstractMetric as AbstractMetric,
    AveragedFisher as AveragedFisher,
    Euclidean as Euclidean,
    FisherRao as FisherRao,
    ObservedInformation as ObservedInformation,
    ScoreOuterProduct as ScoreOuterProduct,
)
from ._score import (
    AbstractScore as AbstractScore,
    PaperScore as PaperScore,
    PerturbedScore as PerturbedScore,
)
from ._transport_kl import TransportKL as TransportKL, TransportTerms as TransportTerms
