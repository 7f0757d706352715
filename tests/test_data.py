"""Packing and order: every document once, an end-of-document token after each, the same samples for any topology."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.corpus import write_corpus
from tptrain.config import UserError, load_config
from tptrain.data.order import TokenData, shuffled
from tptrain.data.packing import prepare

EOD = 256


def pack(folder: Path, *overrides: str) -> Path:
    config = load_config([f"data.cache_dir={folder}/cache", *overrides])
    return prepare(config.data)


def tokens(packed: Path, part: str = "train") -> list[int]:
    return np.fromfile(packed / f"{part}.bin", json.loads((packed / "meta.json").read_text())["dtype"]).tolist()


def documents(packed: Path) -> list[str]:
    """Every document of the two parts; one that was cut between them is whole again."""
    text = tokens(packed, "train") + tokens(packed, "validation")
    assert text[-1] == EOD
    read_back: list[str] = []
    while text:
        end = text.index(EOD)
        read_back.append(bytes(text[:end]).decode())
        text = text[end + 1 :]
    return read_back


def test_each_document_is_packed_once_and_some_are_held_out(tmp_path: Path) -> None:
    file = write_corpus(tmp_path)
    packed = pack(tmp_path, "data=files", f"data.files=[{file}]", "data.validation_fraction=0.1")
    written = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    assert sorted(documents(packed)) == sorted(written)
    assert 3 <= tokens(packed, "validation").count(EOD) <= 20


@pytest.mark.parametrize("kind", ["txt", "json", "parquet", "hub"])
def test_every_source_gives_the_same_tokens(tmp_path: Path, kind: str) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    texts = [f"document {i}: ü and 漢字" for i in range(100)]
    source = tmp_path / "source"
    source.mkdir()
    overrides = ["data=files", f"data.files=[{source}/*.{kind}]", "data.text_column=words"]
    if kind == "txt":
        for i, text in enumerate(texts):
            (source / f"{i:03d}.txt").write_text(text)
    elif kind == "json":
        (source / "all.json").write_text(json.dumps([{"words": text, "other": 1} for text in texts]))
    else:
        parquet.write_table(arrow.table({"words": texts}), source / "train.parquet")
        if kind == "hub":  # a data set by name: `datasets` takes a local folder as well as a name on the hub
            overrides = ["data=hub", f"data.name={source}", "data.text_column=words"]
    assert sorted(documents(pack(tmp_path, *overrides))) == sorted(texts)


def test_a_tokenizer_json_is_used(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    file = write_corpus(tmp_path)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False)
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    packed = pack(tmp_path, "data=files", f"data.files=[{file}]", f"data.tokenizer={tmp_path}/tokenizer.json")
    ids = tokens(packed)
    assert ids.count(0) + tokens(packed, "validation").count(0) == len(texts)
    assert tokenizer.decode(ids[: ids.index(0)]).replace("Ġ", " ").replace(" ", "") == texts[0].replace(" ", "")


def test_a_single_document_is_held_out_at_its_end(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("0123456789" * 100)
    packed = pack(tmp_path, "data=files", f"data.files=[{tmp_path}/one.txt]", "data.validation_fraction=0.1")
    assert bytes(tokens(packed)).decode() == "0123456789" * 90 + "0"
    assert tokens(packed, "validation")[-1] == EOD
    assert len(tokens(packed, "validation")) == 100


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_the_shuffle_is_a_permutation(count: int) -> None:
    order = [shuffled(i, count, "0/0") for i in range(count)]
    assert sorted(order) == list(range(count))
    if count > 100:
        assert order != sorted(order)
        assert order != [shuffled(i, count, "0/1") for i in range(count)], "each epoch has its own order"
        assert abs(float(np.corrcoef(order, range(count))[0, 1])) < 0.1


def test_samples_depend_on_seed_and_index_alone(tmp_path: Path) -> None:
    packed = pack(tmp_path, "data=files", f"data.files=[{write_corpus(tmp_path)}]")
    data = TokenData(packed, seq_len=32, seed=3)
    whole = data.samples(0, 3 * len(data.train))  # three epochs
    assert whole.shape == (3 * len(data.train), 33)
    for epoch in np.split(whole[:, 0:32], 3):  # each epoch has every sequence once
        assert len(np.unique(epoch, axis=0)) == len(np.unique(whole[: len(data.train), 0:32], axis=0))
    parts = np.concatenate([data.samples(start, 5) for start in range(100, 120, 5)])
    assert np.array_equal(parts, whole[100:120])
    assert not np.array_equal(TokenData(packed, 32, seed=4).samples(0, 8), whole[:8])


def test_packing_is_done_once_and_a_half_done_one_anew(tmp_path: Path) -> None:
    file = write_corpus(tmp_path)
    packed = pack(tmp_path, "data=files", f"data.files=[{file}]")
    first = (packed / "train.bin").stat().st_mtime_ns
    assert pack(tmp_path, "data=files", f"data.files=[{file}]") == packed
    assert (packed / "train.bin").stat().st_mtime_ns == first
    (packed / "meta.json").unlink()  # as if it had died before the end
    (packed / "train.bin").write_bytes(b"half")
    pack(tmp_path, "data=files", f"data.files=[{file}]")
    assert len(documents(packed)) == 100


def test_data_that_is_too_small_or_empty_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short")
    packed = pack(tmp_path, "data=files", f"data.files=[{tmp_path}/short.txt]")
    with pytest.raises(UserError, match=r"train\.seq_len=32"):
        TokenData(packed, 32, 0)
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match="Nothing to train on"):
        pack(tmp_path, "data=files", f"data.files=[{tmp_path}/blank.jsonl]")
    (tmp_path / "cut.jsonl").write_text('{"text": "whole"}\n{"text": "cu')
    with pytest.raises(UserError, match=r"cut\.jsonl.*cannot read"):
        pack(tmp_path, "data=files", f"data.files=[{tmp_path}/cut.jsonl]")
    (tmp_path / "number.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(UserError, match="holds int, not text"):
        pack(tmp_path, "data=files", f"data.files=[{tmp_path}/number.jsonl]")
    with pytest.raises(UserError, match=r"data\.name=no/such"):
        pack(tmp_path, "data=hub", "data.name=no/such")
