"""Transformer layers: parameter counts, shapes, what they compute."""

import pytest
import torch

from tensorcomp_ext.models import GatedMLP, ViTBlock


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_parameter_counts():
    with torch.device("meta"):
        assert count(ViTBlock()) == 1_774_464
        assert count(ViTBlock(192, 3)) == 444_864
        assert count(GatedMLP()) == 3 * 4096 * 11008 == 135_266_304


def test_linear_macs_of_a_block():
    with torch.device("meta"):
        weights = sum(p.numel() for p in ViTBlock().parameters() if p.dim() == 2)
    assert round(197 * weights / 1e6) == 349


def test_block_by_hand():
    torch.manual_seed(0)
    block = ViTBlock(12, 3, 20).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    normed = torch.nn.functional.layer_norm(x, (12,), eps=1e-6)
    q, k, v = (t.reshape(2, 5, 3, 4) for t in block.attn.qkv(normed).split(12, dim=-1))
    weights = (torch.einsum("nthd,nshd->nhts", q, k) / 2.0).softmax(-1)
    mixed = torch.einsum("nhts,nshd->nthd", weights, v).reshape(2, 5, 12)
    z = x + block.attn.proj(mixed)
    normed = torch.nn.functional.layer_norm(z, (12,), eps=1e-6)
    expected = z + block.mlp.fc2(torch.nn.functional.gelu(block.mlp.fc1(normed)))
    torch.testing.assert_close(block(x), expected)


def test_gated_mlp_by_hand():
    torch.manual_seed(0)
    mlp, x = GatedMLP(6, 10), torch.randn(3, 2, 6)
    gate, up = x @ mlp.gate_proj.weight.t(), x @ mlp.up_proj.weight.t()
    torch.testing.assert_close(mlp(x), (gate * gate.sigmoid() * up) @ mlp.down_proj.weight.t())


def test_heads_must_divide():
    with pytest.raises(ValueError, match="heads must divide dim = 10, got 3"):
        ViTBlock(10, 3)
