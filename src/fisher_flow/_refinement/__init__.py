from ._absorb import absorb as absorb
from ._certificate import Certificate as Certificate, Verdict as Verdict
from ._certify import certify as certify
from ._chain import refine_chain as refine_chain, RefinementChain as RefinementChain
from ._distill import distill as distill
from ._exact_resample import ExactResample as ExactResample
from ._fidelity import Fidelity as Fidelity, Refit as Refit
from ._guided_policy import ClassifierFree as ClassifierFree, guide as guide, Guided as Guided
from ._method import (
    AbstractDisplacement as AbstractDisplacement,
    AbstractRefinement as AbstractRefinement,
    Reached as Reached,
)
from ._natural_step import NaturalStep as NaturalStep
from ._plot_refinement import plot_refinement as plot_refinement
from ._potentials import (
    AbstractPotential as AbstractPotential,
    PosteriorMean as PosteriorMean,
    ProjectedAction as ProjectedAction,
    TiltedAction as TiltedAction,
    TimeWeighted as TimeWeighted,
)
from ._refine import refine as refine
from ._refined_policy import RefinedPolicy as RefinedPolicy
from ._residual import (
    at_radius as at_radius,
    NetworkDisplacement as NetworkDisplacement,
    Residual as Residual,
)
from ._selections import (
    AbstractSelection as AbstractSelection,
    BestOf as BestOf,
    Resample as Resample,
)
from ._steering import SteeredPolicy as SteeredPolicy, Steering as Steering
from ._witness import Witness as Witness
