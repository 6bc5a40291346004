"""``conet train`` and the like: each file of launch/ as a command, from a clone or a wheel.

A wheel has launch/ and configs/ in a folder of the package, laid out as in a clone; the benchmarks
are the clone's alone.
"""

import ast
import difflib
import importlib.util
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import conet_jax
from conet_jax import streams


def home() -> Path:
    """Returns the folder that has launch/ and configs/: of the wheel, or else the clone."""
    package = Path(__file__).resolve().parent
    inside = package / "_clone"
    return inside if inside.is_dir() else package.parent


def commands() -> dict[str, Path]:
    """Returns the launchers by name."""
    return {path.stem: path for path in sorted((home() / "launch").glob("*.py"))}


def typed(text: str) -> str:
    """Returns a text that names launchers as this process was started: ``conet train`` for one.

    Example:
      >>> typed("make it with: python launch/prepare.py --out=DIR")  # not started by ``conet``
      'make it with: python launch/prepare.py --out=DIR'
    """
    if not sys.argv[0].startswith("conet "):
        return text
    return re.sub(r"(?:python )?\blaunch/([a-z]\w*)\.py", r"conet \1", text)


def command(name: str, *, without: str) -> str:
    """Returns the command line of this process, as one of a launcher, less a flag and its value."""
    words, kept = sys.argv[1:], []
    while words:
        word = words.pop(0)
        flag, equals, _ = word.partition("=")
        if flag.startswith("-") and flag.lstrip("-") == without:
            del words[: not equals]
        else:
            kept.append(word)
    return shlex.join(["python", f"launch/{name}.py", *kept])


def with_packaged_configs(words: Sequence[str]) -> list[str]:
    """Returns a command's words; ``--config`` names the config that comes with the package.

    Only where no such file is here: ``configs/amazon.py``, or ``amazon`` alone.

    Args:
      words: of the command, without the launcher.
    """
    found = list(words)
    for at, word in enumerate(found):
        if word == "--":
            break
        flag, equals, value = word.partition("=")
        if flag not in ("--config", "-config"):
            continue
        if equals:
            found[at] = f"{flag}={packaged_config(value)}"
        elif at + 1 < len(found):
            found[at + 1] = packaged_config(found[at + 1])
    return found


def packaged_config(given: str) -> str:
    """Returns what ``--config`` names, a variant after the colon with it."""
    path, colon, variant = given.partition(":")
    named = re.fullmatch(r"(?:\./)?(?:configs/)?(\w+?)(?:\.py)?", path)
    if named and not os.path.exists(path):
        packaged = home() / "configs" / f"{named[1]}.py"
        if packaged.is_file():
            return f"{packaged}{colon}{variant}"
    return given


def unpackaged(path: str) -> str:
    """Returns the shortest name that ``packaged_config`` would find a file by.

    Example:
      >>> unpackaged(packaged_config("amazon"))
      'configs/amazon.py'
    """
    inside = home() / "configs"
    return f"configs/{Path(path).name}" if Path(path).parent == inside else path


def main() -> None:
    """Runs the launcher that the first word names, with the words after it."""
    streams.prepare()
    with streams.while_read():
        _run()


def _run() -> None:
    name, *words = sys.argv[1:] or ["--help"]
    found = commands()
    if name in ("--version", "-version", "version"):
        print(f"conet_jax {conet_jax.__version__}")
    elif name in ("--help", "-h", "-help", "help"):
        print("\n".join(_usage(found)))
    elif name not in found:
        near = difflib.get_close_matches(name, list(found), n=1)
        hint = f"did you mean {near[0]}?" if near else "expected one of " + ", ".join(found)
        print(f"error: unknown command {ascii(name)}; {hint}", file=sys.stderr)
        sys.exit(2)
    else:
        sys.argv[:] = [f"conet {name}", *words]  # absl names the program by it
        spec = importlib.util.spec_from_file_location("__main__", found[name])
        launcher = importlib.util.module_from_spec(spec)
        sys.modules["__main__"] = launcher  # absl takes the usage from there
        spec.loader.exec_module(launcher)


def _usage(found: dict[str, Path]) -> list[str]:
    lines = ["conet COMMAND [--flags]     (conet COMMAND --help lists the flags)", ""]
    for name, path in found.items():
        about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines.append(f"  {name:10}  {about.partition(chr(10))[0]}")
    return [*lines, "", "conet --version says which version this is."]


if __name__ == "__main__":
    main()
