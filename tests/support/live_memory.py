# SPDX-License-Identifier: Apache-2.0
"""How many bytes of tensors are alive: counts every tensor that PyTorch gives out while it
watches."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """`peak` bytes of the storages made inside, from their first tensor to the end of their last
    one.

    What an operator uses while it runs, without giving it out, is not seen.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known, self.users = {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {self.key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and (
                self.key(x) in self.users or self.key(x) not in given
            ):
                self.watch(x)
        return result

    @staticmethod
    def key(x):
        return x.untyped_storage()._cdata

    def watch(self, x):
        key = self.key(x)
        if key not in self.users:
            self.users[key], self.known[key] = 0, x.untyped_storage().nbytes()
            self.live += self.known[key]
            self.peak = max(self.peak, self.live)
        self.users[key] += 1
        weakref.finalize(x, self.forget, key)

    def forget(self, key):
        self.users[key] -= 1
        if not self.users[key]:
            del self.users[key]
            self.live -= self.known.pop(key)
