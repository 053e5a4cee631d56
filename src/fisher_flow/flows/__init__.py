from ._flow_matching import fit_flow as fit_flow, flow_matching_loss as flow_matching_loss
from ._path import (
    AbstractAffineGaussianPath as AbstractAffineGaussianPath,
    LinearPath as LinearPath,
)
from ._policy import (
    AbstractFlowPolicy as AbstractFlowPolicy,
    AbstractPolicy as AbstractPolicy,
    as_flow_policy as as_flow_policy,
    FlowPolicy as FlowPolicy,
)
from ._velocity import (
    GaussianMixtureVelocity as GaussianMixtureVelocity,
    VelocityMLP as VelocityMLP,
)
