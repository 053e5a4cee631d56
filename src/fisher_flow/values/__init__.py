from ._aggregate import Ensemble as Ensemble, LowerConfidenceBound as LowerConfidenceBound
from ._categorical import CategoricalCritic as CategoricalCritic
from ._critic import fit_critic as fit_critic, QEnsemble as QEnsemble
from ._temporal_difference import TemporalDifference as TemporalDifference
