"""What wandb wrote on disk, read back: it has no reader of its own."""

import json
from collections.abc import Iterator
from pathlib import Path


def wandb_rows(run_dir: Path) -> dict[int, dict]:
    """The rows of training of every offline wandb run below a run directory, by step."""
    return {row["step"]: row for row in wandb_history(run_dir) if "step" in row}


def wandb_history(run_dir: Path) -> list[dict]:
    """All rows of every offline wandb run below a run directory, read back from wandb's own files."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    rows = []
    for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        for data in leveldb_log(file.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                rows.append({key: json.loads(value) for key, value in items.items()})
    return rows


def wandb_tables(run_dir: Path, key: str) -> dict[int, list[list]]:
    """The rows of the tables that were logged under a key, by step."""
    tables = {}
    for step, row in wandb_rows(run_dir).items():
        if f"{key}/path" in row:
            assert row[f"{key}/_type"] == "table-file"
            file = next(run_dir.glob(f"wandb/offline-run-*/files/{row[f'{key}/path']}"))
            content = json.loads(file.read_text())
            assert content["columns"] == ["step", "prompt", "text"]
            tables[step] = content["data"]
    return tables


def leveldb_log(content: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: a 7-byte header, then LevelDB's log format (its doc/log_format.md)."""
    assert content.startswith(b":W&B")
    place, parts = 7, b""
    while place + 7 <= len(content):
        left_in_block = 32768 - place % 32768
        if left_in_block < 7:
            place += left_in_block
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""
