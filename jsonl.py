"""jsonl: one JSON object a line. The one reader and writer of problem files, logs, samples and
examples.

A newline alone ends a line: `str.splitlines` would also cut at U+2028, U+0085 or a form feed inside
a text. A byte-order mark (Windows) is skipped. A file of ours may end in a line that a kill has
torn: it is left out.
"""
import json
from collections.abc import Iterator
from pathlib import Path

from configurator import diff_configs, replace_file


def lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """(number, line) of the lines that are not blank. ValueError, with path and line, where the
    text is not UTF-8."""
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
    """The object of one line. where: path:line, for the ValueError."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as e:
        raise ValueError(f"{where}: not valid JSON ({e.msg} at column {e.colno})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row


def read(path: str | Path) -> list[dict]:
    """Every row of a file of ours; [] without a file, and without a last line that has no newline
    yet."""
    if not Path(path).is_file():
        return []
    return [parse(line, f"{path}:{number}") for number, line in lines(path) if line.endswith("\n")]


def write(path: str | Path, rows: list[dict]) -> None:
    """Replace the file in one step."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    replace_file(Path(path), "".join(lines))


def begin_or_resume(path: str | Path, header: dict, advice: str, *, resume: bool) -> list[dict]:
    """The rows so far of a file that can then be appended to. Its first line is `header`, which
    says how the rows are made: another one is a ValueError with this advice, as its rows answer
    another question. resume = False begins it anew. A torn last line is removed."""
    rows = read(path) if resume else []
    if rows and (differences := diff_configs(rows[0], header)):
        raise ValueError(f"{path} was made otherwise ({'; '.join(differences)}); {advice}")
    if not rows:
        write(path, [header])
    with open(path, "rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1)
    return rows[1:]
