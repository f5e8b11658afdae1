"""What every recipe's command line does with a user's mistake: one line on stderr and exit code 2."""

import difflib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from jsonargparse import ArgumentParser

from lightning_modules.redaction import redacted

OURS = tuple(str(Path(__file__).parents[1] / name) for name in ("lightning_modules", "datamodules", "recipes"))
LIGHTNING = f"{os.sep}lightning{os.sep}pytorch{os.sep}"


@contextmanager
def one_line_errors() -> Iterator[None]:
    """A user's mistake is an OSError or ValueError that our own code or Lightning's raises on purpose.

    Everything else keeps its traceback, and so does this under LIGHTNING_LM_TRACEBACK=1.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        # A library may have wrapped it on the way up.
        purposes = [str(cause) for cause in _causes(error) if _on_purpose(cause)]
        if told := _told_by_worker(str(error)):
            purposes.append(told)
        if not purposes or os.environ.get("LIGHTNING_LM_TRACEBACK"):
            raise
        fail(purposes[0])
    except Exception as error:
        # By name, so that recipes without Lightning start without it.
        if type(error).__name__ != "MisconfigurationException" or os.environ.get("LIGHTNING_LM_TRACEBACK"):
            raise
        fail(str(error))


class _Unbreakable:
    """A stream whose reader may go, as `| head` does: what is written from then on goes nowhere."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        self._guarded(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._guarded(self._stream.flush)

    def _guarded(self, function: Callable, *arguments: str) -> None:
        try:
            function(*arguments)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


@contextmanager
def unbreakable_output() -> Iterator[None]:
    """A run does not end because nobody reads what it prints any more."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_Unbreakable, streams)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = streams


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _on_purpose(error: BaseException) -> bool:
    if not isinstance(error, OSError | ValueError) or error.__traceback__ is None:
        return False
    last = traceback.extract_tb(error.__traceback__)[-1]
    purposeful = last.filename.startswith(OURS) or LIGHTNING in last.filename
    return purposeful and (last.line or "").lstrip().startswith("raise ")


def _told_by_worker(text: str) -> str | None:
    """What our own code raised in a process that loads data, out of the traceback that torch makes a message of."""
    if not re.match(r"Caught (OSError|ValueError) in DataLoader worker", text):
        return None
    raised = re.split(r'\n  File "', text)[-1]
    return raised.rpartition("Error: ")[2].strip() if raised.startswith(OURS) and "    raise " in raised else None


QUOTES = "'\""


def fail(message: str, code: int = 2) -> None:
    print(f"error: {redacted(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(code)


class OneLineParser(ArgumentParser):
    """Says what is wrong with a flag in one line, not after a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> None:
        fail(explain(message, list(self._option_string_actions)))


def _end_alike(flag: str, near: list[str]) -> bool:
    """Whether the last part of both is nearly the same, not only what leads there."""
    last = [name.lstrip("-").rpartition(".")[2] for name in (flag, *near)]
    return bool(difflib.get_close_matches(last[0], last[1:]))


def explain(message: str, flags: list[str]) -> str:
    """A parser's complaint in one line, with the nearest flag for one that does not exist."""
    message = " ".join(message.split())
    unknown = re.search(
        r"nrecognized arguments: (--[\w.+-]+)|[Kk]ey [\"']?([\w.]+)[\"']? (?:is not|does not)|Option '(\w+)' is not",
        message,
    )
    if unknown:
        flag = unknown[1] or f"--{unknown[2] or unknown[3]}"
        near = difflib.get_close_matches(flag, flags, n=1)
        typed = _as_typed(flag)
        if typed.startswith("--trainer.callbacks.") and not _end_alike(flag, near):
            return f"there is no {typed}: such a flag is for the last callback of the list; change others in the YAML"
        prefix = typed.removesuffix(flag[2:])
        return f"there is no {typed}; " + (f"did you mean {prefix}{near[0][2:]}?" if near else "--help lists the flags")
    key = re.search(r'Parser key "(.+?)": (.*)', message)
    if not key:
        return message
    flag, complaint = _as_typed(f"--{key[1]}"), key[2]
    if flag not in flags and "." not in flag:  # a word without one
        flag = key[1]
    if denied := re.search(r"Importing '([\w.]+)' is not allowed", complaint):
        package = denied[1].partition(".")[0]
        return f"{flag} {denied[1]}: no package that a run may name; if you trust it, add --allow_import {package}"
    if no_class := re.search(r"Expected a path but (\S+) either", complaint):
        return f"{flag} {no_class[1]}: there is no such class; pass its name with its package, like torch.optim.AdamW"
    if bad_value := re.search(r"(?:Given|Got) value: (.*)", complaint):
        choices = [choice for group in re.findall(r"Literal\[(.*?)\]", complaint) for choice in group.split(", ")]
        takes = f"it takes {', '.join(choice.strip(QUOTES) for choice in choices)}" if choices else "see --help"
        return f"{flag} does not take {bad_value[1]}; {takes}"
    return f"{flag}: {complaint}"


def _as_typed(flag: str) -> str:
    """A class's own parser names its field alone: --optimizer, where the command line said --model.optimizer."""
    typed = (argument.split("=")[0] for argument in sys.argv)
    return next((argument for argument in typed if argument.endswith(f".{flag[2:]}")), flag)


def take_flag(flag: str, args: list[str]) -> tuple[list[str], list[str]]:
    """The arguments without a flag that is not for the parser, and its values."""
    left, values = [], []
    words = iter(args)
    for word in words:
        if word == flag:
            values.append(next(words, ""))
        elif word.startswith(f"{flag}="):
            values.append(word.partition("=")[2])
        else:
            left.append(word)
    return left, values
