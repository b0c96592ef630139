"""A recorder for the CPU that knows no more of a microbatch than a CUDA graph does: operations and where they write.

Recording runs the Python once, remembers each operation with its tensors, and then undoes what it did to tensors that
were there before. A replay runs the operations again on the same tensors, and puts their results where they were put:
what Python did beside it is not repeated. Numbers that Python read off tensors are as they were, so a model whose
splits depend on its data is out of reach; one that chooses all its experts is not.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Operations(TorchDispatchMode):
    """done: every operation with its arguments and results. before: what storages held that it found and wrote to."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, Any]] = []
        self.made: set[int] = set()
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for index, argument in enumerate(function._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[index] if index < len(args) else kwargs.get(argument.name)
                for written in tensors(given):
                    storage = written.untyped_storage()
                    if address(written) not in self.made and address(written) not in self.before:
                        self.before[address(written)] = storage, storage.clone()
        result = function(*args, **kwargs)
        known = {address(t) for t in tensors((args, kwargs))}
        self.made |= {address(t) for t in tensors(result)} - known - self.before.keys()
        self.done.append((function, args, kwargs, result))
        return result


class Replayed:
    """See the module; as `nmoe.model.microbatch.Recorder`. recorded: how often."""

    def __init__(self) -> None:
        self.recorded = 0

    def first(self, work: Callable[[], Tensor]) -> Tensor:
        return work()

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        self.recorded += 1
        with Operations() as operations:
            result = work()
        for storage, content in operations.before.values():
            storage.copy_(content)

        @torch.no_grad()
        def replay() -> None:
            for function, args, kwargs, results in operations.done:
                sources = {address(t) for t in tensors((args, kwargs))}
                for found, place in zip(tensors(function(*args, **kwargs)), tensors(results), strict=True):
                    if address(place) not in sources:
                        place.copy_(found)

        return result, replay

    def cost(self) -> str:
        return f"{self.recorded} recordings"
