from .averaged_fisher import AveragedFisher as AveragedFisher
from .base import AbstractMetric as AbstractMetric
from .euclidean import Euclidean as Euclidean
from .fisher_rao import FisherRao as FisherRao
from .observed_information import ObservedInformation as ObservedInformation
from .score_outer_product import ScoreOuterProduct as ScoreOuterProduct
