"""Packed low-rank + sparse weights: what finalizing keeps, positions, sizes, files that lie."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from sparse_cases import every_case, every_mode, expected, made
from torch.utils._python_dispatch import TorchDispatchMode

from tensorcomp_ext.formats import LowRankSparse, PackedLowRankSparse
from tensorcomp_ext.ops import pack_sparse


@every_case
@every_mode
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 1.0])
def test_finalized_is_the_same_weight(case: Any, mode: str, share: float) -> None:
    weight = made(case, mode, share)
    packed = weight.finalized()
    torch.testing.assert_close(packed.to_dense().detach(), expected(weight), rtol=0, atol=1e-13)
    assert packed.nnz == weight.nnz and packed.rank == weight.rank and packed.shape == weight.shape
    stored = sum(t.numel() * t.element_size() for t in packed.state_dict().values())
    assert packed.stored_bytes == weight.stored_bytes == stored
    assert packed.finalized() is packed
    with torch.no_grad():  # no memory is shared
        for factor in weight.factors:
            factor.zero_()
    assert share == 0.0 or packed.to_dense().norm() > 0


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_masking_becomes_additive(dtype: torch.dtype, tolerance: float) -> None:
    weight = made(("tt", (40, 30), 4, {}), "masking", dtype=torch.float64).to(dtype)
    dense = expected(copy.deepcopy(weight).double())
    assert (weight.finalized().to_dense().double() - dense).norm() < tolerance * dense.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-3, 0.0])
def test_masking_is_rounded_beside_the_low_rank_part(dtype: torch.dtype, size: float) -> None:
    """However small S is: by no more than an entry of L and one of S are rounded."""
    weight = made(("svd", (40, 30), 4, {}), "masking", dtype=torch.float64).to(dtype)
    with torch.no_grad():
        weight.sparse.mul_(size)
    low = weight.low_rank_dense().detach().double()
    sparse, kept = weight.sparse.detach().double(), weight.kept
    packed = weight.finalized()
    eps, scale = torch.finfo(dtype).eps, low.abs() + sparse.abs()
    stored = packed.sparse_dense().detach().double()
    assert ((stored - (sparse - low))[kept].abs() <= eps / 2 * scale[kept]).all()
    found = packed.to_dense().detach().double()
    assert ((found - sparse)[kept].abs() <= eps * scale[kept]).all()
    assert torch.equal(found[~kept], low[~kept])


@pytest.mark.parametrize("share,kind", [(0.02, "columns"), (0.2, "bitmap")])
@pytest.mark.parametrize("shape", [(40, 130), (12, 5, 3, 3)])
def test_the_smaller_positions_are_taken(share: float, kind: str, shape: tuple[int, ...]) -> None:
    sizes = {}
    weight = made(("svd", shape, 2, {}), share=share)
    packed = weight.finalized()
    assert packed.structure["positions"] == kind
    rows, columns = packed.matrix_shape
    assert packed.offsets.numel() == rows + 1
    values = weight.sparse.detach()
    for positions in ("bitmap", "columns"):
        sparse = pack_sparse(values, weight.kept.reshape(rows, columns), positions=positions)
        other = PackedLowRankSparse(packed.low_rank, sparse, shape)
        assert torch.equal(other.to_dense(), packed.to_dense())
        sizes[positions] = other.stored_bytes
    assert packed.stored_bytes == min(sizes.values()) and sizes["bitmap"] != sizes["columns"]


def test_rows_of_more_than_65536_columns() -> None:
    sparse = torch.zeros(2, 70_000)
    sparse[0, [0, 65_535, 65_536, 69_999]] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    sparse[1, 65_537] = 5.0
    weight = LowRankSparse(None, sparse.clone(), sparse != 0)
    packed = weight.finalized()
    assert packed.structure["positions"] == "columns" and torch.equal(packed.to_dense(), sparse)
    assert packed.stored_bytes == weight.stored_bytes == 5 * 4 + 5 * 2 + 4 * 5


def test_gradients_of_packed_values() -> None:
    for share in (0.02, 0.3):
        packed = made(("tucker2", (12, 7, 3, 3), (3, 2), {}), share=share).finalized()
        gradient = torch.randn(packed.shape, dtype=torch.float64)
        found = torch.autograd.grad(packed.to_dense(), packed.values, gradient)[0]
        kept = made(("tucker2", (12, 7, 3, 3), (3, 2), {}), share=share).kept
        assert torch.equal(found, gradient[kept])


class Largest(TorchDispatchMode):
    """Dtypes of the tensors made that have as many entries as the weight, or more."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.entries, self.dtypes = entries, set[torch.dtype]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.numel() >= self.entries:
            self.dtypes.add(found.dtype)
        return found


def test_bits_are_unpacked_in_graphs_and_without() -> None:
    """The same weight and gradient, and no wide index for every entry of the weight."""
    packed = made(("none", (12, 7, 3, 3), (), {}), share=0.3).finalized()
    assert packed.positions.dtype == torch.uint8
    gradient, saved = torch.randn(packed.shape, dtype=torch.float64), list[torch.Tensor]()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        dense = packed.sparse_dense()
    assert saved and all(t.numel() <= packed.nnz for t in saved)
    expected = torch.autograd.grad(dense, packed.values, gradient)[0]
    rebuilt = torch.compile(packed.sparse_dense, backend="aot_eager", fullgraph=True)()
    with Largest(dense.numel()) as largest:
        traced = packed.sparse_dense()
    assert torch.int32 in largest.dtypes and torch.int64 not in largest.dtypes
    for other in (rebuilt, traced):
        assert torch.equal(other, dense)
        assert torch.equal(torch.autograd.grad(other, packed.values, gradient)[0], expected)
    several = torch.stack([packed.values.detach(), 2 * packed.values.detach()])
    mapped = torch.vmap(lambda v: torch.func.functional_call(Rebuilt(packed), {"weight.values": v}, ()))
    assert torch.equal(mapped(several), torch.stack([dense, 2 * dense]).detach())


class Rebuilt(torch.nn.Module):
    def __init__(self, weight: PackedLowRankSparse) -> None:
        super().__init__()
        self.weight = weight

    def forward(self) -> torch.Tensor:
        return self.weight.sparse_dense()


def test_one_shot_compression_keeps_the_largest() -> None:
    torch.manual_seed(0)
    dense = torch.randn(30, 40, dtype=torch.float64)
    packed = PackedLowRankSparse.from_dense(dense, 5, density=0.1)
    residual = dense - packed.low_rank.to_dense().detach()
    assert packed.nnz == 120
    left = dense - packed.to_dense().detach()
    kept = left == 0
    assert int((residual.abs() >= residual.abs().flatten().sort(descending=True).values[119]).sum()) == 120
    assert left.abs().max() <= residual.abs()[~kept].max()
    assert left.norm() < residual.norm()
    assert PackedLowRankSparse.from_dense(dense, 5, nnz=7).nnz == 7
    assert PackedLowRankSparse.from_dense(dense, 5, nnz=0).to_dense().norm() > 0


@pytest.mark.parametrize("nnz", [0, 1, 17, 540])
def test_empty_weights_have_valid_positions(nnz: int) -> None:
    """Positions that nobody has loaded yet must not lead a kernel astray."""
    for positions in (None, "bitmap", "columns"):
        made_empty = PackedLowRankSparse.random((12, 5, 3, 3), 2, nnz=nnz, positions=positions)
        assert made_empty.nnz == nnz and int((made_empty.sparse_dense() != 0).sum()) == nnz
        structure = made_empty.structure
        meta = PackedLowRankSparse.empty((12, 5, 3, 3), made_empty.rank, device="meta", **structure)
        for name, tensor in made_empty.state_dict().items():
            twin = meta.state_dict()[name]
            assert twin.shape == tensor.shape and twin.dtype == tensor.dtype


def test_copies() -> None:
    packed = made(("tt", (15, 14), 2, {})).finalized()
    for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(twin.to_dense(), packed.to_dense())
    assert packed.bfloat16().positions.dtype in (torch.uint8, torch.int16)


# --- state from elsewhere ----------------------------------------------------------------------------------


def packed_columns() -> PackedLowRankSparse:
    packed: PackedLowRankSparse = made(("svd", (20, 60), 2, {}), share=0.03).finalized()
    assert packed.positions.dtype == torch.int16
    return packed


def spoiled(name: str, change: Any, packed: PackedLowRankSparse) -> dict[str, torch.Tensor]:
    state = {key: value.clone() for key, value in packed.state_dict().items()}
    change(state[name])
    return state


@pytest.mark.parametrize(
    "name,change,message",
    [
        ("positions", lambda t: t.__setitem__(3, 60), "must be columns below 60"),
        ("positions", lambda t: t.fill_(0), "must ascend within every row"),
        ("offsets", lambda t: t.__setitem__(-1, 10**6), "must begin with 0 and end with nnz"),
        ("offsets", lambda t: t.__setitem__(1, 10**6), "must not descend"),
    ],
)
def test_positions_outside_the_weight_are_refused(name: str, change: Any, message: str) -> None:
    packed = packed_columns()
    before = {key: value.clone() for key, value in packed.state_dict().items()}
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=message):
            packed.load_state_dict(spoiled(name, change, packed), strict=strict)
    assert torch.equal(packed.positions, before["positions"])
    assert torch.equal(packed.offsets, before["offsets"])


def test_bits_that_offsets_do_not_count_are_refused() -> None:
    packed = made(("svd", (20, 60), 2, {}), share=0.3).finalized()
    assert packed.positions.dtype == torch.uint8
    with pytest.raises(RuntimeError, match="as many bits as"):
        packed.load_state_dict(spoiled("positions", lambda t: t[0].zero_(), packed))


def test_other_numbers_of_values_are_refused() -> None:
    packed, other = packed_columns(), made(("svd", (20, 60), 2, {}), share=0.01).finalized()
    with pytest.raises(RuntimeError, match="size mismatch for values"):
        packed.load_state_dict(other.state_dict())


def test_misfit_parts_are_named() -> None:
    sparse = packed_columns().packed
    with pytest.raises(ValueError, match=r"sparse must be \[20, 61\], got \(20, 60\)"):
        PackedLowRankSparse(None, sparse, (20, 61))
    with pytest.raises(ValueError, match="shape is needed without a low-rank part"):
        PackedLowRankSparse(None, sparse)
    bent = sparse.offsets.clone()
    bent[1] = bent[-1] + 1
    with pytest.raises(ValueError, match="must not descend"):
        PackedLowRankSparse(None, sparse._replace(offsets=bent), (20, 60))
    entries = math.prod((6, 5))
    with pytest.raises(ValueError, match=rf"nnz must be an int in \[0, {entries}\], got 31"):
        PackedLowRankSparse.empty((6, 5), 2, nnz=31)
    with pytest.raises(ValueError, match=r"density must be a float in \[0, 1\], got 2"):
        PackedLowRankSparse.empty((6, 5), 2, density=2)
    with pytest.raises(ValueError, match="positions must be 'bitmap' or 'columns', got 'rows'"):
        PackedLowRankSparse.empty((6, 5), 2, positions="rows")
