"""Text in, packed token files out, and the sequences of a step.

A data set is packed once into two flat files of token ids, documents end to end with an end-of-document token between,
and read back by memory map. Which sequence comes when depends on the seed and the global sample index alone.
"""

import hashlib
import json
import os
import shutil
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import cast

import filelock
import numpy as np
import xxhash
from numpy.typing import NDArray
from tqdm import tqdm

from tptrain.config import UserError
from tptrain.config.load import write_atomically
from tptrain.config.schema import DataConfig
from tptrain.config.validate import FORMATS, data_files, vocabulary

FORMAT_VERSION = 2
Encode = Callable[[list[str]], list[NDArray[np.integer]]]


class TokenFile:
    """Fixed-length sequences of one packed file: `sequence(i)` is seq_len + 1 ids, the inputs and their targets."""

    def __init__(self, path: Path, dtype: str, seq_len: int) -> None:
        self.seq_len = seq_len
        self.tokens = np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.seq_len)

    def sequence(self, index: int) -> NDArray[np.int64]:
        start = index * self.seq_len
        return self.tokens[start : start + self.seq_len + 1].astype(np.int64)


class TokenData:
    """The training and held-out sequences of a packed data set. Raises UserError where it is too small to train on."""

    def __init__(self, folder: Path, seq_len: int, seed: int) -> None:
        meta = json.loads((folder / "meta.json").read_text())
        dtype, self.digest = meta["dtype"], meta["digest"]  # the digest is of the tokens: a resume must find the same
        self.seed = seed
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="data")
        self._coming: dict[tuple[int, int], Future[NDArray[np.int64]]] = {}
        self.train = TokenFile(folder / "train.bin", dtype, seq_len)
        self.validation = TokenFile(folder / "validation.bin", dtype, seq_len)
        for name, part in (("training", self.train), ("validation", self.validation)):
            if len(part) == 0:
                raise UserError(
                    f"data: its {name} part has {len(part.tokens)} tokens, fewer than one sequence of train.seq_len="
                    f"{seq_len} and its target. Give more text or shorten train.seq_len."
                )

    def samples(self, first: int, count: int) -> NDArray[np.int64]:
        """(count, seq_len + 1): the training samples first, first + 1, ... of the run. Each epoch has its own order."""
        future = self._coming.pop((first, count), None)
        return self._read(first, count) if future is None else future.result()

    def prefetch(self, first: int, count: int) -> None:
        """Begin to read what `samples` will be asked for next: it may lie on a slow file system."""
        self._coming = {(first, count): self._reader.submit(self._read, first, count)}

    def _read(self, first: int, count: int) -> NDArray[np.int64]:
        rows = []
        for index in range(first, first + count):
            epoch, place = divmod(index, len(self.train))
            rows.append(self.train.sequence(shuffled(place, len(self.train), f"{self.seed}/{epoch}")))
        return np.stack(rows)


def shuffled(index: int, n: int, key: str) -> int:
    """Where a keyed permutation of range(n) sends `index`, without holding the permutation.

    A Feistel network over the next even power of two, walked until it lands below n (Black & Rogaway 2002).
    """
    half = (max(n - 1, 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            mixed = hashlib.blake2b(f"{key}/{turn}/{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ int.from_bytes(mixed, "big") & mask
        index = left << half | right
        if index < n:
            return index


# ------------------------------------------------------------------------------------------------------------- packing


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
    if config.tokenizer != "bytes":
        identity["tokenizer"] = hashlib.sha256(Path(config.tokenizer).read_bytes()).hexdigest()
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return Path(config.cache_dir) / f"{config.source}-{digest}"


def _pack(config: DataConfig, folder: Path, say: Callable[[str], None], alive: Callable[[], None]) -> None:
    encode, eod, dtype = _tokenizer(config)
    counts = {"train": 0, "validation": 0}
    told = time.monotonic()
    batch: list[str] = []
    document = 0
    with (
        (folder / "train.bin").open("wb") as train,
        (folder / "validation.bin").open("wb") as validation,
        tqdm(desc="packing", unit=" docs", disable=None) as progress,
    ):

        def flush() -> None:
            nonlocal document, told
            for ids in encode(batch):
                held_out = _unit(document) < config.validation_fraction
                file, part = (validation, "validation") if held_out else (train, "train")
                file.write(np.append(ids, eod).astype(dtype).tobytes())
                counts[part] += len(ids) + 1
                document += 1
            progress.update(len(batch))
            alive()
            batch.clear()
            if progress.disable and time.monotonic() - told > 10:  # no terminal: a line now and then
                say(f"packed {document:,} documents, {sum(counts.values()):,} tokens")
                told = time.monotonic()

        for text in _documents(config):
            if text:
                batch.append(text)
            if len(batch) == 256:
                flush()
        flush()
    if document == 0:
        raise UserError(f"data: {config.source} {config.name or config.files} holds no text. Nothing to train on.")
    if document < 1 / config.validation_fraction or counts["validation"] == 0:
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


def _documents(config: DataConfig) -> Iterator[str]:
    """The texts of the data set. Raises UserError where they cannot be read or are not texts."""
    if config.source == "stdlib":
        yield from _stdlib_texts()
        return
    column = config.text_column
    try:
        for row in _hub_rows(config) if config.source == "hub" else _file_rows(config):
            if column not in row:
                raise UserError(f"data.text_column={column}: no such column. The data has {', '.join(sorted(row))}.")
            text = row[column]
            if text is not None and not isinstance(text, str):
                raise UserError(f"data.text_column={column}: holds {type(text).__name__}, not text.")
            yield text or ""
    except UserError:
        raise
    except Exception as error:  # `datasets` raises a dozen kinds for a name, a split or a file that it cannot read
        what = f"data.name={config.name}" if config.source == "hub" else f"data.files={','.join(config.files)}"
        raise UserError(
            f"{what}: `datasets` cannot read it: {str(error.__cause__ or error).splitlines()[0]}"
        ) from error


def _stdlib_texts() -> Iterator[str]:
    """Sources and texts of the running Python's standard library, in the order of their paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib-dynload"}
    files = [
        file
        for kind in ("*.py", "*.txt", "*.rst")
        for file in root.rglob(kind)
        if not skipped.intersection(file.relative_to(root).parts) and file.is_file()
    ]
    for file in sorted(files):
        yield file.read_text(encoding="utf-8", errors="ignore")


def _file_rows(config: DataConfig) -> Iterable[dict]:
    import datasets

    files = data_files(config)
    kind = FORMATS[files[0].suffix]
    if kind == "text":  # a file is a document
        return ({config.text_column: _utf8(file)} for file in files)
    names = [str(file) for file in files if file.stat().st_size]
    return datasets.load_dataset(kind, data_files=names, split="train", streaming=True)


def _utf8(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"data.files={file}: not UTF-8 at byte {error.start}. Convert it, e.g. with iconv.") from error


def _hub_rows(config: DataConfig) -> Iterable[dict]:
    import datasets

    assert config.name is not None
    return cast(Iterable[dict], datasets.load_dataset(config.name, config.subset, split=config.split))


def _tokenizer(config: DataConfig) -> tuple[Encode, int, str]:
    """The batch encoder, the end-of-document id and the integer type that holds every id."""
    size, eod = vocabulary(config)
    dtype = "uint16" if size <= 2**16 else "uint32"
    if config.tokenizer == "bytes":
        return lambda texts: [np.frombuffer(text.encode(errors="replace"), np.uint8) for text in texts], eod, dtype
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(config.tokenizer)
    except Exception as error:  # `tokenizers` raises bare Exceptions
        raise UserError(f"data.tokenizer={config.tokenizer}: `tokenizers` cannot read it: {error}") from error

    def encode(texts: list[str]) -> list[NDArray[np.integer]]:
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    return encode, eod, dtype
