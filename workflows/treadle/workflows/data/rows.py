"""Rows of JSONL, text and Parquet files by URL. Whatever is wrong is reported with file and line."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, Generic, TypeVar

from fsspec.compression import compr
from fsspec.utils import infer_compression

from treadle.platform.errors import DataError, StorageError
from treadle.platform.records import Json
from treadle.platform.storage import open_parent

T = TypeVar("T")
Row = Mapping[str, Any]
SKIP = "Mend it, or set skip_bad=true (--skip-bad) to count such rows and leave them out."


@dataclass(frozen=True, slots=True)
class Rows(Generic[T]):
    """What a file held. `skipped` counts the broken rows that were left out."""

    items: list[T]
    skipped: int


def read_rows(url: str, parse: Callable[[Row, str], T], *, skip_bad: bool) -> Rows[T]:
    """Every row through `parse(row, where)`, where being `url:line` (for Parquet: `url:row`).

    A file that ends in `.parquet` is Parquet; one that ends in `.txt` has one document per line, seen as
    `{"text": line}`; all others are JSON lines; `.gz`, `.zst` and so on are unpacked. Raises DataError for a
    missing or empty file and for the first broken row, unless `skip_bad`; StorageError when the place of the
    file does not answer.
    """
    items: list[T] = []
    skipped = 0
    for where, raw in _raw_rows(url):
        try:
            items.append(parse(_decoded(raw, where), where))
        except DataError:
            if not skip_bad:
                raise
            skipped += 1
    if not items and not skipped:
        raise DataError(f"{url} is empty.", "Give a file with at least one row.")
    return Rows(items, skipped)


def text_field(row: Row, name: str, where: str) -> str:
    """A field that must be a text with something in it. Raises DataError."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        found = "is missing" if name not in row else f"is {_short(value)}"
        raise DataError(f'{where}: the field "{name}" {found}; it must be a text.', SKIP)
    return value


def payload_field(row: Row, where: str) -> dict[str, Json]:
    """What a verifier needs to know: the fields "payload" (an object) and "answer". Raises DataError."""
    payload = row.get("payload", {})
    if not isinstance(payload, dict):
        raise DataError(f'{where}: the field "payload" must be an object.', SKIP)
    answer = row.get("answer")
    if answer is None and not payload:
        raise DataError(f'{where}: neither "answer" nor "payload" says what is right.', SKIP)
    if isinstance(answer, str) and not answer.strip():
        raise DataError(f'{where}: the field "answer" is empty.', SKIP)
    return dict(payload) if answer is None else {"answer": answer, **payload}


def _raw_rows(url: str) -> Iterator[tuple[str, str | Row]]:
    """Pairs of `url:line` and the row; lines with nothing but whitespace do not count as rows."""
    store, name = open_parent(url)
    try:
        with store.reading(name) as stream:
            yield from _parquet_rows(url, stream) if name.endswith(".parquet") else _line_rows(url, stream)
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError | IsADirectoryError):
            raise DataError(f"{url} does not exist or is no file.", "Check the path or URL.") from error
        raise
    except (ValueError, EOFError, zlib.error) as error:  # no UTF-8, no Parquet, a damaged archive
        raise DataError(f"{url} cannot be read as what its name says: {error}", "Check the file.") from error


def _line_rows(url: str, stream: IO[bytes]) -> Iterator[tuple[str, str | Row]]:
    packing = infer_compression(url)
    unpacked = compr[packing](stream, mode="r") if packing else stream
    plain = ".txt" in url.rsplit("/", 1)[-1]
    for number, line in enumerate(io.TextIOWrapper(unpacked, encoding="utf-8"), 1):
        if line.strip():
            yield f"{url}:{number}", {"text": line.rstrip("\r\n")} if plain else line


def _parquet_rows(url: str, stream: IO[bytes]) -> Iterator[tuple[str, Row]]:
    from pyarrow.parquet import ParquetFile

    number = 0
    for batch in ParquetFile(stream).iter_batches(batch_size=1024):
        for row in batch.to_pylist():
            number += 1
            yield f"{url}:{number}", {name: value for name, value in row.items() if value is not None}


def _decoded(raw: str | Row, where: str) -> Row:
    if not isinstance(raw, str):
        return raw
    try:
        row = json.loads(raw)
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON ({error}): {_short(raw)}", SKIP) from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: {_short(row)} is no JSON object.", SKIP)
    return row


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
