"""A data set packed once into two flat files of token ids: documents end to end, each with an end-of-document token."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import filelock
import numpy as np
import xxhash
from numpy.typing import NDArray
from tqdm import tqdm

from tptrain.config import UserError
from tptrain.config.load import write_atomically
from tptrain.config.schema import DataConfig
from tptrain.config.validate import data_files
from tptrain.data.sources import documents
from tptrain.data.tokenizer import tokenizer

FORMAT_VERSION = 2


def prepare(config: DataConfig, say: Callable[[str], None] = print, alive: Callable[[], None] = lambda: None) -> Path:
    """Pack the data set unless that is done already, and return its folder.

    Safe to run from several jobs at once; leaves all or nothing.
    """
    folder = packed_folder(config)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.cache_dir={config.cache_dir}: cannot be made ({error.strerror}).") from error
    with filelock.FileLock(f"{folder}.lock"):
        if (folder / "meta.json").exists():
            return folder
        shutil.rmtree(folder, ignore_errors=True)  # what a packing that died left behind
        folder.mkdir()
        try:
            say(f"packing the {config.source} data into {folder}, once")
            _pack(config, folder, say, alive)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return folder


def packed_folder(config: DataConfig) -> Path:
    """The cache folder of this data set: its name is a digest of all that decides the tokens."""
    identity: dict[str, object] = {
        "version": FORMAT_VERSION,
        "source": config.source,
        "name": config.name,
        "subset": config.subset,
        "split": config.split,
        "column": config.text_column,
        "eod": config.eod_token,
        "validation": config.validation_fraction,
        "tokenizer": "bytes",
    }
    files = data_files(config) if config.source == "files" else []
    if config.source == "hub" and Path(config.name or "").is_dir():  # a data set by name may be a local folder
        files = [file for file in sorted(Path(config.name or "").rglob("*")) if file.is_file()]
    identity["files"] = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    if config.bos_token is not None:
        identity["bos"] = config.bos_token
    if config.tokenizer != "bytes":
        identity["tokenizer"] = hashlib.sha256(Path(config.tokenizer).read_bytes()).hexdigest()
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return Path(config.cache_dir) / f"{config.source}-{digest}"


def _pack(config: DataConfig, folder: Path, say: Callable[[str], None], alive: Callable[[], None]) -> None:
    encode, eod, dtype = tokenizer(config)
    counts = {"train": 0, "validation": 0}
    reported_at = time.monotonic()
    batch: list[str] = []
    document = 0
    with (
        (folder / "train.bin").open("wb") as train,
        (folder / "validation.bin").open("wb") as validation,
        tqdm(desc="packing", unit=" docs", disable=None) as progress,
    ):

        def flush() -> None:
            nonlocal document, reported_at
            for ids in encode(batch):
                held_out = _unit(document) < config.validation_fraction
                file, part = (validation, "validation") if held_out else (train, "train")
                file.write(np.append(ids, eod).astype(dtype).tobytes())
                counts[part] += len(ids) + 1
                document += 1
            progress.update(len(batch))
            alive()
            batch.clear()
            if progress.disable and time.monotonic() - reported_at > 10:  # no terminal: a line now and then
                say(f"packed {document:,} documents, {sum(counts.values()):,} tokens")
                reported_at = time.monotonic()

        for text in documents(config):
            if text:
                batch.append(text)
            if len(batch) == 256:
                flush()
        flush()
    if document == 0:
        raise UserError(f"data: {config.source} {config.name or config.files} holds no text. Nothing to train on.")
    fraction = config.validation_fraction  # 0: all is read as one text, by `evaluate`
    if fraction > 0 and (document < 1 / fraction or counts["validation"] == 0):
        _hold_out_the_tail(config, folder, counts, np.dtype(dtype).itemsize)
    digest = xxhash.xxh3_128()
    for part in counts:
        with (folder / f"{part}.bin").open("rb") as file:
            os.fsync(file.fileno())
            while block := file.read(1 << 22):
                digest.update(block)
    meta = {"dtype": dtype, "documents": document, "tokens": counts, "digest": digest.hexdigest()}
    write_atomically(folder / "meta.json", json.dumps(meta))  # last: it marks the folder as whole
    say(f"packed {document:,} documents: {counts['train']:,} tokens to train on, {counts['validation']:,} held out")


def packed_tokens(folder: Path) -> NDArray[np.integer]:
    """The token ids of a data set that was packed whole, in order."""
    dtype = json.loads((folder / "meta.json").read_text())["dtype"]
    return np.memmap(folder / "train.bin", dtype=dtype, mode="r")


def _unit(document: int) -> float:
    """A fixed number in [0, 1) for each document: which of them are held out never changes."""
    return int.from_bytes(hashlib.blake2b(str(document).encode(), digest_size=8).digest(), "big") / 2**64


def _hold_out_the_tail(config: DataConfig, folder: Path, counts: dict[str, int], itemsize: int) -> None:
    """Too few documents to hold some out whole: the last part of the text is held out instead."""
    with (folder / "train.bin").open("r+b") as train, (folder / "validation.bin").open("r+b") as validation:
        train.seek(0, os.SEEK_END)
        shutil.copyfileobj(validation, train)
        total = train.tell() // itemsize
        counts["validation"] = int(total * config.validation_fraction)
        counts["train"] = total - counts["validation"]
        train.seek(counts["train"] * itemsize)
        validation.seek(0)
        validation.truncate()
        shutil.copyfileobj(train, validation)
        train.truncate(counts["train"] * itemsize)
