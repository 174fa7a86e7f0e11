"""Low-rank decompositions of weight tensors: truncated SVD, HOSVD, HOOI and Tucker-2.

All arithmetic is in float64 on the CPU whatever the dtype and device of the weight; results are cast to them
last. Wide unfoldings are reduced to a Gram matrix block by block and are never decomposed, or copied to
float64, as a whole.
"""

from .svd import SVDFactors, TruncatedSVD, singular_values, svd_factors, truncated_svd
from .tucker import HOOIResult, HOSVDResult, Tucker2Factors, hooi, hosvd, tucker2
from .unfolding import DecompositionError, unfold

__all__ = [
    "DecompositionError",
    "HOOIResult",
    "HOSVDResult",
    "SVDFactors",
    "TruncatedSVD",
    "Tucker2Factors",
    "hooi",
    "hosvd",
    "singular_values",
    "svd_factors",
    "truncated_svd",
    "tucker2",
    "unfold",
]
