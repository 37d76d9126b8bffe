"""Many processes: explicit FSDP2, weights gathered once for sampling, work dealt evenly, one reduction of sums.

torchrun starts the processes; without it there is one, no process group and no wrapping. Every rank owns a slice of each
weight. Three rules keep ranks together (trap 21): sampling runs inside `unsharded`, where forwards need no collective, so
ranks may decode for different lengths of time; outside it every rank runs the same number of forwards and backwards
(`balance` fills up with rows of zero weight); whatever decides control flow is the same on every rank.

Deliberately missing: tensor, pipeline and context parallelism, a second copy of the weights for sampling.
"""
import contextlib
import datetime
import functools
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from metrics import add_up
from model import CausalLM
from rollout import Rollout, microbatches


def check_world(replicas: int, prompts_per_step: int = 0) -> None:
    """ValueError, before anything is started, if torchrun's processes cannot be divided so, or queries not among them."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if prompts_per_step % world:
        raise ValueError(f"prompts_per_step = {prompts_per_step} is not divisible by the {world} processes; use a multiple")
    if world > 1 and (replicas < 1 or world % replicas):
        raise ValueError(f"replicas = {replicas} does not divide the {world} processes; use a divisor, e.g. the number of nodes")


def pick_device(device: str) -> str:
    """'auto' is the GPU where there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def start(device: str, timeout_minutes: float) -> tuple[int, int, str]:
    """(rank, world size, device of this process). Joins torchrun's process group if there is one; failing.run leaves it.

    timeout_minutes: how long a collective may wait before the job is taken for hung and ended.
    """
    device = pick_device(device)
    if "RANK" not in os.environ:
        return 0, 1, device
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
                            timeout=datetime.timedelta(minutes=timeout_minutes))
    return dist.get_rank(), dist.get_world_size(), device


def shard(model, device: str, *, dtype: str, replicas: int, offload: bool):
    """Wrap in place: every block is a unit that is gathered when it runs, embedding + final norm + head are the root's.

    Masters, gradients and their reduction are fp32; with dtype = 'bfloat16' the gathered copies are bf16. replicas > 1 is
    HSDP: shard within a group of world_size / replicas ranks (a node), replicate across the groups.
    """
    world = dist.get_world_size()
    mesh = (init_device_mesh(device, (world,)) if replicas == 1 else
            init_device_mesh(device, (replicas, world // replicas), mesh_dim_names=("replicate", "shard")))
    options = {
        "mesh": mesh, "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
        "mp_policy": MixedPrecisionPolicy(param_dtype=getattr(torch, dtype), reduce_dtype=torch.float32)}
    for block in model.model.layers:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def precision(c, world: int, device: str) -> tuple:
    """(wrap, autocast): how to shard a model (None with one process), and the context to run it in.

    bf16 is for products only: weights, gradients and AdamW's moments stay fp32, or lr 1e-6 would move nothing (trap 19).
    With one process autocast makes the bf16 copies, with several FSDP does when it gathers.
    """
    if world > 1:
        wrap = functools.partial(shard, device=device, dtype=c.dtype, replicas=c.replicas, offload=c.offload)
        return wrap, contextlib.nullcontext()
    return None, torch.autocast(device, dtype=torch.bfloat16, enabled=c.dtype == "bfloat16")


@contextlib.contextmanager
def unsharded(model):
    """Gather every unit once and yield a plain model made of the gathered tensors themselves, to sample with: its forwards
    (under no_grad) use no collective, and FSDP's hooks, which cost a fifth of a small step and cannot be recorded
    (rollout.record), do not run. Use nothing else inside: a forward of `model` itself would take the tensors away. A model
    that is not sharded is yielded as it is."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not units:
        yield model
        return
    with torch.device("meta"):
        plain = CausalLM(model.config)
    try:
        for unit in units:
            unit.unshard()
        plain.load_state_dict(dict(model.named_parameters()), assign=True)  # in the dtype of FSDP's mixed precision
        if model.compiled:
            plain.compile_blocks()
        yield plain
    finally:
        for unit in units:
            unit.reshard()


def gather(items: list) -> list:
    """The lists of all ranks, one after the other, on every rank."""
    if not dist.is_initialized():
        return items
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def check_shared(out_dir: str, first_step: int) -> None:
    """ValueError unless all processes found the same checkpoint in out_dir."""
    steps = sorted(set(gather([first_step])))
    if len(steps) > 1:
        raise ValueError(f"out_dir = {out_dir} holds checkpoints up to step {steps[-1]} for some processes and up to {steps[0]} "
                         "for others; use one folder that all nodes share")


def reduce_sums(sums: dict[str, float]) -> dict[str, float]:
    """Sums of all ranks added up ("_max": the largest); ranks may know different names."""
    total: dict[str, float] = {}
    for part in gather([sums]):
        add_up(total, part)
    return total


def balance(rollouts: list[Rollout], tokens_per_microbatch: int, rank: int, world: int) -> list[list[int]]:
    """This rank's micro-batches, as indices into the rollouts of all ranks; the same number of them on every rank.

    They are cut from the whole step's rollouts sorted by length and dealt like cards, so that every rank gets its share of
    long ones. A rank that comes out short runs a batch with index len(rollouts): the caller puts rollout.FILLER there.
    """
    batches = microbatches(rollouts, tokens_per_microbatch)
    mine = batches[rank::world]
    return mine + [[len(rollouts)]] * (-(-len(batches) // world) - len(mine))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered (on all ranks at once); a plain one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
