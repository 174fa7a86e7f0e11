"""Text sets: files of the official layouts written by hand, then damaged; the real ones where they are."""

import gzip
import lzma
from itertools import pairwise

import pytest
import torch

from tensorcomp_ext import data
from tensorcomp_ext.data.vocabulary import END, PAD, UNKNOWN

TRAIN = "4 a good , good film\n0 dull\n2 a film\n"
DEV = "1 a bad film\n3 good\n"


def rows(sequences):
    return [sequences.padded(torch.tensor([i]))[0][0].tolist() for i in range(len(sequences))]


def write_sst(folder, train=TRAIN, dev=DEV, name="sst5"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}_train.txt").write_text(train, encoding="utf-8")
    (folder / f"{name}_dev.txt").write_text(dev, encoding="utf-8")


@pytest.mark.parametrize("folder", [".", "sst5"])
def test_sentences(tmp_path, folder):
    write_sst(tmp_path / folder)
    dataset = data.load_text("sst5", tmp_path)
    assert dataset.tested == "dev" and len(dataset.classes) == 5
    assert dataset.vocabulary.tokens[4:] == ("a", "film", "good", ",", "dull")
    assert rows(dataset.train) == [[4, 6, 7, 6, 5], [8], [4, 5]]
    assert rows(dataset.test) == [[4, UNKNOWN, 5], [6]]
    assert dataset.train_labels.tolist() == [4, 0, 2] and dataset.test_labels.tolist() == [1, 3]


def test_vocabulary_is_of_training_sentences_alone(tmp_path):
    write_sst(tmp_path, dev="1 excellent\n")
    assert "excellent" not in data.load_text("sst5", tmp_path).vocabulary.tokens


def test_test_split_comes_before_dev_and_can_be_asked_for(tmp_path):
    write_sst(tmp_path)
    (tmp_path / "sst5_test.txt").write_text("0 film\n")
    assert data.load_text("sst5", tmp_path).tested == "test"
    assert len(data.load_text("sst5", tmp_path, test="dev").test) == 2
    with pytest.raises(ValueError, match="sst5: test must be one of test, dev, got 'valid'"):
        data.load_text("sst5", tmp_path, test="valid")
    (tmp_path / "sst5_dev.txt").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"neither sst5_dev\.txt nor sst5_dev\.txt\.gz nor sst5_dev\.txt\.xz"
    ):
        data.load_text("sst5", tmp_path, test="dev")


def test_sentences_are_held_out_where_no_split_is_there(tmp_path):
    text = "".join(f"{i % 6} question{i} ?\n" for i in range(40))
    (tmp_path / "trec_train.txt").write_text(text)
    first, second = data.load_text("trec", tmp_path), data.load_text("trec", tmp_path)
    assert (len(first.train), len(first.test), first.tested) == (36, 4, "held out of train")
    assert rows(first.train) == rows(second.train) and rows(first.test) == rows(second.test)
    # Questions of the test have a word each that no other has: the vocabulary must not know it.
    assert all(UNKNOWN in row for row in rows(first.test))
    for row, label in zip(rows(first.train), first.train_labels.tolist(), strict=True):
        assert int(first.vocabulary.tokens[row[0]].removeprefix("question")) % 6 == label


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("5 too large", r"line 4 must begin with a label 0\.\.4, got '5'"),
        ("-1 negative", "line 4 must begin with a label"),
        ("², superscript", "line 4 must begin with a label"),
        ("great film", "line 4 must begin with a label 0..4, got 'great'"),
        ("3", "line 4 has no sentence"),
        ("", "line 4 must begin with a label"),
    ],
)
def test_wrong_lines_are_named(tmp_path, line, message):
    write_sst(tmp_path, train=f"{TRAIN}{line}\n1 last\n")
    with pytest.raises(ValueError, match=rf"sst5_train\.txt, {message}"):
        data.load_text("sst5", tmp_path)


def test_bytes_that_are_no_text(tmp_path):
    write_sst(tmp_path)
    (tmp_path / "sst5_dev.txt").write_bytes(b"1 caf\xc3\xa9\n2 caf\xe9 latin\n")
    with pytest.raises(ValueError, match=r"sst5_dev\.txt, line 2 is not UTF-8"):
        data.load_text("sst5", tmp_path)
    (tmp_path / "sst5_dev.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"sst5_dev\.txt is empty"):
        data.load_text("sst5", tmp_path)


def test_line_ends_of_windows_and_none_at_the_end(tmp_path):
    write_sst(tmp_path)
    expected = rows(data.load_text("sst5", tmp_path).train)
    (tmp_path / "sst5_train.txt").write_bytes(TRAIN.strip().replace("\n", "\r\n").encode())
    assert rows(data.load_text("sst5", tmp_path).train) == expected


PACKERS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}


def write_multi30k(folder, ending="", **changed):
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "train.de": "Ein Mann läuft.\nEine Frau singt!\n",
        "train.en": "A man runs.\nA woman sings!\n",
        "test_2016_flickr.de": "Ein Hund läuft.\n",
        "test_2016_flickr.en": "A Dog runs.\n",
    } | changed
    for name, text in files.items():
        (folder / f"{name}{ending}").write_bytes(PACKERS[ending](text.encode()))


@pytest.mark.parametrize("ending", PACKERS)
def test_translations(tmp_path, ending):
    write_multi30k(tmp_path / "multi30k", ending)
    dataset = data.load_text("multi30k", tmp_path)
    words = dataset.vocabulary.tokens
    words_of_both = "ein mann läuft . eine frau singt ! a man runs woman sings"
    assert set(words[4:]) == set(words_of_both.split())
    spelled = [[words[i] for i in row] for row in rows(dataset.train_source)]
    assert spelled == [["ein", "mann", "läuft", "."], ["eine", "frau", "singt", "!"]]
    assert [words[i] for i in rows(dataset.test_target)[0]] == ["a", "<unk>", "runs", "."]
    assert dataset.references == ("a dog runs.",)
    assert data.load_text("multi30k", tmp_path, min_count=2).vocabulary.tokens[4:] == ("!", ".", "a")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train.en": "One line.\n"}, r"train\.de has 2 lines but .*train\.en has 1"),
        ({"train.de": "Eine Zeile.\n \n"}, r"train\.de, line 2 is empty"),
        ({"test_2016_flickr.en": ""}, r"test_2016_flickr\.en is empty"),
    ],
)
def test_wrong_translations(tmp_path, changed, message):
    write_multi30k(tmp_path, **changed)
    with pytest.raises(ValueError, match=message):
        data.load_text("multi30k", tmp_path)


@pytest.mark.parametrize("ending", [".gz", ".xz"])
def test_damaged_packing(tmp_path, ending):
    write_multi30k(tmp_path, ending)
    path = tmp_path / f"train.de{ending}"
    whole = path.read_bytes()
    for damaged in (whole[:-9], b"no such format" + whole):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"train\.de\{ending} is truncated or damaged"):
            data.load_text("multi30k", tmp_path)


def test_running_text(tmp_path):
    (tmp_path / "tinyshakespeare.txt").write_text("First Citizen:\nSpeak, speak.\n\n" * 4)
    dataset = data.load_text("tinyshakespeare", tmp_path)
    text = "First Citizen:\nSpeak, speak.\n\n" * 4
    spelled = "".join(dataset.vocabulary.tokens[i] for i in dataset.train.tolist())
    assert text.startswith(spelled) and len(dataset.test) == len(text) // 10
    with pytest.raises(ValueError, match="tinyshakespeare: test must be one of none"):
        data.load_text("tinyshakespeare", tmp_path, test="valid")


def test_words_of_wikitext(tmp_path):
    (tmp_path / "wikitext2_valid.txt").write_text(" = Title = \n a <unk> word\n" * 5)
    dataset = data.load_text("wikitext2", tmp_path)
    assert len(dataset.train) + len(dataset.test) == 40 and len(dataset.test) == 4
    a, word = dataset.vocabulary.encode(["a", "word"])
    assert dataset.train.tolist()[4:7] == [a, UNKNOWN, word] and a != UNKNOWN
    (tmp_path / "wikitext2_train.txt").write_text(" a word\n")
    dataset = data.load_text("wikitext2", tmp_path)
    assert dataset.vocabulary.tokens[4:] == ("<eos>", "a", "word")
    assert dataset.test.tolist()[:4] == [UNKNOWN, UNKNOWN, UNKNOWN, 4]
    assert dataset.test.tolist()[4:8] == [5, UNKNOWN, 6, 4]


def test_unknown_name_and_missing_folder(tmp_path):
    with pytest.raises(ValueError, match="unknown text set 'imdb'; known: sst5, sst2, trec, multi30k"):
        data.load_text("imdb", tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        data.load_text("sst5", tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"neither sst5_train\.txt"):
        data.load_text("sst5", tmp_path)


def test_vocabulary():
    sentences = [["b", "a", "c"], ["a", "<pad>", "<unk>"], ["b", "a"]]
    vocabulary = data.Vocabulary.build(sentences)
    assert vocabulary.tokens == ("<pad>", "<unk>", "<s>", "</s>", "a", "b", "c")
    # What the text spells out is no special token.
    assert vocabulary.encode(["<pad>", "</s>", "c", "?"]) == [UNKNOWN, UNKNOWN, 6, UNKNOWN]
    assert vocabulary.decode([2, 4, PAD, 6, END, 5]) == ["a", "c"]
    assert len(data.Vocabulary.build(sentences, max_size=5)) == 5
    for arguments, message in (
        ({"min_count": 0}, "min_count"),
        ({"max_size": 4}, "max_size must be above 4"),
    ):
        with pytest.raises(ValueError, match=message):
            data.Vocabulary.build(sentences, **arguments)
    with pytest.raises(ValueError, match="'a' twice"):
        data.Vocabulary(["a", "b", "a"])
    with pytest.raises(ValueError, match="'<s>' twice"):
        data.Vocabulary(["<s>"])


def test_sequences():
    sequences = data.Sequences.of([[5, 6, 7], [], [8], [9, 4]])
    padded, lengths = sequences.padded(torch.tensor([2, 0, 1, 2]), pad=-1)
    assert padded.tolist() == [[8, -1, -1], [5, 6, 7], [-1, -1, -1], [8, -1, -1]]
    assert lengths.tolist() == [1, 3, 0, 1]
    assert rows(sequences.select(torch.tensor([3, 1, 0]))) == [[9, 4], [], [5, 6, 7]]
    empty, none = sequences.padded(torch.tensor([], dtype=torch.int64))
    assert empty.shape == (0, 0) and none.shape == (0,)
    assert len(data.Sequences.of([])) == 0
    with pytest.raises(ValueError, match="offsets must rise from 0 to the number of tokens, 2"):
        data.Sequences(torch.tensor([1, 2]), torch.tensor([0, 2, 1]))
    with pytest.raises(ValueError, match=r"tokens must be int64 of one dimension, got torch\.float32"):
        data.Sequences(torch.zeros(2), torch.tensor([0, 2]))


@pytest.mark.parametrize(("size", "tokens"), [(3, None), (None, 12), (3, 12), (1, None), (None, 1)])
def test_batches_by_length(size, tokens):
    lengths = torch.randint(1, 9, (41,), generator=torch.Generator().manual_seed(1))
    batches = data.batches_by_length(lengths, size=size, tokens=tokens)
    assert sorted(torch.cat(batches).tolist()) == list(range(41))
    longest = [int(lengths[batch].max()) for batch in batches]
    assert longest == sorted(longest)
    for batch, length in zip(batches, longest, strict=True):
        assert size is None or len(batch) <= size
        assert tokens is None or len(batch) == 1 or len(batch) * length <= tokens
    # No batch could take the shortest of the next one, too.
    for batch, following in pairwise(batches):
        count, length = len(batch) + 1, int(lengths[following].min())
        assert (size is not None and count > size) or (tokens is not None and count * length > tokens)


def test_batches_need_a_limit():
    assert data.batches_by_length(torch.tensor([], dtype=torch.int64), size=2) == []
    with pytest.raises(ValueError, match="size or tokens is needed"):
        data.batches_by_length(torch.tensor([1]))
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        data.batches_by_length(torch.tensor([1]), tokens=0)


@pytest.mark.parametrize(
    ("name", "train", "test", "tokens"),
    [
        ("sst5", 8544, 1101, 16_583),
        ("sst2", 6920, 872, None),
        ("trec", 4907, 545, None),
        ("multi30k", 29_000, 1000, None),
    ],
)
def test_real_files(data_dir, name, train, test, tokens):
    folder = data_dir / "text"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}; name the folder above it in TENSORCOMP_DATA")
    try:
        dataset = data.load_text(name, folder)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    sides = (
        (dataset.train_source, dataset.test_source) if name == "multi30k" else (dataset.train, dataset.test)
    )
    assert tuple(map(len, sides)) == (train, test)
    assert tokens is None or len(dataset.vocabulary) == tokens
    assert all(int(side.lengths.min()) >= 1 for side in sides)


def test_tokens_outside_the_vocabulary():
    words = data.Vocabulary(["a", "b"])  # tokens 0..5
    inside, outside = data.Sequences.of([[4, 5]]), data.Sequences.of([[4, 6]])
    labels = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"s: test tokens must be in 0\.\.5, got 4\.\.6"):
        data.SentenceDataset("s", inside, labels, outside, labels, words, ("x",))
    with pytest.raises(ValueError, match=r"t: train_target tokens must be in 0\.\.5, got 4\.\.6"):
        data.TranslationDataset("t", inside, outside, inside, inside, ("a b",), words)
    with pytest.raises(ValueError, match=r"t: test_source tokens must be in 0\.\.5, got -1\.\.4"):
        data.TranslationDataset("t", inside, inside, data.Sequences.of([[4, -1]]), inside, ("a b",), words)
