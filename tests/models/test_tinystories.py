"""The published weights and tokenizer of TinyStories: its perplexity, and files that are damaged."""

import math
import struct

import pytest
import torch
import torch.nn.functional as F

from tensorcomp_ext import data, models


@pytest.fixture(scope="module")
def folder(data_dir):
    path = data_dir / "weights" / "tinystories260k"
    if not path.is_dir():
        pytest.skip(f"no folder {path}; name the folder above weights/ in TENSORCOMP_DATA")
    return path


def test_published_perplexity(folder, data_dir):
    model = models.load_decoder(folder / "tinystories260k.pt").eval()
    tokenizer = data.LlamaTokenizer(folder / "tokenizer.bin")
    assert sum(p.numel() for p in model.parameters()) == 260_032 and len(tokenizer) == 512
    text = (data_dir / "text" / "tinystories_sample.txt").read_text(encoding="utf-8")
    loss, tokens = 0.0, 0
    for story in filter(None, (part.strip() for part in text.split("<|endoftext|>"))):
        numbers = torch.tensor([tokenizer.encode(story)])
        assert tokenizer.decode(numbers[0].tolist()) == f" {story}"
        with torch.inference_mode():
            logits = model(numbers[:, :-1])[0]
        loss += F.cross_entropy(logits.double(), numbers[0, 1:], reduction="sum").item()
        tokens += numbers.shape[1] - 1
    assert tokens == 1804
    assert math.exp(loss / tokens) == pytest.approx(3.548, abs=5e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_sizes_are_read_from_the_file(tmp_path, tied):
    source = models.Decoder(20, dim=12, hidden=10, layers=2, heads=3, kv_heads=1, tied=tied).eval()
    state = source.state_dict()
    if tied:
        del state["output.weight"]
    torch.save(state, tmp_path / "w.pt")
    model = models.load_decoder(tmp_path / "w.pt", heads=3).eval()
    tokens = torch.randint(20, (2, 5))
    assert torch.equal(model(tokens), source(tokens))
    assert (model.output.weight is model.tok_embeddings.weight) == tied


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*absent\.pt"):
        models.load_decoder(tmp_path / "absent.pt")
    path = tmp_path / "w.pt"
    torch.save(models.LeNet5().state_dict(), path)
    with pytest.raises(ValueError, match=r"w\.pt is for another network: no matrix tok_embeddings\.weight"):
        models.load_decoder(path)
    state = models.Decoder(20, dim=16, hidden=10, layers=2, heads=2, kv_heads=1).state_dict()
    torch.save(state, path)
    with pytest.raises(ValueError, match="heads must divide dim = 16"):
        models.load_decoder(path, heads=3)
    del state["layers.1.ffn_norm.weight"]
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"1 missing \['layers\.1\.ffn_norm\.weight'\]"):
        models.load_decoder(path, heads=2)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="truncated, damaged"):
        models.load_decoder(path, heads=2)


def tokenizer_bytes(more=(("he", -1.0), ("th", -3.0), (" t", -0.5), ("the", -2.0), ("é", -9.0))):
    tokens = [("<unk>", 0.0), ("\n<s>\n", 0.0), ("\n</s>\n", 0.0)]
    tokens += [(f"<0x{byte:02X}>", 0.0) for byte in range(256)]
    tokens += [(letter, -10.0) for letter in " eht"]
    content = struct.pack("<i", 6)
    for token, score in (*tokens, *more):
        spelled = token.encode()
        content += struct.pack("<fi", score, len(spelled)) + spelled
    return content


def test_merges_by_score(tmp_path):
    (tmp_path / "t.bin").write_bytes(tokenizer_bytes())
    tokenizer = data.LlamaTokenizer(tmp_path / "t.bin")
    spell = [tokenizer.tokens[n] for n in tokenizer.encode("the thé")]
    # " t" is best, twice; then "he" in the first word; nothing is left to merge in " thé".
    assert spell == [b"\n<s>\n", b" t", b"he", b" t", b"h", "é".encode()]
    assert tokenizer.decode(tokenizer.encode("the thé")) == " the thé"
    assert tokenizer.encode("") == [1]
    numbers = tokenizer.encode("xñ")  # in bytes: no token has these letters
    assert numbers[2:] == [byte + 3 for byte in "xñ".encode()]
    assert tokenizer.decode(numbers) == " xñ"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is truncated or no tokenizer"),
        (tokenizer_bytes()[:-1], "is truncated in token 267"),
        (tokenizer_bytes()[:-8], "is truncated in the header of token 267"),
        (tokenizer_bytes(())[:1000], "truncated"),
        (struct.pack("<ifi", 4, 0.0, -1), "token 0 has length -1"),
        (struct.pack("<ifi", 4, math.nan, 1) + b"a", "token 0 has length 1, score nan"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "no tokenizer of llama2.c: token 0"),
    ],
)
def test_damaged_tokenizers(tmp_path, content, message):
    (tmp_path / "t.bin").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.LlamaTokenizer(tmp_path / "t.bin")
