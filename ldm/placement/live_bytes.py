"""Peak memory by counting the bytes of all tensors that live at once, which costs no memory on the meta device."""

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within `with LiveBytes() as live:` tensors are counted from their birth; `live.peak` is the most at one time.

    Not counted: tensors that existed before, and what a kernel allocates and frees inside itself.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.bytes = 0
        self.storages: dict[int, tuple[Any, int]] = {}  # address -> weak reference, bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operation, and count the storages that it made."""
        out = func(*args, **(kwargs or {}))
        if not any(value.alias_info for value in func._schema.returns):  # else a view, or in place
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        known = self.storages.get(storage._cdata)
        if known and known[0].expired():  # its address is used again
            self.bytes -= known[1]
        elif known:
            return
        reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        self.storages[storage._cdata] = reference, storage.nbytes()
        self.bytes += storage.nbytes()
        if self.bytes > self.peak:  # unless some have died
            self.storages = {a: s for a, s in self.storages.items() if not s[0].expired()}
            self.bytes = sum(size for _, size in self.storages.values())
            self.peak = max(self.peak, self.bytes)
