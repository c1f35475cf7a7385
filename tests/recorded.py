"""CUDA graphs without CUDA: what a recording would launch, kept as operations on the tensors that they use."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class RecordedGraph(TorchDispatchMode):
    """Stands for `torch.cuda.CUDAGraph`: keeps each operation with its tensors, and runs them again on the same memory.

    As with a real one, recording computes nothing: what was written then is NaN until the first replay.
    """

    made = 0

    def __init__(self):
        super().__init__()
        self.operations = []
        RecordedGraph.made += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def written(self):
        """Each operation, and those of its outputs that are no view of an input."""
        for func, args, kwargs, out in self.operations:
            read = {memory_of(t) for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
            fresh = [t for t in tree_leaves(out) if torch.is_tensor(t)]
            yield func, args, kwargs, out, [t for t in fresh if memory_of(t) not in read]

    def replay(self):
        for func, args, kwargs, out, fresh in self.written():
            again = tree_leaves(func(*args, **kwargs))
            for old, new in zip(tree_leaves(out), again, strict=True):
                if any(old is t for t in fresh):
                    old.copy_(new)


@contextmanager
def record(graph, stream=None, capture_error_mode="global"):
    """Stands for `torch.cuda.graph`."""
    with graph:
        yield
    for *_, fresh in graph.written():
        for tensor in fresh:
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)


def record_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> type[RecordedGraph]:
    """Let graphs be recorded without CUDA; returns the class that counts them."""
    RecordedGraph.made = 0
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    return RecordedGraph


def memory_of(tensor):
    return tensor.untyped_storage()._cdata
