from ._action_mlp import ActionMLP as ActionMLP, zero_network as zero_network
from ._encoder import (
    AbstractEncoder as AbstractEncoder,
    encode as encode,
    EncoderNetwork as EncoderNetwork,
    make_encoder as make_encoder,
)
from ._impala import ImpalaEncoder as ImpalaEncoder
from ._q_network import QNetwork as QNetwork, ValueNetwork as ValueNetwork
from ._velocity_mlp import VelocityMLP as VelocityMLP
