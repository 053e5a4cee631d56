from ._damped_solve import (
    damped_matrix as damped_matrix,
    damped_solve as damped_solve,
    mean_eigenvalue as mean_eigenvalue,
)
from ._jacobian import (
    rademacher_probes as rademacher_probes,
    value_and_divergence as value_and_divergence,
    value_and_jacobian as value_and_jacobian,
)
from ._krylov import (
    dense_limit as dense_limit,
    KrylovPositivePart as KrylovPositivePart,
    trace_and_log_det as trace_and_log_det,
    value_and_projections as value_and_projections,
)
from ._positive_part import smooth_positive_part as smooth_positive_part
from ._whitening import (
    whiten_samples as whiten_samples,
    WhitenedOperator as WhitenedOperator,
    Whitening as Whitening,
)
