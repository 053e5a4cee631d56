from ._aggregate import Ensemble as Ensemble, LowerConfidenceBound as LowerConfidenceBound
from ._categorical import CategoricalCritic as CategoricalCritic
from ._critic_learner import CriticLearner as CriticLearner
from ._critic_learning import AbstractCriticLearning as AbstractCriticLearning
from ._fit_critic import fit_critic as fit_critic
from ._hl_gauss import CategoricalEnsemble as CategoricalEnsemble, HLGauss as HLGauss
from ._q_ensemble import QEnsemble as QEnsemble
from ._temporal_difference import TemporalDifference as TemporalDifference
from ._value_flow import FlowEnsemble as FlowEnsemble, ValueFlow as ValueFlow
