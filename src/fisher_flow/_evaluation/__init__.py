from ._intervals import (
    bootstrap_interval as bootstrap_interval,
    interquartile_mean as interquartile_mean,
    paired_difference as paired_difference,
    PairedDifference as PairedDifference,
    performance_profile as performance_profile,
)
from ._normalised_score import normalised_score as normalised_score
from ._results import Results as Results
