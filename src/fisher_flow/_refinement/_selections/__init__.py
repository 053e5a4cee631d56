from ._best_of import BestOf as BestOf
from ._resample import Resample as Resample
from ._selection import AbstractSelection as AbstractSelection, flow_underneath as flow_underneath
