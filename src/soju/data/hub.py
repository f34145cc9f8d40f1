"""Rows of a data set on the Hugging Face hub, streamed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from soju.data.log import ReadLog
from soju.data.sources import HubSource


def read_hub(source: HubSource, *, log: ReadLog) -> Iterator[dict[str, Any]]:
    """Yield the rows of one split with its columns renamed to our fields.

    Nothing is downloaded beyond the parts that are read, and no code of the data set is run.

    Args:
        source: The data set.
        log: Gets ``hub`` when the data set cannot be opened or breaks off.

    Yields:
        One object a row: all columns under their own names, and those of ``source.columns`` under the field's name.
    """
    number = 0
    try:
        import datasets  # takes a second; most runs read files

        rows = datasets.load_dataset(source.dataset, source.configuration, split=source.split, streaming=True)
        for row in rows:
            number += 1
            yield _rename(row, source.columns)
    except Exception as error:  # the hub client raises errors of a dozen unrelated families
        cause = str(error).strip().split("\n")[0] or type(error).__name__
        remedy = (
            f"check the name, the split ({source.split}) and the network, or save the rows as .jsonl and name the file"
        )
        log.refuse_file(source.name, number + 1 if number else 0, f"cannot be read ({cause})", remedy, "hub")


def _rename(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    result = dict(row)
    for field, column in columns.items():
        result.pop(field, None)
        value: Any = row
        for part in column.split("."):
            if not isinstance(value, Mapping) or part not in value:
                break
            value = value[part]
        else:
            result[field] = value
    return result
