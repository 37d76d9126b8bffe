"""How a run ends when it cannot go on: one message that says what to do, from the process it
happened to, within seconds.

    bad value, full disk     one line, exit status 1 (configurator.run_script)
    out of memory            one line: the knob of the phase and the last good checkpoint
    non-finite numbers       all processes skip the update; after MAX_BAD_STEPS in a row, one line
    SIGTERM (preemption)     the step is finished, a checkpoint saved, exit status 143
    Ctrl-C                   the same, exit status 130; a second one ends at once
    another process ended    its message comes first, ours is one line; torchrun ends the job
    another process hangs    the collective ends after timeout_minutes; the message names the knob
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
# not 0: a script of several phases must not go on to the next one
STOPPED = {128 + signal.SIGTERM, 128 + signal.SIGINT}
SAME_CTRL_C = 2  # seconds: torchrun passes on the signal that the terminal has sent to all
# seconds in which torchrun ends a process whose peer has died, before it says so itself
PATIENCE = 5
PEER = re.compile(r"gloo|NCCL|[Cc]onnection (closed|reset|refused)|[Bb]roken pipe"
                  "|Timed out waiting")


def run(main) -> None:
    """configurator.run_script for a script that may be one of torchrun's processes.

    When a process ends, all others fail too, in the collective they are in. That is no news: they
    leave torchrun time to end them, and else say it in one line. torchrun kills what has not ended
    30 s after SIGTERM (--shutdown-timeout): a rank that hangs, or that waits on its GPU for a dead
    one.
    """
    if "RANK" not in os.environ:
        return run_script(main)
    status = 0
    try:
        run_script(lambda: _own_errors_first(main))
    except SystemExit as e:
        status = e.code or 0
    except BaseException:
        print(f"rank {os.environ['RANK']}:", file=sys.stderr)
        traceback.print_exc()
        status = 1
    if status in {0} | STOPPED:  # all processes have come to the end
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # sys.exit would wait for collectives and threads that wait for the others


def _own_errors_first(main) -> None:
    try:
        main()
    except Exception as e:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # without the place in torch's sources
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
    """From now on SIGTERM and the first Ctrl-C do not end the process: `signal` holds which came, 0
    before. Whoever runs the loop looks at it once a step. A second Ctrl-C ends at once."""

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
                # os.write: a print within a print of the interrupted line would fail
                os.write(2, b"\nfinishing this step, then saving; Ctrl-C again ends at once, "
                            b"without saving\n")


def end_after_signal(number: int, done: int, max_steps: int, out_dir) -> None:
    """Last words and exit status of a run whose step and checkpoint are complete."""
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
    """Inside, running out of GPU memory is a ValueError with these knobs and the last checkpoint.
    """
    try:
        yield
    except torch.OutOfMemoryError as e:
        # how much was asked for; not the allocator's advice
        what = ". ".join(str(e).split(". ")[:2])
        values = ", ".join(f"{knob} = {value}" for knob, value in knobs.items())
        values = values.replace("max_rows = 0", "max_rows = 0 (as many as fit)")
        raise ValueError(f"{what}; change {values} (what a change saves: python -m tools.plan), "
                         f"then --resume=True goes on from {newest(out_dir)}") from e
