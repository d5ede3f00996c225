"""Read back what loggers wrote."""

from __future__ import annotations

import io
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HEADER, BLOCK, RECORD = 7, 32768, struct.Struct("<IHB")
FULL, LAST = 1, 4


def wandb_history(save_dir: Path) -> dict[str, Any]:
    """The history of the one offline run in this folder, last values by key; pictures as ``[(pixels, caption)]``."""
    from wandb.proto.wandb_internal_pb2 import Record

    (run,) = (save_dir / "wandb").glob("offline-run-*")
    (file,) = run.glob("*.wandb")
    deadline = time.monotonic() + 120
    while True:  # wandb.finish() may return before its service has written the file to the end
        records = [Record.FromString(data) for data in _leveldb_records(file.read_bytes())]
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            break
        assert time.monotonic() < deadline, f"{file} was never finished"
        time.sleep(0.05)
    history: dict[str, Any] = {}
    for record in records:
        if record.WhichOneof("record_type") != "history":
            continue
        nested: dict[str, Any] = {}
        for item in record.history.item:
            first, _, rest = (item.key or "\0".join(item.nested_key)).partition("\0")
            value = json.loads(item.value_json)
            if rest:
                nested.setdefault(first, {})[rest] = value
            else:
                nested[first] = value
        history |= nested
    for key, value in history.items():
        if isinstance(value, dict) and "filenames" in value:
            pictures = [np.asarray(Image.open(run / "files" / name)) for name in value["filenames"]]
            history[key] = list(zip(pictures, value["captions"], strict=True))
    return history


def tensorboard_history(log_dir: Path) -> dict[str, Any]:
    """The last scalars, pictures (pixels) and texts by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(log_dir), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    found: dict[str, Any] = {tag: events.Scalars(tag)[-1].value for tag in tags["scalars"]}
    for tag in tags["images"]:
        found[tag] = np.asarray(Image.open(io.BytesIO(events.Images(tag)[-1].encoded_image_string)))
    for tag in tags["tensors"]:
        found[tag.removesuffix("/text_summary")] = events.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
    return found


def tensorboard_picture_steps(log_dir: Path, tag: str) -> list[int]:
    """The steps at which pictures were logged under this tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(log_dir), size_guidance={"images": 0})
    events.Reload()
    return [event.step for event in events.Images(tag)]


def tensorboard_scalar_steps(log_dir: Path, tag: str) -> list[int]:
    """The steps at which numbers were logged under this tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(log_dir), size_guidance={"scalars": 0})
    events.Reload()
    return [event.step for event in events.Scalars(tag)]


def _leveldb_records(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file, which is a LevelDB log after a header of seven bytes."""
    position, record = HEADER, b""
    while position + RECORD.size <= len(data):
        left = BLOCK - position % BLOCK
        if left < RECORD.size:
            position += left
            continue
        _, length, kind = RECORD.unpack_from(data, position)
        position += RECORD.size
        if position + length > len(data):  # it is being written
            return
        record += data[position : position + length]
        position += length
        if kind in (FULL, LAST):
            yield record
            record = b""
