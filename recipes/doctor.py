"""Look at the machines before they train: devices, versions, clocks, data, disk and network, in seconds.

Run:
    python recipes/doctor.py --folder runs
    torchrun --nproc-per-node 8 recipes/doctor.py --folder /shared/runs --data.path /shared/texts
    torchrun --nnodes 8 --nproc-per-node 8 … recipes/doctor.py --folder /shared/runs --checkpoint_gb 96

Ends with 1 where a check has failed, and with 2 where it could not begin.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from jsonargparse.typing import PositiveFloat

from lightning_modules.command_line import OneLineParser, one_line_errors


@dataclass
class Data:
    """What the run will read.

    Args:
        path: Files, folders, globs, weights of prepared folders, or addresses such as s3://bucket/prepared, as `fit`
            takes them: every machine has to see them. Names of the Hub are not looked for.
    """

    path: str | list[str] | dict[str, float] | None = None


def examine(data: Data, folder: Path = Path("runs"), checkpoint_gb: PositiveFloat | None = None) -> None:
    """Looks.

    Args:
        data: What runs read.
        folder: Where they are written to.
        checkpoint_gb: Size of a checkpoint, as the plan says it; two of them have to fit.
    """
    from lightning_modules.doctor import Ranks, passed

    paths = [data.path] if isinstance(data.path, str) else list(data.path or ())
    if not passed(Ranks(), folder, paths, None if checkpoint_gb is None else 1e9 * checkpoint_gb):
        sys.exit(1)


def main(arguments: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_function_arguments(examine, as_group=False)
    options = parser.instantiate(parser.parse_args(arguments))
    with one_line_errors():
        examine(**options)


if __name__ == "__main__":
    main()
