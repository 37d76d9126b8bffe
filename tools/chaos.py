"""Driver of runs/chaos.sh: kill training at random moments, resume it, and compare it with an
uninterrupted run.

    python -m tools.chaos OUT [ROUNDS [SEED]]     # OUT/model/final and OUT/data must exist

Each round runs every kind of interruption, with one and two processes, with foreground and
background saving:
    one       kill -9 of one rank             SIGTERM   preemption, sent to torchrun
    all       kill -9 of torchrun and ranks   full      file size limit, simulates a full disk
A run passes if it exits within a minute, leaves no unreadable checkpoint or rollout file, and after
resuming has the metrics, rollouts and weights of the uninterrupted run, bit for bit. The exit
status is the number of failed runs.
"""
import filecmp
import itertools
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from safetensors import safe_open

from checkpoint import checkpoints, read_meta

ROOT = Path(__file__).resolve().parents[1]
STEPS, PATIENCE = 6, 60  # seconds
KNOBS = {"max_steps": STEPS, "prompts_per_step": 8, "samples_per_prompt": 8, "n_pos": 1,
"n_neg": 1, "m_max": 2,
         "learning_rate": 3e-3, "warmup_steps": 2,
         "kl_coef": 0.1,  # without a KL term every loss value is 0, as the ratio is 1
         "save_interval": 2, "eval_problems": "", "timeout_minutes": 1.0}


class Run:
    """A training process, or torchrun with its ranks."""

    def __init__(self, out: Path, base: Path, processes: int, launcher: list[str] = (), **knobs):
        knobs = KNOBS | {"out_dir": out, "init_from": base / "model/final",
                         "problems": base / "data/train.jsonl"} | knobs
        if processes > 1:
            launcher = launcher or ["-m", "torch.distributed.run", "--standalone",
                                    f"--nproc_per_node={processes}"]
        command = [sys.executable, *launcher, "train.py",
                   "config/toy.py", *(f"--{key}={value}" for key, value in knobs.items())]
        self.out, self.processes, self.lines = out, processes, []
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, text=True)
        # a pipe, not a file: the file size limit must not apply to console output
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout))
        self.reader.start()

    def ranks(self) -> list[int]:
        return children(self.process.pid) if self.processes > 1 else [self.process.pid]

    def rows(self) -> int:
        log = self.out / "metrics.jsonl"
        return log.read_text().count("\n") if log.exists() else 0

    def end(self, seconds: float) -> float:
        """Wait for the process to exit -> seconds waited; TimeoutExpired if it hangs."""
        began = time.time()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            for pid in [*self.ranks(), self.process.pid]:
                kill(pid, signal.SIGKILL)
            raise
        self.reader.join()
        return time.time() - began


def children(pid: int) -> list[int]:
    try:
        return [int(child)
                for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def runs_still(pid: int) -> bool:
    """Is the process running? A zombie that waits to be reaped does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def interrupt(run: Run, kind: str, rng: random.Random) -> None:
    ranks = run.ranks()
    if kind == "one":
        kill(rng.choice(ranks), signal.SIGKILL)
    elif kind == "all":
        for pid in {run.process.pid, *ranks}:
            kill(pid, signal.SIGKILL)
    elif kind == "SIGTERM":
        kill(run.process.pid, signal.SIGTERM)
    # a file size limit from 0 to the largest checkpoint file: the first write to fail may be that
    # of the log or of the weights
    else:
        limit = rng.randrange(400_000)
        for pid in ranks:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, limit))


def torn_files(out: Path) -> list[str]:
    """Finished checkpoints and rollout files that cannot be read, with the error; an interrupted
    run must leave none."""
    found = []
    for path in [*checkpoints(out), *(out / "rollouts").glob("step_*.jsonl")]:
        try:
            if path.is_dir():
                with safe_open(path / "model.safetensors", framework="pt") as file:
                    [file.get_tensor(name) for name in file.keys()]
                assert read_meta(path)["step"] and (path / "optimizer/.metadata").is_file()
            else:
                [json.loads(line) for line in path.read_text().splitlines()]
        except Exception as e:
            found.append(f"{path.name}: {e}")
    return found


def differences(whole: Path, out: Path, exact: bool = True) -> list[str]:
    """Names of what differs between the resumed and the uninterrupted run. exact: bit for bit, else
    losses within 1e-5."""
    logs = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            for run in (whole, out)]
    if not exact:
        return [f"loss of step {a['step']}" for a, b in zip(*logs, strict=True)
                if abs(a["train/loss"] - b["train/loss"]) > 1e-5]
    ours, theirs = ([{key: v for key, v in row.items() if not key.startswith("time/")}
                     for row in log] for log in logs)
    files = [f"rollouts/step_{step:06d}.jsonl" for step in range(1, STEPS + 1)] + [
        f"step_{STEPS:06d}/model.safetensors"]
    found = [] if ours == theirs else ["metrics"]
    found += [file for file in files if not (out / file).is_file()
              or not filecmp.cmp(whole / file, out / file, shallow=False)]
    return found + [f"{path.name} left over" for path in out.glob(".*")]


def trial(base: Path, out: Path, processes: int, background: bool, kind: str, rng: random.Random,
          pace: tuple) -> dict:
    """One interrupted and resumed run. pace: (seconds to the end of step 1, seconds per later step)
    """
    run = Run(out, base, processes, async_save=background)
    after = rng.randrange(STEPS - 1)  # finished steps at the interruption
    while run.rows() < after and run.process.poll() is None:
        time.sleep(0.01)
    time.sleep(rng.random() * (pace[1] if after else pace[0]))
    while not run.ranks() and run.process.poll() is None:
        time.sleep(0.01)
    ranks = run.ranks()
    interrupt(run, kind, rng)
    seconds, problems = run.end(PATIENCE), torn_files(out)
    time.sleep(1)
    problems += [f"process {pid} is still running" for pid in ranks if runs_still(pid)]
    done, found = run.rows(), checkpoints(out)
    report = {"processes": processes, "saving": "background" if background else "foreground",
              "kind": kind, "done": done, "seconds": seconds, "status": run.process.returncode,
              "from": read_meta(found[-1])["step"] if found else 0}
    if run.process.returncode == 0:
        problems.append("was not interrupted")
    resumed = Run(out, base, processes, async_save=background, resume=True)
    resumed.end(5 * PATIENCE)
    if resumed.process.returncode:
        problems += [f"resume exited with status {resumed.process.returncode}", *resumed.lines[-3:]]
    else:
        problems += differences(base / f"whole_{processes}", out)
    return report | {"problems": problems, "said": "".join(run.lines[-40:])}


def two_nodes(base: Path, out: Path) -> list[str]:
    """Simulate two nodes: two torchrun agents on this machine, one rank each."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
                "--rdzv_backend=c10d", "--rdzv_id=chaos", f"--rdzv_endpoint=127.0.0.1:{port}"]
    nodes = [Run(out, base, 2, launcher, replicas=2) for _ in range(2)]
    for node in nodes:
        node.end(5 * PATIENCE)
    failed = [f"status {node.process.returncode}" for node in nodes if node.process.returncode]
    return failed or differences(base / "whole_2", out, exact=False)


def main(base: Path, rounds: int = 2, seed: int = 0) -> int:
    began, rng, pace, reports = time.time(), random.Random(seed), {}, []
    for processes in (1, 2):
        out = base / f"whole_{processes}"
        shutil.rmtree(out, ignore_errors=True)
        started, run, first = time.time(), Run(out, base, processes), 0.0
        while run.process.poll() is None:
            first = first or (time.time() - started if run.rows() else 0.0)
            time.sleep(0.01)
        run.end(1)
        assert run.process.returncode == 0, "".join(run.lines)
        pace[processes] = first, (time.time() - started - first) / (STEPS - 1)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses, kept = ([row[name] for row in rows] for name in ("train/loss", "reflect/kept"))
        print(f"uninterrupted run, processes: {processes}; losses:",
              *(f"{loss:+.5f}" for loss in losses), "; constructions kept:", *map(int, kept),
              flush=True)

    every = itertools.product((1, 2), ("one", "all", "SIGTERM", "full"), (False, True))
    kinds = [way for way in every if way[:2] != (1, "one")]  # with one process the same as "all"
    for number, (processes, kind, background) in enumerate(kinds * rounds):
        out = base / "killed"
        shutil.rmtree(out, ignore_errors=True)
        report = trial(base, out, processes, background, kind, rng, pace[processes])
        reports.append(report)
        print(f"{number + 1:2d}/{len(kinds) * rounds}  processes {processes}  {report['saving']}  "
              f"{kind:7s}  steps done {report['done']}  exited after {report['seconds']:4.1f} s "
              f"with status {report['status']:4d}  "
              f"resumed from {report['from']}  {'; '.join(report['problems']) or 'identical'}",
              flush=True)
        if report["problems"]:
            print(report["said"])
    shutil.rmtree(base / "nodes", ignore_errors=True)
    nodes = two_nodes(base, base / "nodes")

    print("\n| processes | saving | interruption | steps done | exit after, s | resumed from step "
          "| bit-identical |")
    print("|---|---|---|---|---|---|---|")
    for processes, kind, background in kinds:
        saving = "background" if background else "foreground"
        of = [r for r in reports if (r["processes"], r["kind"], r["saving"]) == (processes, kind,
            saving)]
        name = {"one": "kill -9 of one", "all": "kill -9 of all", "SIGTERM": "SIGTERM",
                "full": "disk full"}[kind]
        print(f"| {processes} | {saving} | {name} | {', '.join(str(r['done']) for r in of)} | "
              f"{', '.join(format(r['seconds'], '.1f') for r in of)} | "
              f"{', '.join(str(r['from']) for r in of)} | "
              f"{sum(not r['problems'] for r in of)} of {len(of)} |")
    failed = sum(bool(r["problems"]) for r in reports)
    print(f"\n{len(reports) - failed} of {len(reports)} interrupted runs are bit-identical to the "
          "uninterrupted run; two nodes: "
          f"{'; '.join(nodes) or 'same losses'}; {(time.time() - began) / 60:.0f} min")
    return failed + bool(nodes)


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 4:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]).resolve(), *map(int, sys.argv[2:])))
