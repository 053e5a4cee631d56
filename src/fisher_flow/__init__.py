"""Refines flow-matching policies by a critic, within a KL measured from their own velocity."""

from .acting import Actor as Actor, export_sampler as export_sampler
from .evaluation import evaluate as evaluate
from .flows import (
    AbstractAffineGaussianPath as AbstractAffineGaussianPath,
    AbstractFlowPolicy as AbstractFlowPolicy,
    AbstractPolicy as AbstractPolicy,
    AbstractPrediction as AbstractPrediction,
    BatchedVelocity as BatchedVelocity,
    check_convention as check_convention,
    CosinePath as CosinePath,
    DataPrediction as DataPrediction,
    fit_flow as fit_flow,
    flow_matching_loss as flow_matching_loss,
    FlowPolicy as FlowPolicy,
    GaussianMixtureVelocity as GaussianMixtureVelocity,
    LinearPath as LinearPath,
    NoisePrediction as NoisePrediction,
    ReversedTime as ReversedTime,
    ReversedVelocity as ReversedVelocity,
    ScorePrediction as ScorePrediction,
    TanhBounds as TanhBounds,
    VariancePreservingPath as VariancePreservingPath,
    VelocityMLP as VelocityMLP,
    VPrediction as VPrediction,
)
from .geometry import (
    AbstractMetric as AbstractMetric,
    AbstractScore as AbstractScore,
    AveragedFisher as AveragedFisher,
    calibrate_score as calibrate_score,
    CalibratedScore as CalibratedScore,
    Euclidean as Euclidean,
    FisherRao as FisherRao,
    ObservedInformation as ObservedInformation,
    PaperScore as PaperScore,
    PerturbedScore as PerturbedScore,
    ScoreOuterProduct as ScoreOuterProduct,
    TransportKL as TransportKL,
    TransportTerms as TransportTerms,
)
from .refinement import (
    AbstractDisplacement as AbstractDisplacement,
    AbstractRefinement as AbstractRefinement,
    AbstractSelection as AbstractSelection,
    BestOf as BestOf,
    Certificate as Certificate,
    certify as certify,
    NaturalStep as NaturalStep,
    refine as refine,
    RefinedPolicy as RefinedPolicy,
    Resample as Resample,
    Residual as Residual,
)
from .values import (
    CategoricalCritic as CategoricalCritic,
    Ensemble as Ensemble,
    fit_critic as fit_critic,
    LowerConfidenceBound as LowerConfidenceBound,
    QEnsemble as QEnsemble,
)
