"""Error handling: a run that cannot continue prints one message that says what to do, from the rank
that failed, within seconds.

    bad value, full disk     one line, exit status 1 (configurator.run_script)
    out of memory            one line: the knob of the phase and the last good checkpoint
    non-finite numbers       all ranks skip the update; after MAX_BAD_STEPS in a row, one line
    SIGTERM (preemption)     the step is finished, a checkpoint saved, exit status 143
    Ctrl-C                   the same, exit status 130; a second Ctrl-C exits at once
    another rank failed      its message comes first, other ranks print one line; torchrun ends all
    another rank hangs       collectives time out after timeout_minutes; the message names the knob
"""
import contextlib
import os
import re
import signal
import sys
import time
import traceback

import torch
import torch.distributed as dist

from checkpoint import newest
from configurator import run_script
from parallel import say

MAX_BAD_STEPS = 3
# non-zero statuses, so that a script of several phases does not start the next phase
STOPPED = {128 + signal.SIGTERM, 128 + signal.SIGINT}
SAME_CTRL_C = 2  # seconds: torchrun forwards the SIGINT that the terminal also sent to every rank
# seconds a rank that lost a peer waits for torchrun to end it, before it prints its own message
PATIENCE = 5
PEER = re.compile(r"gloo|NCCL|[Cc]onnection (closed|reset|refused)|[Bb]roken pipe"
                  "|Timed out waiting")


def run(main) -> None:
    """configurator.run_script for a script that may run under torchrun.

    When one rank exits, every other rank fails in its current collective. These secondary errors
    carry no information: the rank waits PATIENCE seconds for torchrun to end it, then prints one
    line. torchrun kills ranks that are still running 30 s after SIGTERM (--shutdown-timeout): a
    rank that hangs, or whose GPU waits for a dead rank.
    """
    if "RANK" not in os.environ:
        try:
            return run_script(main)
        finally:
            if dist.is_initialized():  # by parallel.shard
                dist.destroy_process_group()
    status = 0
    try:
        run_script(lambda: _own_errors_first(main))
    except SystemExit as e:
        status = e.code or 0
    except BaseException:
        print(f"rank {os.environ['RANK']}:", file=sys.stderr)
        traceback.print_exc()
        status = 1
    if status in {0} | STOPPED:  # all ranks exit together
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # sys.exit would block on collectives and threads that wait for other ranks


def _own_errors_first(main) -> None:
    try:
        main()
    except Exception as e:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # strip the location in torch's sources
        text = re.sub(r"\[\S+\] ", "", " ".join(str(e).split()))
        if not isinstance(e, RuntimeError) or not PEER.search(text):
            raise
        late = re.search("[Tt]imed out", text)
        time.sleep(1 if late else PATIENCE)
        hint = ("it hangs, or may need longer than that: raise timeout_minutes" if late
                else "read its message, not this one")
        print(f"rank {os.environ['RANK']} lost another process ({text[:200]}): "
              f"{hint}", file=sys.stderr)
        sys.exit(1)


class Stop:
    """Handlers for SIGTERM and the first Ctrl-C that store the signal number in `signal` (0: none)
    instead of exiting; the training loop polls it once per step. A second Ctrl-C exits at once."""

    def __init__(self):
        self.signal, self.since = 0, 0.0
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note)

    def _note(self, number, _) -> None:
        if number == signal.SIGINT and self.signal and time.monotonic() - self.since > SAME_CTRL_C:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt
        if not self.signal:
            self.signal, self.since = number, time.monotonic()
            if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
                # os.write: print is not reentrant, and the signal may interrupt a print
                os.write(2, b"\nfinishing this step, then saving; Ctrl-C again ends at once, "
                            b"without saving\n")


def end_after_signal(number: int, done: int, max_steps: int, out_dir) -> None:
    """Print the final message and exit with 128 + signal, after the last step's checkpoint."""
    say(f"{signal.Signals(number).name}: stopped after step {done} of {max_steps}; "
        f"--resume=True goes on from {newest(out_dir)}")
    sys.exit(128 + number)


def check_bad_steps(bad_steps: int, out_dir) -> None:
    """ValueError once the updates of MAX_BAD_STEPS steps in a row were skipped."""
    if bad_steps >= MAX_BAD_STEPS:
        raise ValueError(f"loss or gradient was not finite in {bad_steps} steps in a row, these "
                         "updates were skipped; look at the rollouts, or start a new run with a "
                         f"lower learning_rate; the last good checkpoint is {newest(out_dir)}")


@contextlib.contextmanager
def out_of_memory_names(out_dir, **knobs):
    """Convert a GPU out-of-memory error to a ValueError that names `knobs` and the last checkpoint.
    """
    try:
        yield
    except torch.OutOfMemoryError as e:
        # keep the size of the failed allocation, drop the allocator's advice
        what = ". ".join(str(e).split(". ")[:2])
        values = ", ".join(f"{knob} = {value}" for knob, value in knobs.items())
        values = values.replace("max_rows = 0", "max_rows = 0 (as many as fit)")
        raise ValueError(f"{what}; change {values} (what a change saves: python -m tools.plan), "
                         f"then --resume=True goes on from {newest(out_dir)}") from e
