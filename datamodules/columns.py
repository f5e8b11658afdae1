"""Which columns of a file of rows hold what: by their usual names, or as the user says."""

import itertools
from dataclasses import dataclass
from pathlib import Path

from datamodules.files import BadRows, text_format
from datamodules.records import first_fields, missing, records


@dataclass(frozen=True)
class Column:
    """One thing that a row may hold."""

    usual: tuple[str, ...]
    """Names that it usually has, in lower case, the likeliest first."""
    asked: str | None = None
    """Its name, or its number where there is no header, as the user said."""
    required: bool = True


def find_columns(file: Path, wanted: dict[str, Column]) -> tuple[bool, dict[str, str]]:
    """Whether a file has a header, and the column of each wanted thing that it has.

    A table is taken to have no header where its first line has none of the usual names, and none that was asked for.
    Of such a table with as many columns as are required the columns are taken as they stand.
    """
    is_table = text_format(file) in (".csv", ".tsv")
    names = first_fields(file) if is_table else _names(file)
    asked = [column.asked for column in wanted.values() if column.asked is not None]
    lowered = {name.lower(): name for name in names}
    known = any(name in lowered for column in wanted.values() for name in column.usual)
    by_number = all(name.isdigit() and name not in names for name in asked)
    header = not is_table or known or (bool(asked) and not by_number)
    if not header:
        names = [str(i) for i in range(len(names))]
        lowered = {}
        required = [name for name, column in wanted.items() if column.required]
        if not asked and len(names) == len(required):
            return False, dict(zip(required, names, strict=True))
    if asked and not set(asked) <= set(names):
        name = next(name for name, column in wanted.items() if column.asked not in (None, *names))
        raise ValueError(missing(file, asked, names, f"{name}_column"))
    found = {}
    for name, column in wanted.items():
        taken = {column.asked for column in wanted.values()} | set(found.values())
        free = [lowered[usual] for usual in column.usual if usual in lowered and lowered[usual] not in taken]
        chosen = column.asked or (free[0] if free else None)
        if chosen is not None:
            found[name] = chosen
        elif column.required:
            raise ValueError(
                f"{file} has no column that is called like a {name}; pass --data.{name}_column, one of: "
                f"{', '.join(names)}"
            )
    return header, found


def _names(file: Path, most: int = 1000) -> list[str]:
    """The columns of the first rows, not all of which need to have all."""
    names: dict[str, None] = {}
    for _, row in itertools.islice(records(file, BadRows(skip=True)), most):
        names |= dict.fromkeys(map(str, row))
    return list(names)
