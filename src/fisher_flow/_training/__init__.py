from ._fine_tune import fine_tune as fine_tune
from ._loggers import TensorBoard as TensorBoard, WeightsAndBiases as WeightsAndBiases
from ._train import train as train
from ._trained import Trained as Trained
