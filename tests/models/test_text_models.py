"""Networks of the text experiments: counts of the papers, what they compute, padding."""

import math

import pytest
import torch
import torch.nn.functional as F

from tensorcomp_ext import models
from tensorcomp_ext.formats import get_format
from tensorcomp_ext.models.decoder import rotated
from tensorcomp_ext.models.sentiment import lengths_of
from tensorcomp_ext.models.translation import positions
from tensorcomp_ext.nn import FactorizedEmbedding


def count(model):
    return sum(p.numel() for p in model.parameters())


def table(vocabulary, dim, name, rank, out_modes, in_modes):
    given = {"format": name, "rank": rank, "in_modes": in_modes, "out_modes": out_modes, "device": "meta"}
    return FactorizedEmbedding(vocabulary, dim, 0, **given)


def test_sst5_counts():
    """5.20 M dense, of which 4.40 M are the table; 24,128 in TTM cores of rank 16, 182 times fewer."""
    with torch.device("meta"):
        model = models.SentimentLSTM(17_200)
    assert count(model.lstm) == 790_528 and count(model.fc) == 1_285
    assert count(model) == 5_195_013 and round(count(model) / 1e6, 2) == 5.20
    small = table(17_200, 256, "ttm", 16, (10, 10, 12, 15), (4, 4, 4, 4))
    assert count(small) == 640 + 10_240 + 12_288 + 960 == 24_128
    assert round(count(model.embedding) / count(small)) == 182


@pytest.mark.parametrize(("rank", "parameters"), [(32, 786_432), (27, 559_872), (1, 768)])
def test_iwslt_counts(rank, parameters):
    """65.13 M dense, 49.14 M with the table in a ring of rank 32."""
    with torch.device("meta"):
        model = models.Translator()
    assert count(model) == 65_130_496 and round(count(model) / 1e6, 2) == 65.13
    ring = table(32_768, 512, "tr_matrix", rank, (32, 32, 32), (8, 8, 8))
    assert count(ring) == parameters == 768 * rank**2
    model.embedding = ring
    if rank == 32:
        assert count(model) == 49_139_712 and round(count(model) / 1e6, 2) == 49.14
        assert round(16_777_216 / count(ring), 2) == 21.33


def test_ranks_of_the_sst5_table_are_not_clipped():
    shapes = get_format("ttm", "embedding").factor_shapes(
        (17_200, 256), 16, in_modes=(4, 4, 4, 4), out_modes=(10, 10, 12, 15)
    )
    assert [tuple(s) for s in shapes] == [(1, 10, 4, 16), (16, 10, 4, 16), (16, 12, 4, 16), (16, 15, 4, 1)]


@pytest.fixture
def sentiment():
    return models.SentimentLSTM(30, 3, dim=6, hidden=5, layers=2, dropout=0.5).double().eval()


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("extra", [0, 1, 7])
def test_padding_changes_nothing(sentiment, given, extra):
    rows = [[4, 5, 6, 7], [8], [9, 3, 5], [7, 7]]
    alone = torch.cat([sentiment(torch.tensor([row])) for row in rows])
    tokens = torch.zeros(len(rows), 4 + extra, dtype=torch.int64)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = torch.tensor(row)
    lengths = torch.tensor([len(row) for row in rows]) if given else None
    torch.testing.assert_close(sentiment(tokens, lengths), alone)


def test_lengths_decide_where_they_are_given(sentiment):
    """Tokens behind the end are not read, whatever they are."""
    tokens = torch.tensor([[4, 5, 6, 7]])
    shorter = sentiment(tokens, torch.tensor([2]))
    torch.testing.assert_close(shorter, sentiment(torch.tensor([[4, 5]])))
    assert not torch.allclose(shorter, sentiment(tokens))


def test_sentiment_by_hand(sentiment):
    """One direction forward over the sentence, the other backward, each cell written out."""
    tokens = torch.tensor([4, 9, 7])
    x = sentiment.embedding.weight[tokens]  # [3, 6]
    for layer in range(2):
        outputs = []
        for suffix in ("", "_reverse"):
            w_x, w_h, b_x, b_h = (
                getattr(sentiment.lstm, f"{kind}_l{layer}{suffix}")
                for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            h = c = torch.zeros(5, dtype=torch.float64)
            seen = []
            for row in x.flip(0) if suffix else x:
                i, f, g, o = (w_x @ row + b_x + w_h @ h + b_h).chunk(4)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                seen.append(h)
            outputs.append(torch.stack(seen[::-1] if suffix else seen))
        x = torch.cat(outputs, dim=1)
    expected = sentiment.fc(torch.cat([x[-1, :5], x[0, 5:]]))
    torch.testing.assert_close(sentiment(tokens[None])[0], expected)


def test_empty_batches_and_sentences(sentiment):
    assert sentiment(torch.zeros(0, 4, dtype=torch.int64)).shape == (0, 3)
    nothing = sentiment(torch.zeros(2, 0, dtype=torch.int64))
    torch.testing.assert_close(nothing, sentiment(torch.zeros(2, 3, dtype=torch.int64)))
    assert lengths_of(torch.tensor([[3, 0, 4, 0], [0, 0, 0, 0]]), 0).tolist() == [3, 0]


def test_row_of_padding_takes_no_gradient(sentiment):
    sentiment.train()(torch.tensor([[4, 0, 5]])).sum().backward()
    gradient = sentiment.embedding.weight.grad
    assert gradient[0].abs().sum() == 0 and gradient[4].abs().sum() > 0


@pytest.fixture
def translator():
    torch.manual_seed(0)
    return models.Translator(20, dim=8, heads=2, hidden=12, layers=2).double().eval()


def test_translator_ignores_padding_and_the_future(translator):
    source = torch.tensor([[5, 6, 7, 0, 0], [8, 9, 4, 6, 7]])
    target = torch.tensor([[2, 5, 6, 0], [2, 7, 8, 9]])
    together = translator(source, target)
    torch.testing.assert_close(together[0, :3], translator(source[:1, :3], target[:1, :3])[0])
    changed = target.clone()
    changed[1, 3] = 11
    later = translator(source, changed)
    torch.testing.assert_close(later[1, :3], together[1, :3])
    assert not torch.allclose(later[1, 3], together[1, 3])


def test_translator_against_torchs_layers(translator):
    """The same weights in nn.TransformerEncoderLayer and DecoderLayer."""

    def attention(theirs, ours):
        for name, tensor in (("in_proj_weight", "weight"), ("in_proj_bias", "bias")):
            parts = [getattr(layer, tensor) for layer in (ours.query, ours.key, ours.value)]
            getattr(theirs, name).data.copy_(torch.cat(parts))
        theirs.out_proj.load_state_dict(ours.out.state_dict())

    def layer(kind, ours):
        theirs = kind(8, 2, 12, 0.0, batch_first=True, dtype=torch.float64).eval()
        attention(theirs.self_attn, ours.attention)
        if hasattr(theirs, "multihead_attn"):
            attention(theirs.multihead_attn, ours.cross)
        theirs.linear1.load_state_dict(ours.fc1.state_dict())
        theirs.linear2.load_state_dict(ours.fc2.state_dict())
        for number, norm in enumerate(ours.norms, 1):
            norm.weight.data.uniform_(0.5, 2)
            norm.bias.data.normal_()
            getattr(theirs, f"norm{number}").load_state_dict(norm.state_dict())
        return theirs

    source = torch.tensor([[5, 6, 7, 0, 0], [8, 9, 4, 6, 7]])
    target = torch.tensor([[2, 5, 6, 9], [2, 7, 8, 9]])

    def embedded(tokens):
        return translator.embedding(tokens) * math.sqrt(8) + positions(tokens.shape[1], 8).double()

    memory, hidden = embedded(source), source == 0
    encoders = [layer(torch.nn.TransformerEncoderLayer, ours) for ours in translator.encoder]
    decoders = [layer(torch.nn.TransformerDecoderLayer, ours) for ours in translator.decoder]
    for encode in encoders:
        memory = encode(memory, src_key_padding_mask=hidden)
    x, future = embedded(target), torch.ones(4, 4, dtype=torch.bool).triu(1)
    for decode in decoders:
        x = decode(x, memory, tgt_mask=future, memory_key_padding_mask=hidden)
    torch.testing.assert_close(translator(source, target), translator.output(x))


def test_positions_by_hand():
    found = positions(5, 6)
    for p in range(5):
        for i in range(3):
            angle = p / 10_000 ** (2 * i / 6)
            assert found[p, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert found[p, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_greedy_is_the_argmax_of_each_step(translator):
    source = torch.tensor([[5, 6, 7, 0], [8, 9, 4, 6], [4, 0, 0, 0]])
    found = translator.greedy(source, begin=2, end=3, max_length=6)
    tokens = torch.full((3, 1), 2)
    for _ in range(found.shape[1]):
        tokens = torch.cat([tokens, translator(source, tokens)[:, -1].argmax(1, keepdim=True)], 1)
    for row, expected in zip(found.tolist(), tokens[:, 1:].tolist(), strict=True):
        stop = expected.index(3) + 1 if 3 in expected else len(expected)
        assert row == expected[:stop] + [0] * (len(row) - stop)
    assert found.shape[1] == 6 or bool((found == 3).any(1).all())


def test_greedy_stops_where_all_have_ended(translator):
    with torch.no_grad():
        translator.output.bias[3] = 1e6
    assert translator.greedy(torch.tensor([[5, 6], [7, 0]]), 2, 3, 50).tolist() == [[3], [3]]
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        translator.greedy(torch.tensor([[5]]), 2, 3, 0)


def test_sources_of_padding_alone_are_finite(translator):
    out = translator(torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[2, 4], [2, 5]]))
    assert bool(torch.isfinite(out).all())
    assert translator(torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 2, dtype=torch.int64)).shape == (
        0,
        2,
        20,
    )


def test_decoder_by_hand():
    torch.manual_seed(0)
    model = models.Decoder(11, dim=8, hidden=6, layers=1, heads=2, kv_heads=1, tied=False).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    tokens = torch.tensor([[3, 1, 7]])

    def normed(x, norm):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight

    x = model.tok_embeddings.weight[tokens[0]]
    block = model.layers[0]
    h = normed(x, block.attention_norm)
    q, k, v = (h @ layer.weight.T for layer in (block.attention.wq, block.attention.wk, block.attention.wv))

    def turn(y):
        y = torch.view_as_complex(y.reshape(3, 2, 2))
        angles = torch.outer(torch.arange(3.0, dtype=torch.float64), torch.tensor([1.0, 0.01]).double())
        return torch.view_as_real(y * torch.polar(torch.ones_like(angles), angles)).flatten(1)

    heads = []
    for head in range(2):
        scores = turn(q[:, 4 * head : 4 * head + 4]) @ turn(k).T / 2
        scores = scores.masked_fill(torch.ones(3, 3).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(1) @ v)
    x = x + torch.cat(heads, 1) @ block.attention.wo.weight.T
    h = normed(x, block.ffn_norm)
    mlp = block.feed_forward
    x = x + (F.silu(h @ mlp.w1.weight.T) * (h @ mlp.w3.weight.T)) @ mlp.w2.weight.T
    expected = normed(x, model.norm) @ model.output.weight.T
    torch.testing.assert_close(model(tokens)[0], expected, rtol=1e-6, atol=1e-6)


def test_rotation_keeps_lengths_and_sees_distances_alone():
    x, y = torch.randn(2, 1, 8, dtype=torch.float64)
    angles = torch.outer(torch.arange(9.0), torch.tensor([1.0, 0.1, 0.01, 0.001])).double()

    def at(z, place):
        return rotated(z, angles[place : place + 1].cos(), angles[place : place + 1].sin())

    torch.testing.assert_close((at(x, 2) * at(y, 5)).sum(), (at(x, 5) * at(y, 8)).sum())
    torch.testing.assert_close(at(x, 7).norm(), x.norm())


def test_decoder_counts_and_ties():
    assert count(models.Decoder()) == 260_032
    assert count(models.Decoder(tied=False)) == 260_032 + 512 * 64
    model = models.Decoder()
    assert model.output.weight is model.tok_embeddings.weight


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: models.SentimentLSTM(0), "vocabulary must be at least 1, got 0"),
        (lambda: models.SentimentLSTM(9, dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
        (lambda: models.SentimentLSTM(9)(torch.tensor([1])), r"tokens must be \[N, T\], got \[1\]"),
        (
            lambda: models.SentimentLSTM(9)(torch.tensor([[1]]), torch.tensor([1, 1])),
            r"lengths must be \[1\]",
        ),
        (lambda: models.Translator(9, dim=10, heads=4), "multiple of heads = 4, got 10"),
        (lambda: models.Translator(9, layers=0), "layers must be at least 1"),
        (lambda: models.Decoder(dim=24, heads=8), r"multiple of 2 \* heads = 16, got 24"),
        (lambda: models.Decoder(kv_heads=3), "kv_heads must divide heads = 8, got 3"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
