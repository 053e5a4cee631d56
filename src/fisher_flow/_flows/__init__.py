from ._bounds import TanhBounds as TanhBounds
from ._check_convention import check_convention as check_convention
from ._flow_matching import fit_flow as fit_flow, flow_matching_loss as flow_matching_loss
from ._foreign import BatchedVelocity as BatchedVelocity
from ._given import given as given
from ._mixture import GaussianMixtureVelocity as GaussianMixtureVelocity
from ._one_step_policy import OneStepPolicy as OneStepPolicy
from ._path import (
    AbstractAffineGaussianPath as AbstractAffineGaussianPath,
    CosinePath as CosinePath,
    LinearPath as LinearPath,
    VariancePreservingPath as VariancePreservingPath,
)
from ._policy import (
    AbstractFlowPolicy as AbstractFlowPolicy,
    AbstractPolicy as AbstractPolicy,
    as_flow_policy as as_flow_policy,
    changed as changed,
    FlowPolicy as FlowPolicy,
)
from ._prediction import (
    AbstractPrediction as AbstractPrediction,
    DataPrediction as DataPrediction,
    NoisePrediction as NoisePrediction,
    ReversedTime as ReversedTime,
    ReversedVelocity as ReversedVelocity,
    ScorePrediction as ScorePrediction,
    VPrediction as VPrediction,
)
