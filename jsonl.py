"""JSON Lines (one JSON object per line): reads and writes problem files, logs, samples and
examples.

Only a newline ends a line: `str.splitlines` would also split at U+2028, U+0085 or a form feed
inside a string. A byte-order mark (Windows) is skipped. `read` drops an incomplete last line, which
a kill during a write leaves.
"""
import json
from collections.abc import Iterator
from pathlib import Path

from configurator import diff_configs, replace_file


def lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield (number, line) of each non-blank line. ValueError, with path and line number, if a line
    is not UTF-8."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as e:
                raise ValueError(f"{path}:{number}: not UTF-8 ({e.reason} at byte {e.start}); save "
                                 "the file as UTF-8") from None
            if text.strip():
                yield number, text


def parse(line: str, where: str) -> dict:
    """Parse one line as a JSON object. where: path:line, for the ValueError."""
    try:
        row = json.loads(line.rstrip())  # else an error in a cut line is at the next line's start
    except json.JSONDecodeError as e:
        raise ValueError(f"{where}: not valid JSON ({e.msg} at column {e.colno})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row


def read(path: str | Path) -> list[dict]:
    """All rows of a file written by this project; [] if the file does not exist. A last line
    without a newline is incomplete and dropped."""
    if not Path(path).is_file():
        return []
    return [parse(line, f"{path}:{number}") for number, line in lines(path) if line.endswith("\n")]


def write(path: str | Path, rows: list[dict]) -> None:
    """Replace the file atomically."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    replace_file(Path(path), "".join(lines))


def begin_or_resume(path: str | Path, header: dict, advice: str, *, resume: bool) -> list[dict]:
    """Prepare a file for appending and return its existing rows. The first line is `header`, the
    settings that produced the rows; a file with a different header is a ValueError with `advice`.
    resume = False starts a new file. An incomplete last line is removed."""
    rows = read(path) if resume else []
    if rows and (differences := diff_configs(rows[0], header)):
        raise ValueError(f"{path} was made otherwise ({'; '.join(differences)}); {advice}")
    if not rows:
        write(path, [header])
    with open(path, "rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1)
    return rows[1:]
