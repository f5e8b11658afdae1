"""Checkpoints of a sharded run: a folder of torch.distributed.checkpoint, of which each rank has written its part.

Weights and optimizer stand in it under the names of the weights, so that any number of ranks and any strategy can go
on. `meta.pt` has everything else, `sealed.json` the step and the SHA-256 of every file: it is written last, and without
it there is no checkpoint. Nothing is unpickled but what torch itself writes there.
"""

import hashlib
import io
import json
import pickle
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

SEAL, META = "sealed.json", "meta.pt"
METADATA = "torch.distributed.checkpoint.metadata"
ALLOWED = {
    *((METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata")),
    *((METADATA, name) for name in ("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
}
"""Of what DCP's own description of tensors is made; none of it runs anything."""


def write(folder: Path, tensors: dict[str, Tensor]) -> None:
    """The parts that this rank has; all ranks call it together."""
    dcp.save(tensors, checkpoint_id=folder)


def sums_of(folder: Path, rank: int) -> dict[str, str]:
    """The SHA-256 of the files that a rank has written."""
    return {file.name: sha256(file) for file in folder.glob(f"__{rank}_*")}


def seal(folder: Path, rest: dict[str, object], sums: dict[str, str]) -> None:
    """Writes what is no tensor, and then the sums of all files."""
    torch.save(rest, folder / META)
    sums = sums | {name: sha256(folder / name) for name in (META, ".metadata")}
    (folder / SEAL).write_text(json.dumps({"step": rest.get("global_step", 0), "sha256": sums}, indent=1))


def fault(folder: Path) -> str | None:
    """What is wrong with a folder; None where it is what was written."""
    try:
        sums = json.loads((folder / SEAL).read_text())["sha256"]
        for name, digest in sums.items():
            if sha256(folder / name) != digest:
                return f"the SHA-256 of {name} is not the one it was written with"
    except (OSError, ValueError, KeyError) as error:
        return f"it was not written to its end ({type(error).__name__}: {error})"
    return None


def step_of(folder: Path) -> int:
    return int(json.loads((folder / SEAL).read_text())["step"])


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        is_kind = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in ALLOWED or is_kind:
            return super().find_class(module, name)
        raise ValueError(f"a sharded checkpoint names {module}.{name}, which is no part of one; code is never run")


class Reader(dcp.FileSystemReader):
    """torch's would run whatever the folder's description says."""

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        found = _Unpickler(io.BytesIO((Path(self.path) / ".metadata").read_bytes())).load()
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


def rest_of(folder: Path) -> dict[str, object]:
    return torch.load(folder / META, map_location="cpu", weights_only=True)


def contents(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and kind of every tensor in a folder."""
    of_all = Reader(folder).read_metadata().state_dict_metadata
    return {name: (x.size, x.properties.dtype) for name, x in of_all.items() if isinstance(x, TensorStorageMetadata)}


def load_into(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fills tensors, each rank its part; where there are no ranks, whole ones."""
    dcp.load(tensors, storage_reader=Reader(folder), no_dist=not dist.is_initialized())


def read_whole(folder: Path) -> dict[str, Tensor]:
    """Every tensor, whole, in the memory of this process, without the others."""
    found = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in contents(folder).items()}
    dcp.load(found, storage_reader=Reader(folder), no_dist=True)
    return found
