"""Applies a function to whole matrices whose rows are sharded over ranks, each matrix on one rank only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def on_whole_matrices(
    function: Callable[[Tensor], Tensor], parts: Sequence[Tensor], parameters: Sequence[Tensor]
) -> list[Tensor]:
    """Apply ``function`` to whole matrices, and return this rank's rows of the results.

    Every rank computes its share of the matrices. Collective: two all-to-alls among the ranks that hold the shards of
    one copy, together twice the bytes of this rank's ``parts``, and an all-gather among the replicas.

    Args:
        function: maps a matrix to one of the same shape and dtype.
        parts: this rank's rows of each matrix, all of one dtype, on the device of the mesh.
        parameters: what the matrices are sharded like: DTensors sharded by FSDP2, or plain tensors.
    """
    if not parts or not isinstance(parameters[0], DTensor):
        return [function(part) for part in parts]
    mesh = parameters[0].device_mesh
    shard, replica = _Axis.of(mesh, "shard"), _Axis.of(mesh, "replicate")
    ranks = replica.size * shard.size
    # Largest first, in turns, to balance the ranks; the order is the same on all of them.
    order = sorted(range(len(parts)), key=lambda i: (-parameters[i].numel(), i))
    owned = [[order[r * shard.size + s :: ranks] for s in range(shard.size)] for r in range(replica.size)]

    mine = owned[replica.rank]
    wholes = _gather(shard, mine, parts, parameters)
    results = _scatter(shard, mine, [function(whole) for whole in wholes], parts, parameters)
    if replica.size > 1:
        results = _share(replica, [[i for each in group for i in each] for group in owned], results, parts)
    return [results[i] for i in range(len(parts))]


@dataclass(frozen=True)
class _Axis:
    """A dimension of the mesh: its process group, its size, and this rank's place in it."""

    group: dist.ProcessGroup | None = None
    size: int = 1
    rank: int = 0

    @classmethod
    def of(cls, mesh: dist.DeviceMesh, name: str) -> _Axis:
        if name not in (mesh.mesh_dim_names or ()):
            return cls()
        axis = mesh[name]
        return cls(axis.get_group(), axis.size(), axis.get_local_rank())


def _gather(
    shard: _Axis, owned: list[list[int]], parts: Sequence[Tensor], parameters: Sequence[Tensor]
) -> list[Tensor]:
    """The whole matrices that this rank owns; ``owned[k]``: those of rank k."""
    mine = owned[shard.rank]
    if shard.size == 1:
        return [parts[i] for i in mine]
    sent = [[parts[i] for i in each] for each in owned]
    shapes = [[(_rows(parameters[i], shard.size)[k], parameters[i].shape[1]) for i in mine] for k in range(shard.size)]
    return [torch.cat(pieces) for pieces in zip(*_all_to_all(shard, sent, shapes, parts[0]))]


def _scatter(
    shard: _Axis,
    owned: list[list[int]],
    results: list[Tensor],
    parts: Sequence[Tensor],
    parameters: Sequence[Tensor],
) -> dict[int, Tensor]:
    """This rank's rows of the results of all ``owned`` matrices, by index; ``results``: those that this rank owns."""
    mine = owned[shard.rank]
    if shard.size == 1:
        return dict(zip(mine, results))
    split = [result.split(_rows(parameters[i], shard.size)) for i, result in zip(mine, results)]
    sent = [[pieces[k] for pieces in split] for k in range(shard.size)]
    shapes = [[tuple(parts[i].shape) for i in each] for each in owned]
    found = _all_to_all(shard, sent, shapes, parts[0])
    return {i: rows for each, received in zip(owned, found) for i, rows in zip(each, received)}


def _share(
    replica: _Axis, owned: list[list[int]], results: dict[int, Tensor], parts: Sequence[Tensor]
) -> dict[int, Tensor]:
    """This rank's rows of all matrices, of which each replica has the results of those that it owns."""
    sizes = [sum(parts[i].numel() for i in each) for each in owned]
    sent = parts[0].new_zeros(max(sizes))  # as large on all ranks
    if mine := owned[replica.rank]:
        sent[: sizes[replica.rank]] = torch.cat([results[i].reshape(-1) for i in mine])
    received = [torch.empty_like(sent) for _ in owned]
    dist.all_gather(received, sent, group=replica.group)
    found = {}
    for each, flat in zip(owned, received):
        pieces = flat[: sum(parts[i].numel() for i in each)].split([parts[i].numel() for i in each])
        found |= {i: piece.view(parts[i].shape) for i, piece in zip(each, pieces)}
    return found


def _rows(parameter: Tensor, ranks: int) -> list[int]:
    """Rows of each rank's shard, as FSDP2 splits them."""
    most = -(-parameter.shape[0] // ranks)
    return [max(0, min(most, parameter.shape[0] - rank * most)) for rank in range(ranks)]


def _all_to_all(
    shard: _Axis, sent: list[list[Tensor]], shapes: list[list[tuple[int, int]]], like: Tensor
) -> list[list[Tensor]]:
    """Send tensors to each rank, and return those received from each, of the given shapes."""
    flat = torch.cat([like.new_empty(0), *(tensor.reshape(-1) for each in sent for tensor in each)])
    sizes = [[rows * columns for rows, columns in each] for each in shapes]
    received = flat.new_empty(sum(map(sum, sizes)))
    counts = [sum(tensor.numel() for tensor in each) for each in sent]
    dist.all_to_all_single(received, flat, [sum(each) for each in sizes], counts, group=shard.group)
    pieces = iter(received.split([size for each in sizes for size in each]))
    return [[next(pieces).view(shape) for shape in each] for each in shapes]
