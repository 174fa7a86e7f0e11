"""Networks for text under compress: what is replaced, what is said of the rest, and that they still run."""

import pytest
import torch
from torch import nn

from tensorcomp_ext import compress, load, models, save
from tensorcomp_ext.nn import FactorizedEmbedding, FactorizedLayer, FactorizedLinear

TOKENS = torch.tensor([[2, 5, 9, 7, 3, 0, 0], [2, 11, 6, 3, 0, 0, 0], [2, 4, 8, 9, 10, 12, 3]])


def sentiment():
    return models.SentimentLSTM(60, dim=16, hidden=8)


def translator():
    return models.Translator(60, dim=16, heads=2, hidden=24, layers=2)


def decoder(tied):
    return models.Decoder(60, dim=16, hidden=24, layers=2, heads=4, kv_heads=2, tied=tied)


CASES = {
    "sentiment": (sentiment, (TOKENS,), "embedding", 1),
    "translator": (translator, (TOKENS, TOKENS[:, :4]), "embedding", 33),
    "decoder": (lambda: decoder(False), (TOKENS,), "tok_embeddings", 15),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("format", ["ttm", "tr_matrix"])
@pytest.mark.parametrize("inputs", [False, True])
def test_embeddings_are_replaced(name, format, inputs, tmp_path):
    make, example, layer, _ = CASES[name]
    torch.manual_seed(1)
    model = make().eval()
    result = compress(model, format, rank=4, layers=layer, example_inputs=example if inputs else None)
    small = result.model.get_submodule(layer)
    assert isinstance(small, FactorizedEmbedding) and small.format == format
    assert [entry.name for entry in result.report.replaced] == [layer]
    # What the network computes is what it computes with the table of the cores.
    dense = make().eval()
    dense.load_state_dict(model.state_dict())
    dense.get_submodule(layer).weight = nn.Parameter(small.to_dense().weight)
    torch.testing.assert_close(result.model(*example), dense(*example), rtol=1e-4, atol=1e-5)
    save(result.model, tmp_path / "net")
    again = load(tmp_path / "net", make().eval())
    assert torch.equal(again(*example), result.model(*example))


@pytest.mark.parametrize("name", CASES)
def test_everything_is_replaced_that_may_be(name):
    """Without example inputs, too, nothing is replaced whose weight another module reads."""
    make, example, layer, linear = CASES[name]
    torch.manual_seed(1)
    model = make().eval()
    expected = model(*example)
    # Ranks that lose nothing: the output must stay.
    result = compress(model, rank={layer: 16 * 60, "*": 60})
    found = [m for m in result.model.modules() if isinstance(m, FactorizedLinear)]
    assert len(found) == linear
    torch.testing.assert_close(result.model(*example), expected, rtol=1e-3, atol=1e-4)
    listed = {entry.name for entry in result.report.layers}
    for owner, module in model.named_modules():
        if any(p.dim() > 1 for p in module.parameters(recurse=False)):
            assert owner in listed, f"nothing says what became of {owner}"


def test_recurrent_weights_are_said_to_stay():
    model = sentiment()
    report = compress(model, rank=2).report
    entry = report["lstm"]
    assert entry.type == "LSTM" and entry.skipped == "recurrent: nn.LSTM takes its weights dense"
    weights = sum(p.numel() for k, p in model.lstm.named_parameters() if "weight" in k)
    assert entry.parameters_before == entry.parameters_after == weights
    assert report.parameters_before == sum(p.numel() for p in model.parameters())
    assert compress(model, rank=2, exclude="lstm").report["lstm"].skipped == "excluded"


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM, nn.GRUCell])
def test_recurrent_layers_of_every_kind(kind):
    model = nn.ModuleDict({"recurrent": kind(12, 8), "fc": nn.Linear(8, 8)})
    report = compress(model, rank=2).report
    assert [entry.name for entry in report.replaced] == ["fc"]
    assert report["recurrent"].skipped == f"recurrent: nn.{kind.__name__} takes its weights dense"


@pytest.mark.parametrize("sizes", [{}, {"kdim": 12, "vdim": 20}])
@pytest.mark.parametrize("inputs", [False, True])
def test_torchs_attention_still_runs(sizes, inputs):
    """It reads ``out_proj.weight`` instead of calling the layer, and holds the other weights itself."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True, **sizes)
            self.fc = nn.Linear(16, 16)

        def forward(self, q, k, v):
            return self.fc(self.attention(q, k, v)[0])

    model = Net().eval()
    x = (
        torch.randn(2, 5, 16),
        torch.randn(2, 7, sizes.get("kdim", 16)),
        torch.randn(2, 7, sizes.get("vdim", 16)),
    )
    result = compress(model, rank=3, example_inputs=x if inputs else None)
    assert isinstance(result.model.fc, FactorizedLinear)
    assert "reads their weights itself" in result.report["attention"].skipped
    assert "read by nn.MultiheadAttention" in result.report["attention.out_proj"].skipped
    kept = {k: p for k, p in model.attention.named_parameters() if "weight" in k and "out_proj" not in k}
    assert result.report["attention"].parameters_before == sum(p.numel() for p in kept.values())
    torch.testing.assert_close(result.model.attention(*x)[0], model.attention(*x)[0])
    assert result.model(*x).shape == (2, 5, 16)


def test_modules_that_are_whole_themselves():
    for module in (nn.LSTM(4, 4), nn.MultiheadAttention(4, 2)):
        for inplace in (False, True):
            with pytest.warns(UserWarning, match="nothing was replaced"):
                result = compress(module, rank=1, inplace=inplace)
            assert type(result.model) is type(module)


def test_tied_embedding_stays_dense_with_a_reason():
    model = decoder(True).eval()
    result = compress(model, rank=4)
    for name in ("tok_embeddings", "output"):
        assert "shared with" in result.report[name].skipped
    assert result.model.output.weight is result.model.tok_embeddings.weight
    replaced = [m for m in result.model.modules() if isinstance(m, FactorizedLayer)]
    assert len(replaced) == 14
    assert bool(torch.isfinite(result.model(TOKENS)).all())
