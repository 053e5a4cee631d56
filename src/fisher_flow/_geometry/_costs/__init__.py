from ._averaged_fisher import AveragedFisher as AveragedFisher
from ._cost import AbstractCost as AbstractCost, AbstractMetric as AbstractMetric
from ._euclidean import Euclidean as Euclidean
from ._fisher_rao import FisherRao as FisherRao
from ._observed_information import ObservedInformation as ObservedInformation
from ._score_outer_product import ScoreOuterProduct as ScoreOuterProduct
