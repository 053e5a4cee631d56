from ._critic import fit_critic as fit_critic, QEnsemble as QEnsemble
