"""Low-rank decompositions of weight tensors: SVD, Tucker, tensor trains, tensor rings and CP.

All arithmetic is in float64 on the CPU whatever the dtype and device of the weight; results are cast to them
last. Wide unfoldings are reduced to a Gram matrix block by block and are never decomposed, or copied to
float64, as a whole.
"""

from .chain_ranks import ring_ranks, train_ranks
from .cp import CP, cp_als
from .factor_pair import SVDFactors, svd_factors
from .masked import MaskedFit, masked_fit
from .randomized import RandomizedSVD, randomized_svd
from .svd import TruncatedSVD, singular_values, truncated_svd
from .tensor_ring import TensorRing, tensor_ring, tr_als, tr_matrix, tr_svd
from .tensor_train import TensorTrain, tt_svd, ttm_svd
from .tucker import HOOIResult, HOSVDResult, Tucker2Factors, hooi, hosvd, tucker2
from .tucker_all import Tucker, tucker
from .unfolding import DecompositionError, unfold
from .weighted import WeightedFit, weighted_fit

__all__ = [
    "CP",
    "DecompositionError",
    "HOOIResult",
    "HOSVDResult",
    "MaskedFit",
    "RandomizedSVD",
    "SVDFactors",
    "TensorRing",
    "TensorTrain",
    "TruncatedSVD",
    "Tucker",
    "Tucker2Factors",
    "WeightedFit",
    "cp_als",
    "hooi",
    "hosvd",
    "masked_fit",
    "randomized_svd",
    "ring_ranks",
    "singular_values",
    "svd_factors",
    "tensor_ring",
    "tr_als",
    "tr_matrix",
    "tr_svd",
    "train_ranks",
    "truncated_svd",
    "tt_svd",
    "ttm_svd",
    "tucker",
    "tucker2",
    "unfold",
    "weighted_fit",
]
