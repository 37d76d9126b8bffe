"""The run directory: checkpoints, metrics and rollouts.

    out_dir/step_000040/     a Hugging Face folder (transformers loads it), and beside the weights:
        optimizer/           AdamW moments (torch.distributed.checkpoint: N ranks save, M load)
        meta.json            format, step, config, held-out Pass@1; written last: a folder without
                             meta.json is ignored
    out_dir/metrics.jsonl    one row per step
    out_dir/rollouts/        every rollout and reflection of every step

Checkpoints are written under a temporary name and renamed, so a kill at any moment leaves the
previous one usable. Data order, sampling noise and learning rate are functions of the step counter:
there is no RNG state to save (trap 22).
"""
import copy
import datetime
import json
import os
import shutil
import warnings
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import jsonl
from configurator import diff_configs
from hf import find_folder, save_hf
from parallel import rank, world_size

# Without a process group dcp warns on every save and load.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or")

FORMAT = 1  # checkpoint format version; read_meta rejects any other

# Knobs that may change on resume: they affect execution and output, not what is learned.
MAY_CHANGE = {"resume", "device", "threads", "max_rows", "eval_interval", "eval_samples",
              "save_interval", "keep_last", "out_dir", "replicas", "offload", "timeout_minutes",
              "async_save", "log_to", "checkpoint_activations", "tokens_per_microbatch", "compile"}


def keep_log(path: Path, last_step: int) -> None:
    """Drop the rows after last_step from metrics.jsonl: a resumed run repeats the steps after its
    last checkpoint. A last line that a kill left incomplete is dropped too."""
    jsonl.write(path, [row for row in jsonl.read(path) if row["step"] <= last_step])


def checkpoints(out_dir: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    return sorted(folder for folder in out_dir.glob("step_*") if (folder / "meta.json").is_file())


def newest(out_dir: str | Path) -> str:
    """Path of the checkpoint that --resume=True would load, as text for messages."""
    found = checkpoints(Path(out_dir))
    return str(found[-1]) if found else "the start, as there is no checkpoint yet"


def read_meta(folder: Path) -> dict:
    """Load meta.json of a checkpoint; ValueError if its format is not FORMAT."""
    meta = json.loads((folder / "meta.json").read_text())
    if meta.get("format") != FORMAT:
        raise ValueError(f"{folder} has checkpoint format {meta.get('format')}, this code reads "
                         f"{FORMAT}; resume with the version that wrote it, or start a new run "
                         f"with --init_from={folder} and another out_dir")
    return meta


class Saver:
    """Writes the checkpoints of a run, one at a time; every rank constructs it and makes each call.

    background: the state is copied to host memory and written by a thread while training continues.
    Exceptions of the thread are raised by the next `check`, `save` or `wait`.
    """

    def __init__(self, tokenizer, config: dict, *, background: bool = False):
        self.out, self.config = Path(config["out_dir"]), config
        # deep copy: fast tokenizers are not thread-safe
        self.tokenizer = copy.deepcopy(tokenizer)
        self.thread = ThreadPoolExecutor(1) if background else None
        self.pending: Future | None = None
        self.group, self.first = None, rank() == 0
        # separate process group: two threads must not issue collectives on the same group
        if world_size() > 1:
            timeout = datetime.timedelta(minutes=config["timeout_minutes"])
            self.group = dist.new_group(backend="gloo", timeout=timeout)
        if self.first:
            # partial folders that a killed run was writing or deleting
            for partial in [*self.out.glob(".step_*"), *self.out.glob(".final")]:
                shutil.rmtree(partial)

    def save(self, folder: Path, model, optimizer, step: int, pass1: float | None = None) -> None:
        """Write one checkpoint, then delete all but the newest keep_last and the best by held-out
        pass1.

        ValueError if the write fails (disk full): older checkpoints stay intact and the message
        names the newest.
        """
        self.wait()
        background = self.thread is not None
        weights = get_model_state_dict(
            model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        # all updates so far were skipped: torch initialises the state by a step with zero gradient
        # and counts that step
        if not optimizer.state:
            get_optimizer_state_dict(model, optimizer)
            for state in optimizer.state.values():
                state["step"].zero_()
        moments = get_optimizer_state_dict(
            model, optimizer, options=StateDictOptions(cpu_offload=background))
        meta = {"format": FORMAT, "step": step, "eval/pass1": pass1, "config": self.config}
        if not background:
            return self._write(folder, model, weights, moments, meta)
        # on a CPU cpu_offload returns the live tensors, on a GPU copies
        if next(model.parameters()).device.type == "cpu":
            weights, moments = copy.deepcopy((weights, moments))
        self.pending = self.thread.submit(self._write, folder, model, weights, moments, meta)

    def check(self) -> None:
        """Raise the background thread's exception, if any, without blocking."""
        if self.pending and self.pending.done():
            self.wait()

    def wait(self) -> None:
        """Block until the pending write has finished; raise its exception, if any."""
        pending, self.pending = self.pending, None
        if pending:
            pending.result()

    def _write(self, folder: Path, model, weights: dict, moments: dict, meta: dict) -> None:
        partial = folder.with_name("." + folder.name)
        try:
            if self.first:
                save_hf(model, self.tokenizer, partial, state_dict=weights)
            dcp.save({"optimizer": moments}, checkpoint_id=partial / "optimizer",
                     process_group=self.group, no_dist=self.group is None)
            if self.first:  # all ranks have written their shards
                (partial / "meta.json").write_text(json.dumps(meta, indent=1))
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(partial, folder)
        # what the three writers raise on a full disk
        except (OSError, SafetensorError, CheckpointException) as e:
            shutil.rmtree(partial, ignore_errors=True)
            raise ValueError(f"cannot save {folder} ({' '.join(str(e).split())}); free space, then "
                             f"--resume=True goes on from {newest(self.out)}") from e
        if self.first:
            self._delete_old()
        if self.group:
            # no rank reports the checkpoint or exits before it is complete
            dist.barrier(self.group)

    def _delete_old(self) -> None:
        found = checkpoints(self.out)
        pass1 = {folder: read_meta(folder)["eval/pass1"] for folder in found}
        measured = [folder for folder in found if pass1[folder] is not None]
        best = max(measured, key=pass1.get, default=None)
        for old in found[:-self.config["keep_last"]]:
            if old != best:
                # rename to a hidden name first: a kill must not leave half a checkpoint
                shutil.rmtree(old.rename(old.with_name("." + old.name)))


def load_optimizer(folder: Path, model, optimizer) -> None:
    """Restore AdamW's moments from a checkpoint written by any number of ranks. ValueError if the
    files are incomplete or belong to another model."""
    moments = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    try:
        dcp.load(moments, checkpoint_id=folder / "optimizer", no_dist=world_size() == 1)
    except (OSError, CheckpointException) as e:
        raise ValueError(f"cannot read AdamW's moments in {folder / 'optimizer'} "
                         f"({' '.join(str(e).split())[:300]}); copy the whole checkpoint again, or "
                         f"start a new run with --init_from={folder} and another out_dir") from e
    set_optimizer_state_dict(model, optimizer, moments["optimizer"])


def weights_mark(init_from: str) -> str:
    """Cheap fingerprint of a model's weights: CRC-32 of the name, size and last MiB of each
    safetensors file (for a hub id, in the local copy)."""
    mark = 0
    for path in sorted(find_folder(init_from).glob("*.safetensors")):
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 2 ** 20))
            mark = zlib.crc32(file.read(), zlib.crc32(f"{path.name} {size}".encode(), mark))
    return f"{mark:08x}"


def check_same_model(folder: str, config, init_from: str, ref_config) -> None:
    """ValueError if the checkpoint to resume and the model in init_from differ in ModelConfig: the
    model in the init_from folder has been replaced since the run began."""
    if changed := diff_configs(asdict(ref_config), asdict(config)):
        raise ValueError(f"{folder} is not a checkpoint of the model in init_from = {init_from}: "
                         f"{'; '.join(changed)}; put that model back, or start a new run with "
                         f"--init_from={folder} and another out_dir")


def find_start(config: dict) -> tuple[int, str]:
    """(steps already done, folder to load the policy from): init_from, or with resume the last
    checkpoint of out_dir.

    ValueError if out_dir holds a run and resume is False, or if a knob outside MAY_CHANGE differs
    from the checkpoint's.
    """
    out = Path(config["out_dir"])
    there = next(path for path in (out, *out.absolute().parents) if os.path.exists(path))
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"out_dir = {out}: {there} is no folder that can be written to; choose "
                         "another")
    found = checkpoints(out)
    if not config["resume"]:
        # a run that died in its first step has logged nothing and may be overwritten
        if jsonl.read(out / "metrics.jsonl"):
            raise ValueError(f"out_dir = {out} already holds a run; continue it with "
                             "--resume=True, or choose another out_dir")
        return 0, config["init_from"]
    if not found:
        if os.environ.get("RANK", "0") == "0":
            print(f"no checkpoint in {out}: starting from {config['init_from']}")
        return 0, config["init_from"]
    meta = read_meta(found[-1])
    changed = [line for line in diff_configs(meta["config"], config)
               if line.split(":")[0] not in MAY_CHANGE]
    if changed:
        raise ValueError(f"resume = True, but the config has changed since {found[-1]}: "
                         f"{'; '.join(changed)}; set these back, or start a new run with "
                         f"--init_from={found[-1]} and another out_dir")
    return meta["step"], str(found[-1])
