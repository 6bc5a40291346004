"""What every launcher shares: flags parsed by absl, and errors that end in one line.

Exit status: 0 for success and ``--help``, 2 for bad flags, bad input and what the system refuses (a
full disk), 1 for our own bugs (those keep their traceback), and after a signal 128 and its number:
130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP; 141 once nobody reads what it prints.
"""

import contextlib
import difflib
import errno
import importlib.util
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from absl import app, flags

from conet_jax import console, streams
from conet_jax.errors import InputError
from conet_jax.run import signals

_GO_ON = "what was saved is as it was, and the same command goes on from there"
_CURES = {
    errno.ENOSPC: f"; make room: {_GO_ON}",
    errno.EDQUOT: f"; make room: {_GO_ON}",
    errno.EFBIG: f"; allow larger files: {_GO_ON}",
    errno.EIO: f"; see to the disk: {_GO_ON}",
    errno.EROFS: "; take a folder that can be written, by --workdir or --out",
    errno.EACCES: "; take a folder that can be written, by --workdir or --out",
    errno.ENOENT: "; it has gone while the command ran: put it back, or start anew",
}
_HELP_FLAGS = {"-h", "-help", "--help", "-helpshort", "--helpshort", "-helpfull", "--helpfull"}


def fail(message: object) -> None:
    """Prints ``error: message`` as one line on stderr and exits with status 2."""
    with contextlib.suppress(OSError):  # nobody reads it
        print("error:", " ".join(console.typed(str(message)).split()), file=sys.stderr)
    sys.exit(2)


def _parse(argv: Sequence[str], *, arguments: bool) -> list[str]:
    asked = _HELP_FLAGS.intersection(argv[1 : argv.index("--")] if "--" in argv else argv[1:])
    if asked:
        full = any("full" in flag for flag in asked)
        launcher = sys.modules["__main__"]
        launcher.__doc__ = console.typed(launcher.__doc__ or "")  # absl prints it
        app.usage(writeto_stdout=True, shorthelp=not full)
        sys.exit(0)
    try:
        rest = flags.FLAGS(list(argv))
    except flags.UnrecognizedFlagError as error:
        near = difflib.get_close_matches(error.flagname, list(flags.FLAGS), n=1)
        hint = f"; did you mean --{near[0]}?" if near else ""
        fail(f"unknown flag --{error.flagname}{hint} (--help lists the flags)")
    except flags.Error as error:
        fail(_flag_problem(str(error)))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # What config_flags raises for a field that does not exist or a value of another type.
        near = re.search(r'Did you mean "(\w+)" instead of "(\w+)"', str(error))
        if near:
            field = _field(argv, near[2])
            meant = field.removesuffix(near[2]) + near[1]
            fail(f"unknown config field config.{field}; did you mean config.{meant}?")
        if "get_config" in str(error):
            fail(f"the config file cannot be used: {error}; expected a Python file with get_config")
        name = str(error).strip("\"'")
        if isinstance(error, AttributeError | KeyError) and re.fullmatch(r"[\w.]+", name):
            field = _field(argv, name)
            fail(f"unknown config field config.{field}; conet_jax/config.py lists the fields")
        fail(f"the config cannot be used: {error}; conet_jax/config.py lists its fields")
    except (Exception, SystemExit) as error:  # a config file is code, and can raise anything
        fail(f"the config file cannot be used: {type(error).__name__}: {error}")
    twice = _given_twice(argv)
    if twice:
        fail(f"--{twice} is given twice: expected one value, so leave one of them out")
    if len(rest) > 1 and not arguments:
        fail(f"unexpected argument {rest[1]!r}; options are written --name=value (see --help)")
    return rest


def _given_twice(argv: Sequence[str]) -> str | None:
    """The first flag that is typed more than once, though it takes one value; absl keeps the last.

    Example:
      >>> _given_twice(["train.py", "--only_check_args", "--noonly_check_args"])
      'only_check_args'
    """
    seen = set()
    typed = argv[1 : argv.index("--")] if "--" in argv else argv[1:]
    for word in typed:
        name = word.lstrip("-").partition("=")[0]
        if name not in flags.FLAGS:
            name = name.removeprefix("no")  # of a boolean
        if not word.startswith("-") or name not in flags.FLAGS:
            continue
        flag = flags.FLAGS[name]
        if flag.name in seen and not isinstance(flag, flags.MultiFlag):
            return flag.name
        seen.add(flag.name)
    return None


def _flag_problem(text: str) -> str:
    """What absl and config_flags say of a flag, in words for who typed it."""
    if "Error whilst parsing config file" in text:  # followed by a whole traceback
        parts = re.split(r"\s(?=[\w.]+(?:Error|Exception): )", text)
        raised = parts[-1] if len(parts) > 1 else text.strip().splitlines()[-1]
        kind, _, reason = raised.partition(": ")
        if kind.endswith("InputError"):  # of ours: the file is right, but not what is asked of it
            return reason
        return f"the config file cannot be used: {raised}"
    flag = text.partition(": ")[0]
    if "as a ConfigDict" in text:
        return f"{flag}: expected a field within it, --config.data.dir=DIR"
    if "Non-boolean argument" in text:
        return f"{flag}: expected true or false"
    return text


def _field(argv: Sequence[str], part: str) -> str:
    """The dotted name, as typed, that ends in the part of one that there is no field of."""
    for word in argv:
        typed = re.match(rf"--?config\.((?:\w+\.)*{re.escape(part)})(?=[.=]|$)", word)
        if typed:
            return typed[1]
    return part


def config_of(flag: Any) -> Any:
    """Returns the value of a config flag, checked.

    Raises:
      InputError: the flag is missing, the file cannot be read, or a field is wrong.
    """
    from ml_collections import ConfigDict

    from conet_jax.config import validate

    if flag.value is None:
        raise InputError("--config is missing: name a config file, --config=configs/demo.py")
    config = flag.value
    try:
        hasattr(config, "name")  # what stands for a file that was not found raises
    except OSError:
        raise InputError(
            f"the config file {flags.FLAGS['config'].config_filename!r} cannot be read; "
            "configs/*.py are the ones there are"
        ) from None
    if not isinstance(config, ConfigDict):
        raise InputError(f"get_config returned {type(config).__name__}: expected a ConfigDict")
    validate(config)
    return config


class ConfigFile(NamedTuple):
    """What ``--config`` names, for launchers that need more than one variant of it.

    Attributes:
      config: the config itself, checked as ``config_of`` does.
      path: the file.
      variant: text after the colon, empty without one.
      get_config: the file's function.
      given: config fields of the command line by dotted name.
      sweep: the file's ``sweep(add)``, None if it has none.
      published: the file's ``PUBLISHED``, figures of others on its data.
    """

    config: Any
    path: str
    variant: str
    get_config: Callable[[str], Any]
    given: dict[str, Any]
    sweep: Callable[[Callable[..., None]], None] | None
    published: tuple[Any, ...] = ()


def config_file(flag: Any) -> ConfigFile:
    """Returns what a config flag names.

    Raises:
      InputError: as ``config_of``.
    """
    config = config_of(flag)
    from ml_collections import config_flags

    holder = flags.FLAGS[flag.name]
    path, _, variant = config_flags.get_config_filename(holder).partition(":")
    module = load_config_file(path)
    path = console.unpackaged(path)
    given = dict(config_flags.get_override_values(holder))
    return ConfigFile(
        config,
        path,
        variant,
        module.get_config,
        given,
        getattr(module, "sweep", None),
        getattr(module, "PUBLISHED", ()),
    )


def load_config_file(path: Any) -> Any:
    """Returns a config file as a module."""
    spec = importlib.util.spec_from_file_location("config_file", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cache_folder() -> str:
    """Where things are kept that can be made again: $XDG_CACHE_HOME/conet_jax (~/.cache)."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(home, "conet_jax")


def _cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # not on every system
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cache_programs() -> None:
    """Makes JAX keep compiled programs on disk, so that a second start finds them.

    In $JAX_COMPILATION_CACHE_DIR, or a folder a machine and number of cores in
    $XDG_CACHE_HOME/conet_jax (~/.cache): a program is compiled for the instructions of its
    processor, and for as many threads as there are cores, which is no part of JAX's name for it.
    JAX_ENABLE_COMPILATION_CACHE=0 turns it off, and so does a folder that cannot be written. To be
    called before JAX is imported; child processes inherit it.
    """
    folder = os.path.join(cache_folder(), f"{platform.node() or 'here'}-{_cores()}")
    named = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", folder)
    if named and "://" not in named:  # no bucket of a cloud
        try:
            os.makedirs(named, exist_ok=True)
            with tempfile.TemporaryFile(dir=named):
                pass
        except OSError as error:  # JAX would warn of every program
            del os.environ["JAX_COMPILATION_CACHE_DIR"]
            if named != folder:
                print(
                    f"warning: JAX_COMPILATION_CACHE_DIR={named}: {error.strerror}; compiled "
                    "programs are not kept",
                    file=sys.stderr,
                )
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def choose_platform(config: Any) -> None:
    """Makes JAX use ``config.platform``, before anything else has touched a device."""
    if config.get("platform"):
        import jax

        jax.config.update("jax_platforms", config.platform)
        os.environ["JAX_PLATFORMS"] = config.platform  # for processes that this one starts
        if reason := _no_device():
            raise InputError(
                f"config.platform is {config.platform!r}, which cannot be used here: {reason}; "
                "expected cpu, or nothing for JAX's choice"
            )


def _no_device() -> str:
    """Why JAX has no device, empty if it has one."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the second where a platform has no plug-in
        return str(error) or "JAX has no such device here"
    return ""


def _refuse_debugging() -> None:
    """Refuses settings of JAX that find faults in a program by breaking it.

    Raises:
      InputError: one is set in the environment.
    """
    for name, value in os.environ.items():
        strict = name == "JAX_NUMPY_DTYPE_PROMOTION" and value == "strict"
        if strict or (name.startswith("JAX_TRANSFER_GUARD") and value.startswith("disallow")):
            raise InputError(
                f"{name}={value} is set, under which these programs do not run: unset {name}"
            )


def take_data(config: Any, folder: str | None) -> None:
    """Sets ``config.data.dir`` to the folder of ``--data``, after which a run is then named.

    Raises:
      InputError: the config names a folder, too, or makes its data.
    """
    if folder is None:
        if config.name == "run" and config.data.dir:
            config.name = os.path.basename(os.path.abspath(config.data.dir))
        return
    if "synthetic" in config.data:
        raise InputError(
            f"--data={folder} is given, but this config makes its data: take "
            "--config=configs/default.py, or the config of a data set"
        )
    config.data.dir = folder
    if config.name == "run":
        config.name = os.path.basename(os.path.abspath(folder))


def default_workdir(config: Any) -> str:
    """Returns runs/NAME-VARIANT."""
    return f"runs/{config.name}-{config.variant}"


def run(main: Callable[..., None], *, arguments: bool = False) -> None:
    """Parses the flags, calls ``main`` and turns ``InputError`` into one line and status 2.

    Args:
      main: of the launcher.
      arguments: whether words that are no flags are allowed; ``main`` is then given their list.
    """

    def guarded(argv: Sequence[str]) -> None:
        try:
            _refuse_debugging()
            main(list(argv[1:])) if arguments else main()
        except InputError as error:
            fail(error)
        except BrokenPipeError:
            raise  # to streams.while_read
        except OSError as error:
            if error.errno is None:
                raise
            where = f"{error.filename}: " if error.filename else ""
            fail(f"{where}{error.strerror}{_CURES.get(error.errno, '')}")
        except KeyboardInterrupt as error:
            signals.end(error)
        except (RuntimeError, AssertionError):
            asked = os.environ.get("JAX_PLATFORMS")
            if asked and "jax" in sys.modules and (reason := _no_device()):
                fail(f"JAX_PLATFORMS={asked} cannot be used here: {reason}; unset it, or take cpu")
            raise

    streams.prepare()
    signals.install()
    cache_programs()
    sys.argv[1:] = console.with_packaged_configs(sys.argv[1:])  # config_flags reads it there
    try:
        with streams.while_read():
            app.run(guarded, flags_parser=partial(_parse, arguments=arguments))
    except OSError as error:  # of what is left to be printed at the end
        if error.errno is None or isinstance(error, BrokenPipeError):
            raise
        fail(f"standard output: {error.strerror}")
