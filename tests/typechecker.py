"""The run-time type checker of the suite: beartype, with the rule of PEP 484 that `float` admits
integers."""

from beartype import beartype, BeartypeConf


typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))
