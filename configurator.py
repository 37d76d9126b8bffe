"""A script's knobs are its public lower-case globals; `config = configure(globals())` below the
knobs applies config files and command-line arguments.

    python train.py config/toy.py config/more.py --lam=0.5 --out_dir=out/first

An annotation restricts a knob's values beyond its type: `lam: at_least(0) = 1.0`. A config file is
a diff: a Python file of plain assignments to knobs. Files apply in the order given, then every
--key=value, so --key=value overrides a file in either order. Names that begin with `_` are
private to the file; imports are allowed. Config files are executed: run only your own. Deliberately
missing: nested configs, inheritance, environment variables, interpolation.
"""
import ast
import difflib
import errno
import json
import os
import re
import sys
import time
import types
import typing
from collections.abc import Callable
from pathlib import Path

# disk full, quota exceeded, file size limit exceeded
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
KNOB_TYPES = (bool, int, float, str, tuple, type(None))


class Config(dict):
    """The resolved knobs of a run; `defaults` holds the script's defaults."""
    defaults: dict


class Rule(typing.NamedTuple):
    """Constraint on a knob's values, written as its annotation: `lam: at_least(0) = 1.0`. The type
    is that of the default."""
    holds: Callable[[typing.Any], bool]
    text: str  # continues "lam = -1.0 must be ..."


def one_of(*values) -> Rule:
    return Rule(lambda value: value in values, f"one of {', '.join(map(repr, values))}")


def at_least(low: float) -> Rule:
    return Rule(lambda value: value >= low, f"at least {low}")


def above(low: float) -> Rule:
    return Rule(lambda value: value > low, f"above {low}")


def between(low: float, high: float) -> Rule:
    return Rule(lambda value: low <= value <= high, f"between {low} and {high}")


def configure(knobs: dict, argv: list[str] | None = None) -> Config:
    """Apply config files and --key=value to `knobs` (the script's globals()) in place, all or none;
    return the resolved knobs.

    argv=None reads sys.argv if the script is __main__ and nothing if it is imported; a bad argument
    then exits the process with one line. An explicit argv raises ValueError or FileNotFoundError.
    """
    if argv is None:
        if knobs.get("__name__") != "__main__":
            return configure(knobs, [])
        return run_script(lambda: configure(knobs, sys.argv[1:]))
    config = {k: v for k, v in knobs.items()
              if _public(k) and k == k.lower() and type(v) in KNOB_TYPES}
    if "--help" in argv or "-h" in argv:
        print(_help(config, _annotations(knobs), knobs.get("__file__", "script.py")))
        raise SystemExit(0)
    allowed = _allowed_types(config, knobs)
    resolved = dict(config)
    for argument in argv:
        if not argument.startswith("-"):
            path = _find(argument, knobs)
            for key, value in _read_file(path, config).items():
                _check_key(key, config, f"{path}: {key}")
                resolved[key] = _fit(value, allowed[key], config[key], f"{path}: {key}")
    for argument in argv:
        if argument.startswith("-"):
            key, equals, text = argument.lstrip("-").partition("=")
            _check_key(key, config, argument.partition("=")[0])
            if not equals or not argument.startswith("--"):
                example = "True" if allowed[key] == {bool} else "value"
                raise ValueError(f"{argument}: not understood; write --{key}={example}")
            resolved[key] = _parse(text, allowed[key], config[key], f"--{key}")
    resolved = Config({key: _expand_home(value) for key, value in resolved.items()})
    resolved.defaults = config
    for key, rule in _annotations(knobs).items():
        if isinstance(rule, Rule) and not rule.holds(resolved[key]):
            raise ValueError(f"{key} = {resolved[key]!r} must be {rule.text}")
    knobs.update(resolved)
    return resolved


def _expand_home(value):
    """Expand ~/model, which a shell leaves alone behind `=`; also within lists of paths (a,b and
    a+b)."""
    if type(value) is not str:
        return value
    return re.sub(r"(?<![^,+])~(?=/)", os.path.expanduser("~"), value)


def print_config(config: Config, where: str | os.PathLike) -> None:
    """Print the knobs that differ from their defaults, and where the full config is saved."""
    changed = {key: value for key, value in config.defaults.items() if config[key] != value}
    print(f"{len(changed)} of {len(config.defaults)} knobs differ from their defaults; all of "
          f"them: {where}")
    width = max(map(len, changed), default=0)
    for key, default in changed.items():
        print(f"  {key:<{width}} = {config[key]!r}  ({default!r})")
    sys.stdout.flush()


def save_config(config: dict, out_dir: str | os.PathLike) -> None:
    """Write out_dir/config.json; tuples become lists."""
    write_json(Path(out_dir) / "config.json", config)


def write_json(path: Path, content) -> None:
    replace_file(path, json.dumps(content, indent=1) + "\n")


def replace_file(path: Path, text: str) -> None:
    """Write to a temporary file and rename, so that a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")  # two processes may write the same file
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def diff_configs(old: dict, new: dict) -> list[str]:
    """Lines `key: old -> new` for keys that differ; either side may come from config.json, so
    (1, 2) equals [1, 2]."""
    def show(config, key):
        return repr(config[key]) if key in config else "(not set)"
    as_saved = [json.loads(json.dumps(config)) for config in (old, new)]
    return [f"{key}: {show(old, key)} -> {show(new, key)}" for key in {**new, **old}
            if any(key not in c for c in as_saved) or as_saved[0][key] != as_saved[1][key]]


def run_script(main: Callable):
    """Return main(). Errors that the user can fix (bad value, missing file, full disk) print one
    line and exit with code 1; any other exception is a bug and keeps its traceback. Under torchrun
    local rank 0 exits first and torchrun then ends the other ranks, so that an error common to all
    ranks is printed once."""
    try:
        return main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as problem:
        time.sleep(os.environ.get("LOCAL_RANK", "0") != "0")
        disk_full = getattr(problem, "errno", None) in DISK_FULL
        if isinstance(problem, (ValueError, FileNotFoundError)) or disk_full:
            print("error: " + " ".join(str(problem).split()), file=sys.stderr, flush=True)
            sys.exit(1)
        raise


# --- validation of keys and values ---

def _public(name: str) -> bool:
    return not name.startswith("_")


def _check_key(key: str, config: dict, where: str) -> None:
    if key not in config:
        nearest = difflib.get_close_matches(key.lower(), config, n=1, cutoff=0.6)
        hint = f"; did you mean '{nearest[0]}'?" if nearest else "; --help lists them"
        raise ValueError(f"{where}: no such knob{hint}")


def _annotations(knobs: dict) -> dict:
    annotations = knobs.get("__annotations__") or {}
    # Python 3.14 evaluates annotations lazily
    if not annotations and callable(knobs.get("__annotate__")):
        annotations = knobs["__annotate__"](1)
    return annotations


def _allowed_types(config: dict, knobs: dict) -> dict:
    """key -> set of allowed types: the annotation's if there is one, else the default's; a None
    default without annotation allows every type."""
    annotations, allowed = _annotations(knobs), {}
    for key, default in config.items():
        hint = annotations.get(key, object if default is None else type(default))
        # `from __future__ import annotations`
        hint = eval(hint, dict(knobs)) if isinstance(hint, str) else hint
        hint = type(default) if isinstance(hint, Rule) else hint
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        hints = typing.get_args(hint) if union else (hint,)
        members = {typing.get_origin(t) or t or type(None) for t in hints}
        members |= {type(None)} if default is None else set()
        allowed[key] = members if members <= set(KNOB_TYPES) else set(KNOB_TYPES)
    return allowed


def _fit(value, allowed: set, default, where: str):
    """Return `value` in an allowed type, else ValueError. Only int -> float and list -> tuple
    convert (neither True nor 1.0 is an int)."""
    if type(value) is list and tuple in allowed:
        value = tuple(value)
    if type(value) in allowed:
        return value
    if type(value) is int and float in allowed:
        return float(value)
    types = [t for t in KNOB_TYPES if t in allowed]
    names = " | ".join("None" if t is type(None) else t.__name__ for t in types)
    raise ValueError(f"{where}: expected {names} (default {default!r}), got {value!r}")


def _parse(text: str, allowed: set, default, where: str):
    """Parse a command-line value: a Python literal (also `true`), or the text itself if the knob
    allows strings."""
    if allowed == {str}:
        return text  # verbatim: --out_dir=12 is '12'
    try:
        value = ast.literal_eval(text.strip().title() if allowed == {bool} else text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = text
    try:
        return _fit(value, allowed, default, where)
    except ValueError:
        if str in allowed:
            return text
        raise


# --- config files ---

def _find(argument: str, knobs: dict) -> Path:
    """Search the current folder, then the script's, then the repository's, so that a command works
    from any folder."""
    folders = [Path.cwd(), Path(knobs.get("__file__") or __file__).resolve().parent,
               Path(__file__).resolve().parent]
    tried = list(dict.fromkeys(folder / argument for folder in folders))
    for path in tried:
        if path.is_file():
            return path
    places = " and ".join(map(str, tried))
    raise FileNotFoundError(f"{argument}: no such config file; tried {places} (a knob is set by "
                            "--key=value)")


def _read_file(path: Path, config: dict) -> dict:
    """Assignments of a config file. Anything that cannot be a knob (module, function, imported
    name) is ignored unless it uses a knob's name; a knob's name in capitals is returned too, so
    that the caller rejects it."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        names: dict = {"__file__": str(path), "__name__": "config"}
        exec(compile(tree, str(path), "exec"), names)
    except Exception as problem:
        line, frame = getattr(problem, "lineno", None), problem.__traceback__
        while frame:
            line = frame.tb_lineno if frame.tb_frame.f_code.co_filename == str(path) else line
            frame = frame.tb_next
        raise ValueError(f"{path}:{line or 1}: {type(problem).__name__}: {problem}") from problem
    imported = {(alias.asname or alias.name).split(".")[0] for node in ast.walk(tree)
                if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    def is_setting(k, v):
        return k == k.lower() and k not in imported and type(v) in (*KNOB_TYPES, list)

    return {k: v for k, v in names.items()
            if _public(k) and (k in config or k.lower() in config or is_setting(k, v))}


def _help(config: dict, annotations: dict, script: str) -> str:
    """--help text: knobs, defaults, rules and knob comments (trailing, or on the line above)."""
    source = Path(script).read_text(encoding="utf-8") if Path(script).is_file() else ""
    found = re.findall(r"^(?:# (?!---)(.*)\n)?(\w+) *(?::[^=\n]+)?=.*?(?: # *(.*))?$", source,
                       flags=re.M)
    reasons = {key: behind or above for above, key, behind in found}
    rules = {k: f"({rule.text}) " for k, rule in annotations.items() if isinstance(rule, Rule)}
    lines = [f"--{k}={v!r}".ljust(40) + f"  {rules.get(k, '')}{reasons.get(k, '')}".rstrip()
             for k, v in config.items()]
    path = Path(script)
    name = f"-m tools.{path.stem}" if path.parent.name == "tools" else path.name
    return "\n".join([f"usage: python {name} [config.py ...] [--key=value ...]", "", *lines])
