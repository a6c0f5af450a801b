# SPDX-License-Identifier: Apache-2.0
"""GGUF files, read through the `gguf` package as safetensors files are through theirs.

Their values come in blocks with a scale each (Q8_0, Q6_K, Q5_K, Q4_K and others). A tensor is
dequantised when it is read, so it takes in memory what the dtype or the quantisation that the model
is loaded in takes, and not what it took in the file.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

_SHAPE_FIELD = "comfy.gguf.orig_shape."  # of a tensor whose rows had to be cut to fit the blocks


class GGUFFile:
    """One file: `keys`, `get_tensor` (fp32), `metadata`, and each tensor's `shape` and `dtype`.

    Raises RuntimeError without the package, ValueError for a file that it cannot read.
    """

    def __init__(self, path: Path, device: torch.device | str = "cpu"):
        try:
            import gguf
        except ImportError as error:
            raise RuntimeError(
                f"{path} is a GGUF file, which is read through the package gguf, but that cannot "
                f"be imported ({error}); pip install 'kandinsky-kernels[gguf]'"
            ) from error
        self._path = path
        self._device = device
        self._quants = gguf.quants
        try:
            self._reader = gguf.GGUFReader(str(path))
            self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        # The package checks little, so what is wrong shows as an error of any type.
        except Exception as error:
            raise ValueError(
                f"{path} must be a whole GGUF file, got {_first_line(error)}; download it again"
            ) from error

    @staticmethod
    def is_one(path: Path) -> bool:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"

    def keys(self) -> Iterable[str]:
        return self._tensors.keys()

    def metadata(self) -> dict[str, str]:
        return {}

    def shape(self, name: str) -> tuple[int, ...]:
        field = self._reader.get_field(_SHAPE_FIELD + name)
        if field is not None:
            return tuple(int(field.parts[i][0]) for i in field.data)
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def dtype(self, name: str) -> str:
        return self._tensors[name].tensor_type.name

    def get_tensor(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        try:
            values = self._quants.dequantize(tensor.data, tensor.tensor_type)
            flat = torch.from_numpy(values.astype("float32")).flatten()
            return flat.view(self.shape(name)).to(self._device)
        except Exception as error:
            raise ValueError(
                f"{self._path} must hold values that the package gguf can dequantise, but {name} "
                f"is {self.dtype(name)} ({_first_line(error)}); "
                "take a Q8_0, Q6_K, Q5_K or Q4_K file"
            ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
