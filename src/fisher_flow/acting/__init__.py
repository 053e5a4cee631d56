from ._actor import Actor as Actor
from ._export import export_sampler as export_sampler
