"""The rows of a task that models are judged by, from files and folders."""

import sys
from collections.abc import Sequence
from pathlib import Path

from datamodules import bias_rows
from datamodules.files import ROW_FORMATS, BadRows, text_format
from datamodules.questions import read_questions
from datamodules.sources import find_files


def read_rows(paths: Sequence[str], task: str, skip_bad_rows: bool) -> dict[str, list]:
    """By file, whole. Raises ValueError for a file that has none."""
    bad_rows = BadRows(skip_bad_rows)
    if task == "winobias":
        files = [file for path in paths for file in (sorted(Path(path).glob("*_stereotyped_*")) or [Path(path)])]
        pairs = list(bias_rows.read_winobias(files))
        if not pairs:
            raise ValueError(
                f"no pro_stereotyped_* in {', '.join(paths)}; pass the folder with these and anti_stereotyped_*"
            )
        return {"WinoBias": pairs}
    found = {}
    for file in find_files(list(paths), "--data.path"):
        if text_format(file) not in ROW_FORMATS and str(file) not in paths:  # what else lies in a folder
            continue
        if task == "crows_pairs":
            rows = bias_rows.read_crows_pairs(file, bad_rows)
        elif task == "stereoset":
            rows = bias_rows.read_stereoset(file)
        elif task == "bbq":
            rows = bias_rows.read_bbq(file, bad_rows)
        else:
            rows = read_questions(file, task, bad_rows)
        found[str(file)] = list(rows)
        if task == "bbq" and (unsaid := sum(row.biased is None for row in found[str(file)])):
            print(f"note: {unsaid} rows of {file} name no stereotyped answer: no part of the bias", file=sys.stderr)
        if not found[str(file)]:
            raise ValueError(f"{file} has no row for --task {task}; pass other files by --data.path")
    if not found:
        raise ValueError(f"no file of rows in {', '.join(paths)}; pass {', '.join(ROW_FORMATS)}")
    for name, count in bad_rows.skipped.items():
        print(f"note: {count} rows of {name} could not be read and are left out", file=sys.stderr)
    return found
