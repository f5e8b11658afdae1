"""The formats: what each needs, how its result is called, and what may differ from the source."""

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Name = Literal["hf", "safetensors", "onnx", "onnx-int8", "pt2", "pte", "gguf"]
GGUFType = Literal["F32", "F16", "Q8_0", "Q4_0"]
DType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Format:
    """What there is to know of a format before a model is loaded.

    Args:
        ending: Of the file; empty: the result is a folder.
        packages: Without which it cannot be written and read back.
        extra: What installs them.
    """

    ending: str = ""
    packages: tuple[str, ...] = ()
    extra: str = ""


FORMATS: dict[str, Format] = {
    "hf": Format(),
    "safetensors": Format(".safetensors"),
    "onnx": Format("", ("onnx", "onnxscript", "onnxruntime"), "export"),
    "onnx-int8": Format("", ("onnx", "onnxscript", "onnxruntime"), "export"),
    "pt2": Format(".pt2"),
    "pte": Format(".pte", ("executorch", "torchao", "ruamel.yaml"), "pte"),
    "gguf": Format(".gguf", ("gguf",), "export"),
}

WEIGHTS = {".safetensors", ".bin", ".onnx", ".data", ".pt2", ".pte"}
MOST_LOGITS = 1e-3
"""Where weights stay float32: the same sums in another order. Measured: up to 2e-4 (T5), else below 4e-5."""
MOST_NATS = {"bfloat16": 0.01, "float16": 0.01, "F16": 0.01, "Q8_0": 0.01, "onnx-int8": 0.05, "Q4_0": 0.3}
"""Mean KL in nats where weights are rounded. Measured on a Llama of 260,000 weights: 1e-6 (F16), 8e-4 (Q8_0), 0.013
(onnx-int8), 0.16 (Q4_0); larger models lose less."""


def require_packages(name: str) -> None:
    """Raises ValueError with the extra that brings what is not installed."""
    for package in FORMATS[name].packages:
        try:
            found = importlib.util.find_spec(package)
        except ModuleNotFoundError:  # of a part of a package that is not there
            found = None
        if found is None:
            extra = FORMATS[name].extra
            raise ValueError(f"--format {name} needs {package}, which is not installed: pip install -e '.[{extra}]'")


def beside(folder: str, name: str, rounded_to: str | None) -> Path:
    """Where an export goes that nobody named: beside the model's folder, or here for a name on the Hub."""
    source = Path(folder).expanduser()
    parent = source.resolve().parent if source.is_dir() else Path()
    stem = (source.resolve() if source.is_dir() else source).name
    if name in ("gguf", "hf", "safetensors") and rounded_to:
        stem = f"{stem}-{rounded_to}"
    return parent / (f"{stem}{FORMATS[name].ending}" if FORMATS[name].ending else f"{stem}-{name}")


def require_place(path: Path, name: str, source: Path | None, overwrite: bool) -> None:
    """Raises ValueError or FileExistsError where the export cannot or must not be put."""
    if source is not None and source.is_dir():
        here, there = path.resolve(), source.resolve()
        if here == there or here in there.parents or (there in here.parents and overwrite and here.exists()):
            raise ValueError(f"--output {path} would replace the model itself; pass another path")
    if FORMATS[name].ending and path.is_dir() and not is_export(path):
        raise ValueError(
            f"--output {path} is a folder, and {name} is a file; pass a name in it, like model{FORMATS[name].ending}"
        )
    if not path.exists() and not path.is_symlink():
        above = next(parent for parent in path.absolute().parents if parent.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise ValueError(f"--output {path}: nothing can be written in {above}; pass another path")
        return
    if not overwrite:
        raise FileExistsError(f"--output {path} exists; pass --overwrite to replace it, or another path")
    if path.is_dir() and not is_export(path):
        raise ValueError(f"--output {path} is a folder with other things than a model in it; pass another path")


def is_export(folder: Path) -> bool:
    """Whether a folder is what an export leaves, which may be replaced: no subfolder, and a model's files."""
    files = list(folder.iterdir())
    model = any(file.suffix in (".onnx", ".pt2", ".pte") or file.name == "config.json" for file in files)
    return model and not any(file.is_dir() for file in files)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, gone at the end whatever comes; `put_in_place` renames it before that."""
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")  # torch asks for its .pt2
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
    except OSError as error:
        if error.filename is None or not str(error.filename).startswith(str(path.parent)):
            raise
        raise OSError(f"{path.parent} cannot be written: {error.strerror}; pass another --output") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True) if partial.is_dir() else partial.unlink(missing_ok=True)


def put_in_place(partial: Path, path: Path) -> None:
    """In one step: whoever looks finds what was there, or the new one whole."""
    from lightning_modules.checkpoint_io import remove, replace_folder

    if partial.is_dir():
        replace_folder(partial, path)
        return
    if path.is_dir():
        remove(path)
    os.replace(partial, path)


def weights_in(path: Path) -> int | None:
    """Bytes of a file, or of the weights in a folder; None for a name on the Hub."""
    if path.is_file():
        return path.stat().st_size
    files = path.iterdir() if path.is_dir() else ()
    return sum(file.stat().st_size for file in files if file.suffix in WEIGHTS) or None
