"""Counts the memory of tensors."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Peak(TorchDispatchMode):
    """The most bytes of new tensors alive at once."""

    def __init__(self, module):
        super().__init__()
        self.alive, self.bytes, self.most = set(), 0, 0
        self.weights = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive or key in self.weights:
            return
        self.alive.add(key)
        self.bytes += size
        self.most = max(self.most, self.bytes)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key, size):
        self.alive.discard(key)
        self.bytes -= size
