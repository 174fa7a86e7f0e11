"""How much memory an embedding takes that has a table of a quarter of a gigabyte, were it formed."""

from __future__ import annotations

import pytest
import torch
from embedding_problems import EmbeddingCase

from tensorcomp_ext.bench.memory import peak_bytes
from tensorcomp_ext.ops import ttm_embedding, ttm_embedding_bag

pytestmark = pytest.mark.native

CASE = EmbeddingCase((100, 100, 100), (4, 4, 4), (1, 16, 16), 0, (4096,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peak_memory_is_that_of_factors_and_output(isa: str, dtype: torch.dtype) -> None:
    cores = [core.requires_grad_() for core in CASE.cores(dtype)]
    indices = CASE.indices()
    factors = sum(core.numel() for core in cores) * 4  # what a piece holds of them is in float32
    output = 4096 * 64 * cores[0].element_size()
    pieces = torch.get_num_threads()
    with torch.no_grad():
        held = peak_bytes(lambda: ttm_embedding(indices, cores, num_embeddings=CASE.rows, backend="native"))
    assert output <= held <= output + 1.1 * pieces * factors
    y = ttm_embedding(indices, cores, num_embeddings=CASE.rows, backend="native")
    dy = torch.randn_like(y)
    held = peak_bytes(lambda: torch.autograd.grad(y, cores, dy, retain_graph=True))
    assert held <= factors + 1.1 * 3 * pieces * factors


def test_a_bag_holds_no_row_twice() -> None:
    cores = CASE.cores()
    indices = CASE.indices() % 1000
    with torch.no_grad():
        held = peak_bytes(lambda: ttm_embedding_bag(indices.reshape(64, 64), cores, num_embeddings=CASE.rows))
    rows, factors = 1000 * 64 * 4, sum(core.nbytes for core in cores)
    assert held <= rows + 64 * 64 * 4 + 1.1 * torch.get_num_threads() * factors + 16 * indices.nbytes
