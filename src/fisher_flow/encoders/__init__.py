from ._encoder import (
    AbstractEncoder as AbstractEncoder,
    EncoderNetwork as EncoderNetwork,
    make_encoder as make_encoder,
)
from ._impala import ImpalaEncoder as ImpalaEncoder
