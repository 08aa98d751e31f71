"""Train a small model with FSDP2, beside the same training in a single process.

On CPUs (gloo) or, unchanged, on GPUs (nccl). The second command takes up where the first one ended,
on another number of ranks::

    torchrun --nproc-per-node 4 examples/fsdp2_train.py --steps 20 --checkpoint run
    torchrun --nproc-per-node 3 examples/fsdp2_train.py --steps 40 --checkpoint run --draw loss.png

Both losses are printed; how far they are apart is only the rounding of sums in another order.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fused_adafactor import Adafactor

BATCH, FEATURES, LR = 48, 30, 2e-2


def make_model(device: torch.device) -> nn.Module:
    """The same on all ranks; its sizes are no multiples of anything."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in ((FEATURES, 97), (97, 61), (61, 5)):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).to(device)


def loss_of(
    model: nn.Module, step: int, rank: int, world: int, device: torch.device
) -> torch.Tensor:
    """Of a rank's share of a step's batch; the mean over ranks is the loss of all of it."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(BATCH, FEATURES, generator=generator)
    targets = (2 * inputs[:, :5] - inputs[:, 5:10]).tanh()
    mine = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    error = model(inputs[mine].to(device)) - targets[mine].to(device)
    return error.square().sum() * world / targets.numel()


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """Nothing here knows whether the model is distributed."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def draw(losses: list[tuple[float, float]], start: int, path: Path) -> None:
    """Both losses over the steps; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    distributed, single = zip(*losses, strict=True)
    steps = range(start + 1, start + len(losses) + 1)
    axes.plot(steps, single, linewidth=5, alpha=0.3, label="a single process")
    axes.plot(steps, distributed, linewidth=1, label="FSDP2")
    axes.legend()
    figure.savefig(path)


def save(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, path: Path) -> None:
    """Each rank saves its parts."""
    parts = get_state_dict(model, optimizer)
    state = {"model": parts[0], "optimizer": parts[1], "steps": torch.tensor(steps)}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(path, overwrite=True))


def resume(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> int:
    """Load what any number of ranks has saved; returns how many steps that were, 0 for none."""
    if not (path / ".metadata").exists():
        return 0
    parts = get_state_dict(model, optimizer)
    state = {"model": parts[0], "optimizer": parts[1], "steps": torch.tensor(0)}
    dcp.load(state, checkpoint_id=path)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    return int(state["steps"])


def compare(found: list[float], start: int, device: torch.device, picture: Path | None) -> None:
    """Take all steps in this process too, and print both losses."""
    model = make_model(device)
    optimizer = Adafactor(model.parameters(), lr=LR)
    both = []
    print(f"step  {dist.get_world_size()} ranks   one process")
    for step in range(start + len(found)):
        loss = loss_of(model, step, 0, 1, device)
        take_step(model, optimizer, loss)
        if step >= start:
            both.append((found[step - start], float(loss.detach())))
            if step % 5 == 4:
                print(f"{step + 1:4d}  {both[-1][0]:.6f}  {both[-1][1]:.6f}")
    apart = max((abs(a - b) for a, b in both), default=0.0)
    print(f"{len(both)} steps after {start}; losses at most {apart:.1e} apart")
    if picture is not None:
        draw(both, start, picture)


def main() -> None:
    """Train, save, and compare."""
    parser = argparse.ArgumentParser(description="Adafactor under FSDP2, beside a single process.")
    parser.add_argument("--steps", type=int, default=20, help="steps in all, also those before")
    parser.add_argument("--checkpoint", type=Path, help="folder to resume from, and to save to")
    parser.add_argument("--draw", type=Path, help="picture of both losses (needs matplotlib)")
    args = parser.parse_args()

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind, int(os.environ["LOCAL_RANK"]) if kind == "cuda" else None)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(kind, (world,))

    model = make_model(device)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = Adafactor(model.parameters(), lr=LR)

    start = 0 if args.checkpoint is None else resume(model, optimizer, args.checkpoint)
    found = []
    for step in range(start, args.steps):
        loss = loss_of(model, step, rank, world, device)
        take_step(model, optimizer, loss)
        mean = loss.detach() / world
        dist.all_reduce(mean)
        found.append(float(mean))
    if args.checkpoint is not None:
        save(model, optimizer, args.steps, args.checkpoint)
    if rank == 0:
        compare(found, start, device, args.draw)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
