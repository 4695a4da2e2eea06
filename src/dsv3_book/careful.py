"""The careful reader of a checkpoint's files: refuses a foreign one rather than run what it says.

torch.distributed.checkpoint keeps its table of contents (`.metadata`) as a pickle, and a pickle can run code when it is
read. This reader's unpickler knows nothing but that table's own classes; the tensors torch reads with `weights_only`.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and what to do."""


class _Unpickler(pickle.Unpickler):
    """Knows the classes of a checkpoint's table of contents, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        table = module == "torch.distributed.checkpoint.metadata"
        storage = (module, name) == ("torch.distributed.checkpoint.filesystem", "_StorageInfo")
        layout = (module, name) == ("torch.serialization", "_get_layout")
        path = module.split(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath", "PurePosixPath", "Path")
        value = module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype))
        if (table and "." not in name) or storage or layout or path or value:
            return super().find_class(module, name)
        raise CheckpointError(f"the checkpoint's .metadata names {module}.{name}, which has no place there: refused")


class Reader(FileSystemReader):
    """torch's reader with the careful unpickler; refuses entries that are not tensors, which torch would unpickle."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        file = Path(self.path) / ".metadata"
        try:
            with file.open("rb") as stream:
                metadata = _Unpickler(stream).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{file} is damaged ({error})") from None
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"{file} holds no checkpoint's table of contents")
        strange = [k for k, v in metadata.state_dict_metadata.items() if not isinstance(v, TensorStorageMetadata)]
        if strange:
            raise CheckpointError(f"{file} lists entries that are not tensors: {strange[:5]}")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def table(self) -> dict[str, TensorStorageMetadata]:
        """Name, shape and place of every tensor."""
        entries = self.read_metadata().state_dict_metadata
        return {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
