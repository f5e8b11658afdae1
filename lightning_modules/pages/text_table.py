"""Tables of a terminal."""


def turned(rows: list[list[str]]) -> list[list[str]]:
    return [list(column) for column in zip(*rows, strict=True)]


def width_of(text: str) -> int:
    return max(map(len, text.splitlines()))


def aligned(rows: list[list[str]]) -> str:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in turned(rows)]
    lines = []
    for row in rows:
        words = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(words).rstrip())
    return "\n".join(lines)
