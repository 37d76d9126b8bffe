"""Processes and precision: FSDP2, weights gathered once per sampling phase, balanced micro-batches.

torchrun starts the processes; every rank holds a shard of each weight. One process without torchrun
is a world of one: in bf16 it is wrapped too, as FSDP's mixed precision is the only one here; in
fp32 it is a plain model. Three rules prevent deadlocks (trap 21): sampling runs inside `Unsharded`,
where a forward needs no collective, so ranks may decode for different numbers of steps; outside
`Unsharded` every rank runs the same number of forwards and backwards (`balance`); values that
control flow depends on are the same on every rank.

Deliberately missing: tensor, pipeline and context parallelism.
"""
import datetime
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from memory import KEEP_SHARE, total_memory
from model import CausalLM

BACKEND = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


def check_world(replicas: int, prompts_per_step: int = 0) -> None:
    """ValueError, before anything starts, if queries or replicas do not fit the processes."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if prompts_per_step % world:
        raise ValueError(f"prompts_per_step = {prompts_per_step} is not divisible by the {world} "
                         "processes; use a multiple")
    if world % replicas:
        raise ValueError(f"replicas = {replicas} does not divide the {world} processes; use a "
                         "divisor, e.g. the number of nodes")


def pick_device(device: str) -> str:
    """'auto' is the GPU if there is one."""
    found = torch.cuda.is_available()
    if device == "cuda" and not found:
        raise ValueError("device = 'cuda', but torch finds no GPU; use --device=cpu, or install a "
                         "CUDA build of torch")
    return ("cuda" if found else "cpu") if device == "auto" else device


def start(device: str, timeout_minutes: float) -> str:
    """Join torchrun's process group if there is one (failing.run leaves it); -> this rank's device.

    timeout_minutes: a collective that waits longer ends the job, which is assumed to hang.
    """
    device = pick_device(device)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" in os.environ:
        dist.init_process_group(BACKEND[device],
                                timeout=datetime.timedelta(minutes=timeout_minutes))
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def say(*text) -> None:
    """Print on rank 0 only."""
    if rank() == 0:
        print(*text, flush=True)


def shard(model, device: str, *, dtype: str, replicas: int, offload: bool):
    """Wrap in place: every block is an FSDP unit; embedding, final norm and head are in the root.
    One process in fp32 without offload needs no wrapping.

    Master weights, gradients and their reduction are fp32, or updates at lr 1e-6 would round to
    nothing (trap 19); with dtype = 'bfloat16' the gathered copies, and thus all activations, are
    bf16. replicas > 1 is HSDP: shard within a group of world_size / replicas ranks (a node),
    replicate across the groups.
    """
    world = world_size()
    if world == 1 and dtype == "float32" and not offload:
        return model
    if not dist.is_initialized():
        dist.init_process_group(BACKEND[device], store=dist.HashStore(), rank=0, world_size=1)
    shape = (world,) if replicas == 1 else (replicas, world // replicas)
    options = {
        "mesh": init_device_mesh(device, shape,
                                 mesh_dim_names=("replicate", "shard")[-len(shape):]),
        # one process keeps all units gathered, see update.update; None, the default: the root alone
        "reshard_after_forward": None if world > 1 else False,
        "offload_policy": CPUOffloadPolicy() if offload and device == "cuda" else OffloadPolicy(),
        "mp_policy": MixedPrecisionPolicy(param_dtype=getattr(torch, dtype),
                                          reduce_dtype=torch.float32)}
    for block in model.model.layers:
        fully_shard(block, **options)
    return fully_shard(model, **options)


class Unsharded:
    """`with Unsharded(model, ...) as sampler`: a plain model with full weights in `dtype`, to
    sample from. Unwrapped models are sampled from themselves.

    The weights are gathered on entry, unit by unit. Forwards of the sampler use no collective and
    run without FSDP's hooks, which cost a fifth of a small step and cannot be captured in a CUDA
    graph. A sampler of at most KEEP_SHARE of the device's memory keeps this memory between uses, so
    that captured graphs, which read it, stay valid; a larger one is freed on exit.
    """

    def __init__(self, model, *, dtype: str, device: str):
        self.model, self.sampler, self.device, self.kept = model, model, torch.device(device), True
        self.units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        if self.units:
            with torch.device("meta"):
                self.sampler = CausalLM(model.config).to(getattr(torch, dtype))
            if model.compiled:
                self.sampler.compile_blocks()
            size = sum(weight.nbytes for weight in self.sampler.parameters())
            self.kept = size <= KEEP_SHARE * total_memory(self.device)
            if self.kept:
                self.sampler.to_empty(device=self.device)

    @torch.no_grad()
    def __enter__(self):
        if not self.kept:
            self.sampler.to_empty(device=self.device)
        for unit in self.units:
            unit.unshard()
            for copy, weight in zip(self.sampler.parameters(), self.model.parameters(),
                                    strict=True):
                if not isinstance(weight, DTensor):  # of this unit
                    copy.copy_(weight)
            unit.reshard()
        return self.sampler

    def __exit__(self, *_):
        if not self.kept:
            self.sampler.to_empty(device="meta")


def gather(items: list) -> list:
    """All-gather: the lists of all ranks concatenated in rank order, on every rank."""
    if world_size() == 1:
        return items
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def check_shared(out_dir: str, first_step: int) -> None:
    """ValueError unless all processes found the same checkpoint in out_dir."""
    steps = sorted(set(gather([first_step])))
    if len(steps) > 1:
        raise ValueError(f"out_dir = {out_dir} holds checkpoints up to step {steps[-1]} for some "
                         f"processes and up to {steps[0]} for others; use one folder that all "
                         "nodes share")


def microbatches(lengths: list[int], tokens_per_microbatch: int) -> list[list[int]]:
    """Row indices sorted by length, split so that no padded micro-batch exceeds the token budget.

    Lengths [9, 3, 8, 4] and a budget of 18 give [[0, 2], [3, 1]]. A row longer than the budget gets
    a micro-batch of its own.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        # batches[-1][0] is the longest row of its batch: the padded width
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= tokens_per_microbatch:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def balance(lengths: list[int], tokens_per_microbatch: int) -> list[list[int]]:
    """This rank's micro-batches as row indices; the same number of micro-batches on every rank.

    Micro-batches are cut from all rows of the step, sorted by length, and assigned to ranks
    round-robin, so that long rows are spread evenly. A rank with one fewer gets a micro-batch of
    index len(lengths), where the caller puts a fully masked row (update.microbatches_of).
    """
    batches = microbatches(lengths, tokens_per_microbatch)
    mine = batches[rank()::world_size()]
    return mine + [[len(lengths)]] * (-(-len(batches) // world_size()) - len(mine))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All-gather a sharded tensor (a collective: call on all ranks); a plain tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
