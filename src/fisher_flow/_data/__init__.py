from ._columns import single_precision as single_precision
from ._d4rl import load_d4rl as load_d4rl
from ._minari import load_minari as load_minari
from ._normaliser import Normaliser as Normaliser
from ._ogbench import load_ogbench as load_ogbench
from ._random_crop import RandomCrop as RandomCrop
from ._stored import (
    checksum as checksum,
    is_mapped as is_mapped,
    open_transitions as open_transitions,
    save_transitions as save_transitions,
    stored_record as stored_record,
)
from ._transitions import TooShortError as TooShortError, Transitions as Transitions
