"""What a piece of code needs, counted while it runs: bytes alive at the peak, floating-point operations, and traffic.

    with torch.device("meta"):
        model = build()
    with pretend(gpu=True):
        enter(model)
        with count(model.parameters()) as needs:
            model(torch.zeros(8, 3, 512, 512)).sum().backward()
    needs.peak, flops(needs.operations), seconds(needs.operations, speed)

Counted are the storages of tensors and the operations that PyTorch dispatches. Under `pretend` tensors have shapes and
no memory, so the code of a model of any size runs here; without it the same code is counted at work. What kernels
allocate within themselves, and what an allocator keeps in reserve, is not counted.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
    shape_wrapper,
)

from terrasynth.models import mmdit

__all__ = [
    "Needs",
    "Operations",
    "Speed",
    "checkpoint",
    "count",
    "enter",
    "flops",
    "flops_by_module",
    "nbytes",
    "pretend",
    "seconds",
]

#: How often there was an operation of so many floating-point operations and bytes read and written, and whether it
#: was computed in half precision.
Operations = Counter[tuple[int, int, bool]]

_aten = torch.ops.aten
#: Attention kernels that the counter of PyTorch does not know.
_ATTENTION: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest, **options: sdpa_flop_count(q, k, v),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda out, q, k, v, *rest, **options: sdpa_backward_flop_count(out, q, k, v)
    ),
}
_FORMULAS = {**flop_registry, **{kernel: shape_wrapper(formula) for kernel, formula in _ATTENTION.items()}}
#: What autocast computes in float32 on a GPU, though not on a CPU, of what our networks use.
_FLOAT32_ON_GPU = frozenset((F.layer_norm, F.group_norm, F.softmax, torch.softmax, Tensor.softmax, F.cross_entropy))


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages under some tensors, each counted once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({id(storage): storage.nbytes() for storage in storages}.values())


@dataclass(frozen=True)
class Speed:
    """What a machine does in a second.

    Attributes:
        float32: floating-point operations of matrix products in single precision.
        bfloat16: the same in half precision.
        memory: bytes read and written.
    """

    float32: float
    bfloat16: float
    memory: float


def flops(operations: Operations) -> int:
    """Floating-point operations of all of them."""
    return sum(arithmetic * times for (arithmetic, _, _), times in operations.items())


def seconds(operations: Operations, speed: Speed) -> float:
    """Time of all of them, if each takes what its arithmetic takes or what its traffic takes, the longer of both.

    This is the roofline of Williams et al. 2009, operation by operation.
    """
    return sum(
        times * max(arithmetic / (speed.bfloat16 if half else speed.float32), traffic / speed.memory)
        for (arithmetic, traffic, half), times in operations.items()
    )


class Needs(TorchDispatchMode):
    """What was needed so far by the operations under this mode.

    Attributes:
        peak: most bytes alive at one time: of storages that operations returned and somebody still holds, with those
            that were held from the beginning.
        operations: what was done. Arithmetic is that of matrix products, convolutions and attention, a multiply-add as
            two; traffic is every tensor that goes in or comes out, once.
    """

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.operations: Operations = Counter()
        self._known: dict[int, weakref.ref[Any]] = {}
        for tensor in held:
            self._add(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # a question about a pretended tensor
            return result
        returned = _tensors(result)
        for tensor in returned:
            self._add(tensor)
        if not func.is_view:
            given = _tensors((args, kwargs))
            formula = _FORMULAS.get(func.overloadpacket)
            arithmetic = 0 if formula is None else formula(*args, **(kwargs or {}), out_val=result)
            half = bool(given) and given[0].dtype in (torch.bfloat16, torch.float16)
            self.operations[arithmetic, sum(map(_traffic, (*given, *returned))), half] += 1
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return

        def free(_: object) -> None:
            del self._known[key]
            self.now -= size

        # The Python object of a storage lives as long as its memory.
        self._known[key] = weakref.ref(storage, free)
        self.now += size
        self.peak = max(self.peak, self.now)


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _traffic(tensor: Tensor) -> int:
    # An expanded tensor is read once for all its rows.
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


@contextmanager
def count(held: Iterable[Tensor] = ()) -> Iterator[Needs]:
    """Count what the block needs; `held` tensors are in memory already."""
    needs = Needs(held)
    with needs:
        yield needs


def flops_by_module(function: Callable[[], object], group: Callable[[str], str]) -> dict[str, int]:
    """Floating-point operations of a forward pass by groups of modules.

    Args:
        function: the forward pass.
        group: name of a module, beginning with the class of the outermost one that was called, as
            `MaskMMDiT.transformer_blocks.3.ff.net.2`, to the name of its group; the name is empty for what belongs to
            no module. A module counts for what it does itself, without the modules in it.
    """
    # Not used for more than this: in a backward pass it keeps checkpointed activations alive.
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
        function()
    counts = {name: sum(by_op.values()) for name, by_op in counter.get_flop_counts().items()}
    own = {"" if name == "Global" else name: total for name, total in counts.items()}
    for name in counts.keys() - {"Global"}:
        parts = name.split(".")
        above = (".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1))
        own[next((parent for parent in above if parent in counts), "")] -= counts[name]
    groups: dict[str, int] = {}
    for name, total in own.items():
        if total:
            groups[group(name)] = groups.get(group(name), 0) + total
    return groups


class _OnGPU(TorchFunctionMode):
    """Under autocast, computes in float32 what a GPU would."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _FLOAT32_ON_GPU and torch.is_autocast_enabled("cpu"):
            args = tree_map_only(Tensor, lambda x: x.float() if x.is_floating_point() else x, args)
        return func(*args, **(kwargs or {}))


def checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """PyTorch's gradient checkpointing, which within `pretend` also recomputes as a GPU would if it computed so."""
    modes = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, _OnGPU)]
    again = (lambda: (nullcontext(), _OnGPU())) if modes else (lambda: (nullcontext(), nullcontext()))
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, context_fn=again)


@contextmanager
def pretend(*, gpu: bool) -> Iterator[None]:
    """Tensors made in the block have shapes and no memory, and what is computed with them takes no time.

    Args:
        gpu: compute as a GPU does: attention is fused at every size, and autocast leaves norms in float32. Their device
            is called `cpu` all the same: without a driver, PyTorch can not differentiate on a pretended GPU.
    """
    plain = mmdit.PLAIN_ATTENTION
    mmdit.PLAIN_ATTENTION = 0 if gpu else plain
    try:
        if gpu:
            with FakeTensorMode(), _OnGPU():
                yield
        else:
            with FakeTensorMode():
                yield
    finally:
        mmdit.PLAIN_ATTENTION = plain


def enter(module: nn.Module) -> None:
    """Turn the meta tensors of a module into pretended ones, in place; to be called within `pretend`.

    A module is built on the meta device, and not as pretended from the first, because pretended parameters can not be
    moved or cast (PyTorch would swap them, and refuses to).
    """
    made: dict[int, Tensor] = {}  # a tensor that is shared stays so
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    if id(tensor) not in made:
                        made[id(tensor)] = _pretended(tensor)
                    tensors[name] = made[id(tensor)]  # type: ignore[assignment]


def _pretended(tensor: Tensor) -> Tensor:
    empty = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
