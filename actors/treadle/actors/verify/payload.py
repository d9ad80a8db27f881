"""Reading a prompt's payload. What is missing or ill-typed is the data's fault: it raises, so that the
verdict says "failed" and never "wrong"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from treadle.platform.errors import DataError

if TYPE_CHECKING:
    from treadle.platform.records import Json


def text_field(payload: Mapping[str, Json], key: str) -> str:
    """A non-empty string, or a number as written."""
    value = payload.get(key)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise DataError(f'The prompt\'s payload has no usable "{key}".', f'Give "{key}" as text or a number.')
    return str(value)


def choice(payload: Mapping[str, Json], key: str, allowed: tuple[str, ...]) -> str:
    """One of the allowed words; the first when the key is absent."""
    value = payload.get(key, allowed[0])
    if value not in allowed:
        raise DataError(f'The payload\'s "{key}" is {value!r}.', f"Use one of {', '.join(allowed)}.")
    return str(value)


def integer(payload: Mapping[str, Json], key: str) -> int:
    """An integer."""
    value = payload.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise DataError(f'The prompt\'s payload has no integer "{key}".', f'Give "{key}" as an integer.')
    return value


def integers(payload: Mapping[str, Json], key: str) -> list[int]:
    """A non-empty list of integers, none negative."""
    values = payload.get(key)
    found = values if isinstance(values, list) else []
    numbers = [v for v in found if isinstance(v, int) and not isinstance(v, bool) and v >= 0]
    if not numbers or len(numbers) != len(found):
        raise DataError(
            f'The payload\'s "{key}" is not a list of non-negative integers.', f'Give "{key}" as one.'
        )
    return numbers


def non_negative(payload: Mapping[str, Json], key: str) -> float | None:
    """A number that is not negative, or None when the key is absent."""
    value = payload.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise DataError(f'The payload\'s "{key}" is {value!r}.', "Give a finite number that is not negative.")
    return float(value)
