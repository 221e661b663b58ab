"""One of several processes that train `Small` with sharded parameters, in one way after the other.

    python sharded.py RANK PROCESSES DIRECTORY PLAN

Writes into DIRECTORY what comes of each way: the gathered parameters (from rank 0) and what the process says it holds.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors.torch import save_file
from staged import Small
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from train_loop import rows, train

from cpimerge.errors import IncompatibleError
from cpimerge.train import FrozenCores
from cpimerge.train.placement import Placement

SECONDS = 120  # before a process gives up waiting for another
STAGE = 3

Way = Callable[[Path, Accelerator], tuple[Small, FrozenCores | None]]


def accelerated(attach: str) -> Way:
    """FSDP2 by accelerate; cores frozen after the model was sharded, before, or not at all."""

    def run(plan: Path, accelerator: Accelerator) -> tuple[Small, FrozenCores | None]:
        model = Small()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
        frozen = None
        if attach == "early":
            frozen = FrozenCores(plan, model, stage=STAGE)
            frozen.attach(optimizer)
        model, optimizer = accelerator.prepare(model, optimizer)
        if attach == "late":
            frozen = FrozenCores(plan, model, stage=STAGE)
            frozen.attach(optimizer)
        train(model, optimizer, share_of(accelerator), accelerator.backward, accelerator.clip_grad_norm_)
        return model, frozen

    return run


def plain(plan: Path, accelerator: Accelerator) -> tuple[Small, FrozenCores]:
    """PyTorch's `fully_shard`, of one part on its own and then of all."""
    model = Small()
    fully_shard(model.hidden)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    frozen = FrozenCores(plan, model, stage=STAGE)
    frozen.attach(optimizer)
    train(model, optimizer, share_of(accelerator))
    return model, frozen


def ddp(plan: Path, accelerator: Accelerator) -> tuple[Small, FrozenCores]:
    """Whole parameters on every process, whose gradients are views of buckets."""
    model = Small()
    wrapped = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.05, weight_decay=0.1)
    frozen = FrozenCores(plan, wrapped, stage=STAGE)
    frozen.attach(optimizer)
    train(wrapped, optimizer, share_of(accelerator))
    return model, frozen


def columns(plan: Path, accelerator: Accelerator) -> tuple[Small, FrozenCores]:
    """Matrices by columns, all else on every process; one step by given gradients."""
    mesh = init_device_mesh("cpu", (accelerator.num_processes,))
    model = Small()
    for name, parameter in list(model.named_parameters()):
        part, own = name.split(".")
        placements = [Shard(1) if parameter.dim() == 2 else Replicate()]
        sharded = torch.nn.Parameter(distribute_tensor(parameter.detach(), mesh, placements))
        sharded.grad = distribute_tensor(torch.ones(parameter.shape), mesh, placements)
        setattr(getattr(model, part), own, sharded)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.1)
    frozen = FrozenCores(plan, model, stage=STAGE)
    frozen.attach(optimizer)
    optimizer.step()
    return model, frozen


WAYS: dict[str, Way] = {
    "late": accelerated("late"),
    "early": accelerated("early"),
    "control": accelerated("never"),
    "plain": plain,
    "ddp": ddp,
    "columns": columns,
}


def share_of(accelerator: Accelerator) -> list[torch.Tensor]:
    """The batches' rows that this process has: a half each for two."""
    return [batch.chunk(accelerator.num_processes)[accelerator.process_index] for batch in rows()]


def refused() -> str:
    """What is said of a parameter that is a sum over processes."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    try:
        Placement.of("x", DTensor.from_local(torch.ones(2), mesh, [Partial()]))
    except IncompatibleError as error:
        return str(error)
    return ""


def main(rank: int, processes: int, directory: Path, plan: Path) -> None:
    torch.set_num_threads(1)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ.update({name: str(value) for name, value in places.items()})
    limit = datetime.timedelta(seconds=SECONDS)
    store = f"file://{directory / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=processes, timeout=limit)
    accelerator = Accelerator(cpu=True)
    for state in (PartialState, AcceleratorState):  # on processors, accelerate takes what follows for DDP otherwise
        state._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="no_wrap", cpu_ram_efficient_loading=False
    )
    held: dict[str, object] = {"refused": refused()}
    for name, way in WAYS.items():
        model, frozen = way(plan, accelerator)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters()) == (name != "ddp")
        if frozen is not None:
            held[name] = {"elements": frozen.elements, "nbytes": frozen.nbytes, "tensors": dict(frozen.tensors)}
        gathered = {
            name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().contiguous()
            for name, value in model.named_parameters()
        }
        if rank == 0:
            save_file(gathered, directory / f"{name}.safetensors")
        accelerator.free_memory()  # of this way's model
    (directory / f"held{rank}.json").write_text(json.dumps(held))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
