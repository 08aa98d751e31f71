"""Parameters that are distributed over processes: which part is here, and sums over all parts.

The only file that knows torch.distributed. What is summed up, and over which processes, follows
from the specs alone, which are the same on all processes but for the parts themselves; so all of
them take part in the same all-reduces, in the same order, with as many numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.distributed
from torch import Tensor

from fused_adafactor.dividing import block_of, refuse_cut_blocks
from fused_adafactor.rule import Rule
from fused_adafactor.spec import Shard, TensorId, TensorSpec, local_of, spec_of, whole_of
from fused_adafactor.state import Entry
from fused_adafactor.summing import Message


def shard_of(id: TensorId, param: Tensor) -> Shard | None:
    """Which part of a parameter this process has; None if it is not distributed.

    Raises:
        TypeError: It is distributed in a way that has no parts: sums that are still to be taken.
        RuntimeError: The part is not where its placements say.
    """
    if not hasattr(param, "placements"):
        return None
    tensor = cast(Any, param)
    mesh, whole = tensor.device_mesh, tuple(param.shape)
    split: list[list[int]] = [[] for _ in whole]
    strided: list[list[int]] = [[] for _ in whole]
    for axis, placement in enumerate(tensor.placements):
        if placement.is_partial():
            raise TypeError(
                f"{id} is a DTensor with placement {placement}, a sum that is still to be taken; "
                "redistribute it to Shard or Replicate before it becomes a parameter"
            )
        dim = getattr(placement, "dim", None)
        if dim is not None and mesh.size(axis) > 1:
            # FSDP2 over tensor parallelism: what the later dimension of the mesh has left of the
            # parameter is split by the earlier one.
            parts = strided if type(placement).__name__ == "_StridedShard" else split
            parts[dim].append(axis)
    over = [(*plain, *later) for plain, later in zip(split, strided, strict=True)]
    blocks = [block_of(size, axes, mesh) for size, axes in zip(whole, over, strict=True)]
    here = tuple(end - begin for begin, end in blocks)
    found = tuple(tensor.to_local().shape)
    if here != found:
        raise RuntimeError(
            f"{id} is a DTensor of shape {whole} with placements {tensor.placements}; expected a "
            f"local tensor of shape {here}, got {found}. Distribute it with distribute_tensor, "
            "fully_shard or parallelize_module"
        )
    return Shard(
        whole=whole,
        strides=tuple(param.stride()),
        offset=tuple(begin for begin, _ in blocks),
        split=tuple(over),
        mesh=mesh,
    )


def described(
    id: TensorId,
    param: Tensor,
    rule: Rule,
    mirror: Tensor | None = None,
    stand_in: Tensor | None = None,
) -> TensorSpec:
    """What this process has of a parameter and its gradient, checked; see ``spec_of``.

    Where there is no gradient, its ``zeros`` stand for one, else what is given, else the parameter.

    Raises:
        TypeError: Also where a gradient is not distributed as its parameter is, and for parameters
            of which there are no parts; see ``shard_of``.
        ValueError: Also where the parameter has lost its shape; see ``check_shape``.
    """
    check_shape(id, param, rule)
    shard, part = shard_of(id, param), local_of(param)
    if param.grad is None:
        given = (zeros_of(param), stand_in, part)
        grad = next(tensor for tensor in given if tensor is not None)
    else:
        _check_grad(id, param, param.grad)
        grad = local_of(param.grad)
    spec = spec_of(id, part, grad, rule, shard, mirror)
    refuse_cut_blocks(spec, rule)
    return spec


_OR_UNFACTORED = "; or flat_parameters='unfactored', which keeps a second moment for each element"


def check_shape(id: TensorId, param: Tensor, rule: Rule) -> None:
    """Refuse a parameter whose shape is not what it means, unless its rule takes such.

    Raises:
        ValueError: It was flattened to be distributed.
    """
    if rule.takes_flat:
        return
    if getattr(param, "_is_flat_param", False) or getattr(param, "_fsdp_flattened", False):
        raise ValueError(
            f"{id} is part of a flat parameter of FSDP1, which has lost the shapes that Adafactor "
            f"factors by. Use fully_shard (FSDP2) or DistributedDataParallel{_OR_UNFACTORED}"
        )
    # Of the parameters of a model, and of the partitions that the optimizer gets for them.
    if hasattr(param, "ds_shape") or hasattr(param, "ds_id"):
        raise ValueError(
            f"{id} is a parameter of DeepSpeed's ZeRO-3, which keeps its parts flat and without "
            "the shapes that Adafactor factors by. Use fully_shard (FSDP2), or ZeRO stage 0"
            f"{_OR_UNFACTORED}"
        )


class Given(NamedTuple):
    """What a param group was made of.

    Attributes:
        ids: Of its parameters, as ``id`` has them.
        had_matrices: Whether any of them has rows and columns.
    """

    ids: frozenset[int]
    had_matrices: bool

    @classmethod
    def of(cls, params: Iterable[Tensor]) -> Given:
        """Note parameters."""
        members = list(params)
        return cls(frozenset(map(id, members)), any(param.dim() > 1 for param in members))


def check_members(number: int, params: Sequence[Tensor], given: Given, rule: Rule) -> None:
    """Refuse a param group whose matrices have been replaced by one vector.

    DeepSpeed's ZeRO-1 and ZeRO-2 do so, and do not mark the vector.

    Raises:
        ValueError: That has been done, and its rule does not take such.
    """
    replaced = len(params) == 1 and params[0].dim() == 1 and id(params[0]) not in given.ids
    if replaced and given.had_matrices and not rule.takes_flat:
        raise ValueError(
            f"the matrices of param group {number} have been replaced by one vector of "
            f"{params[0].numel()} elements, as DeepSpeed's ZeRO does it, so Adafactor has nothing "
            f"to factor. Use fully_shard (FSDP2), or ZeRO stage 0{_OR_UNFACTORED}"
        )


def zeros_of(param: Tensor) -> Tensor | None:
    """What stands here for a gradient that another process may have.

    Every process takes part in the sums of a parameter that is split, so that none waits for
    another. One number in memory, whatever the size.

    Returns:
        None where the parameter has a gradient, or does not need one from any process.
    """
    if param.grad is not None or not param.requires_grad or not _is_split(param):
        return None
    part = local_of(param)
    return torch.zeros((), dtype=part.dtype, device=part.device).expand(part.shape)


def _is_split(param: Tensor) -> bool:
    if not hasattr(param, "placements") or param.numel() == 0:
        return False
    tensor = cast(Any, param)
    sizes = tensor.device_mesh.shape
    return any(
        size > 1 and not placement.is_replicate()
        for size, placement in zip(sizes, tensor.placements, strict=True)
    )


def anywhere(found: bool, params: Iterable[Tensor]) -> bool:
    """Whether something was found on any process that has parts of these parameters.

    Waits for all of them, and for the device.
    """
    for mesh in dict.fromkeys(cast(Any, p).device_mesh for p in params if hasattr(p, "placements")):
        flag = torch.tensor(float(found), device=mesh.device_type)
        for axis in range(mesh.ndim):
            torch.distributed.all_reduce(flag, group=mesh.get_group(axis))
        found = bool(flag)
    return found


def _check_grad(id: TensorId, param: Tensor, grad: Tensor) -> None:
    theirs, ours = getattr(grad, "placements", None), getattr(param, "placements", None)
    if (theirs is None) != (ours is None):
        raise TypeError(
            f"{id} is {'not ' if ours is None else ''}a distributed tensor (DTensor), but its "
            f"gradient is{'' if ours is None else ' not'}; distribute both, or neither"
        )
    if ours is not None and theirs is not None and tuple(theirs) != tuple(ours):
        raise TypeError(
            f"the gradient of {id} has placements {tuple(theirs)} but the parameter {tuple(ours)}; "
            "grad.redistribute(placements=param.placements) before step()"
        )
    if ours is not None:
        meshes = [cast(Any, tensor).device_mesh for tensor in (grad, param)]
        if meshes[0] != meshes[1] and not torch.equal(*(mesh.mesh for mesh in meshes)):
            raise TypeError(
                f"the gradient of {id} is on mesh {meshes[0]} but the parameter on {meshes[1]}; "
                "distribute both over the same processes, in the same order"
            )


def joiner(param: Tensor) -> Callable[[Tensor, Entry], Tensor]:
    """What makes a state entry of a parameter of what this process has of it."""
    if not hasattr(param, "placements"):
        return _alone
    return partial(_join, cast(Any, param))


def _alone(part: Tensor, entry: Entry) -> Tensor:
    return part


def _join(param: Any, part: Tensor, entry: Entry) -> Tensor:
    """A part as a DTensor; one that no dimension of is split is the same on all processes."""
    from torch.distributed.tensor import DTensor

    if not entry.shape:
        return part
    whole = torch.empty(entry.shape, device="meta")
    return DTensor.from_local(
        part,
        param.device_mesh,
        _placements(param, entry),
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def _placements(param: Any, entry: Entry) -> tuple[Any, ...]:
    """How an entry is distributed: where it has a dimension of its parameter, as that is."""
    from torch.distributed.tensor import Replicate, Shard

    placements: list[Any] = [Replicate() for _ in range(param.device_mesh.ndim)]
    for dim, axes in enumerate(entry.split):
        for axis in axes:
            placements[axis] = _moved(param.placements[axis], dim, Shard)
    return tuple(placements)


def _moved(placement: Any, dim: int, plain: Any) -> Any:
    """The same way of splitting, of another dimension."""
    if type(placement) is plain:
        return plain(dim)
    return type(placement)(dim, split_factor=placement.split_factor)


def part_of(value: Tensor, entry: Entry, spec: TensorSpec, param: Tensor) -> Tensor:
    """What this process has of a loaded entry, which may be whole, or distributed in any way.

    One that is distributed in another way than its parameter is gathered first, by all processes.
    """
    if hasattr(value, "placements"):
        loaded, tensor = cast(Any, value), cast(Any, param)
        if (
            spec.shard is not None
            and loaded.device_mesh == tensor.device_mesh
            and tuple(loaded.placements) == _placements(tensor, entry)
        ):
            return local_of(value)
        value = whole_of(value)
    if spec.shard is None or tuple(value.shape) != entry.shape:
        return value
    for dim, axes in enumerate(entry.split):
        if axes:
            begin, end = block_of(entry.shape[dim], axes, spec.shard.mesh)
            value = value.narrow(dim, begin, end - begin)
    return value


class Processes:
    """Sums over processes; keeps the groups that it has made of them."""

    def __init__(self) -> None:
        """Start without any: groups are made by all processes together, in a step."""
        self._groups: dict[tuple[Hashable, tuple[int, ...]], torch.distributed.ProcessGroup] = {}

    def start(self, message: Message) -> Callable[[], None]:
        """Start to sum up a message: one all-reduce, of its memory where that is in one piece.

        Returns:
            What waits for it; then the sums are where the parts were. On a GPU no host waits.
        """
        mesh, buffers = cast(Any, message.mesh), message.buffers
        group = self._group(mesh, message.over)
        # The mesh's device is where its processes talk; CPU-offloaded parameters are not on it.
        if len(buffers) == 1 and buffers[0].device.type == mesh.device_type:
            return _all_reduce(buffers[0], group)
        dtype = max((buffer.dtype for buffer in buffers), key=lambda dtype: dtype.itemsize)
        flat = torch.cat([buffer.to(mesh.device_type, dtype) for buffer in buffers])
        wait = _all_reduce(flat, group)

        def bring_back() -> None:
            wait()
            parts = torch.split(flat, [buffer.numel() for buffer in buffers])
            for buffer, part in zip(buffers, parts, strict=True):
                buffer.copy_(part)

        return bring_back

    def _group(self, mesh: Any, over: tuple[int, ...]) -> torch.distributed.ProcessGroup:
        """The processes that share with this one what is split over dimensions of a mesh."""
        if len(over) == 1:
            return cast(torch.distributed.ProcessGroup, mesh.get_group(over[0]))
        if (mesh, over) not in self._groups:
            # Not mesh._flatten(), which DTensor would find and gather uneven parts wrongly with.
            place = mesh.get_coordinate()
            at = tuple(slice(None) if axis in over else place[axis] for axis in range(mesh.ndim))
            ranks = mesh.mesh[at].flatten().tolist()
            self._groups[mesh, over] = torch.distributed.new_group(
                ranks, use_local_synchronization=True
            )
        return self._groups[mesh, over]


def _all_reduce(flat: Tensor, group: torch.distributed.ProcessGroup) -> Callable[[], None]:
    work = torch.distributed.all_reduce(flat, group=group, async_op=True)

    def wait() -> None:
        assert work is not None
        work.wait()

    return wait
