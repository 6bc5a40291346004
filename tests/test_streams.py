"""Launchers whose output nobody reads, whose terminal has gone or knows ASCII alone; odd settings.

Most run a launcher of a few lines, in which nothing is slow to import.
"""

import os
import pty
import signal
import subprocess
import sys

import pytest
from helpers import ROOT, SMALL, assert_one_line_error, launch

from conet_jax.config import default_config
from conet_jax.run.fit import fit
from conet_jax.serve import recommend

_LAUNCHER = """
'''A launcher.'''
from conet_jax import cli

def main():
    import os, sys, time
    {body}

cli.run(main)
"""


def start(body, redirected="", **environment):
    """Runs a launcher of that body, its streams redirected as by the shell."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""} | environment
    command = f'"$0" -c "$1" {redirected}; exit "${{PIPESTATUS[0]}}"'
    words = ["bash", "-c", command, sys.executable, _LAUNCHER.format(body=body)]
    return subprocess.run(words, capture_output=True, text=True, env=env)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("body", "redirected", "status", "said"),
    [
        ("print('x')", ">&-", 0, ""),
        ("print('x')", ">&- 2>&-", 0, ""),
        ("print('x')", "2>&-", 0, ""),
        ("print('x', file=sys.stderr)", ">&- 2>&-", 0, ""),
        ("for _ in range(100_000): print('x', flush=True)", "| head -1", 141, ""),
        ("for _ in range(100_000): print('x')", "| head -1", 141, ""),
        ("time.sleep(0.2); print('x')", "| true", 141, ""),
        ("time.sleep(0.2); print('x', file=sys.stderr)", "2>&1 | true", 141, ""),
        ("time.sleep(0.2); cli.fail('x')", "2>&1 | true", 2, ""),
        ("print('x')", ">/dev/full", 2, "No space left on device"),
        ("print('x', flush=True)", ">/dev/full", 2, "No space left on device"),
        ("cli.fail('x')", "2>/dev/full", 2, ""),
        ("print('x'); cli.fail('y')", ">/dev/full", 2, None),
    ],
)
def test_output_that_nobody_reads_is_no_traceback(body, redirected, status, said, unbuffered):
    done = start(body, redirected, PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == status, done.stderr
    if said is not None:
        assert len(done.stderr.splitlines()) == bool(said) and said in done.stderr
    assert "Traceback" not in done.stderr


def test_file_does_not_take_the_place_of_a_closed_stream(tmp_path):
    body = f"file = open({str(tmp_path / 'file')!r}, 'w'); os.write(1, b'x'); print(file.fileno())"
    assert start(body, ">&-").returncode == 0
    assert (tmp_path / "file").read_text() == ""


def test_broken_pipe_to_something_else_keeps_its_traceback():
    done = start("r, w = os.pipe(); os.close(r); os.write(w, b'x')")
    assert done.returncode == 1 and "BrokenPipeError" in done.stderr


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "C", "PYTHONIOENCODING": "ascii:strict"},
    ],
)
def test_what_a_terminal_cannot_show_is_escaped(environment):
    done = start(r"print('caf\u00e9 \u2603'); cli.fail('na\u00efve')", **environment)
    assert done.stdout.replace("\\u2603", "☃") in ("caf\\xe9 ☃\n", "café ☃\n")
    assert_one_line_error(done, "ve")
    if environment.get("PYTHONIOENCODING"):
        assert done.stdout == "caf\\xe9 \\u2603\n"


@pytest.mark.usefixtures("hangups")
def test_terminal_that_goes_away_lets_the_run_save_and_end():
    body = """from conet_jax.run import signals
    os.close(os.open(os.ttyname(0), os.O_RDWR))  # its terminal from here on
    with signals.deferred():
        print("ready", flush=True)
        while not signals.requested():
            time.sleep(0.01)
        print("saved", flush=True)
"""
    terminal, its_end = pty.openpty()  # not pty.fork: this process has threads by now
    process = subprocess.Popen(
        [sys.executable, "-c", _LAUNCHER.format(body=body)],
        stdin=its_end,
        stdout=its_end,
        stderr=its_end,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    os.close(its_end)
    said = b""
    while b"ready" not in said:
        said += os.read(terminal, 100)
    os.close(terminal)
    assert process.wait(60) == 128 + signal.SIGHUP


@pytest.mark.usefixtures("hangups")
def test_hangup_stays_ignored_under_nohup():
    body = "import signal; print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert start(body).stdout == "True\n"
    finally:
        signal.signal(signal.SIGHUP, before)
    assert start(body).stdout == "False\n"


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("JAX_NUMPY_DTYPE_PROMOTION", "strict"),
        ("JAX_TRANSFER_GUARD", "disallow"),
        ("JAX_TRANSFER_GUARD_HOST_TO_DEVICE", "disallow_explicit"),
    ],
)
def test_settings_that_break_programs_are_refused(setting, value):
    done = start("print('x')", **{setting: value})
    assert_one_line_error(done, f"{setting}={value} is set", f"unset {setting}")
    assert not done.stdout
    assert start("print('x')", **{setting: "standard"}).stdout == "x\n"


def test_platform_without_a_device_is_one_line():
    done = start("import jax; jax.numpy.ones(3)", JAX_PLATFORMS="cuda")
    assert_one_line_error(done, "JAX_PLATFORMS=cuda cannot be used here")
    done = start("assert 1 == 2", JAX_PLATFORMS="cuda")
    assert done.returncode == 1 and "AssertionError" in done.stderr


@pytest.mark.parametrize(
    ("environment", "lines"),
    [({"JAX_COMPILATION_CACHE_DIR": "/dev/null/x"}, 1), ({"HOME": "/dev/null"}, 0)],
)
def test_cache_that_cannot_be_written_is_one_line_or_none(environment, lines):
    unset = {"JAX_COMPILATION_CACHE_DIR": "", "XDG_CACHE_HOME": ""}
    body = "import jax; print(jax.jit(lambda x: x + 1)(1), jax.jit(lambda x: x + 2)(1))"
    code = "import os; os.environ.get('JAX_COMPILATION_CACHE_DIR') or os.environ.pop("
    code += "'JAX_COMPILATION_CACHE_DIR');" + _LAUNCHER.format(body=body)
    env = os.environ | {"PYTHONPATH": str(ROOT)} | unset | environment
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout) == (0, "2 3\n"), done.stderr
    assert len(done.stderr.splitlines()) == lines, done.stderr
    assert not lines or "JAX_COMPILATION_CACHE_DIR=/dev/null/x" in done.stderr


def test_nobody_is_recommended_nothing(tmp_path):
    config = default_config("popularity")
    config.data.synthetic = SMALL
    config.epochs = 1
    fit(config, tmp_path / "run", quiet=True)
    recommender = recommend.load(tmp_path / "run")
    some = recommend.find_users(recommender, ["0"])
    for explain in (False, True):
        columns = recommend.recommend(recommender, some, explain=explain).schema
        empty = recommend.recommend(recommender, [], explain=explain)
        assert empty.schema == columns and len(empty) == 0
        assert [len(x) for x in recommend.stream(recommender, [])] == [0]


def test_ids_that_are_not_ascii_are_escaped_on_such_a_terminal(tmp_path, monkeypatch):
    for name, items in (("books", 130), ("movies", 110)):
        rows = [
            f"użytkownik{u},ítem{(7 * u + 11 * i) % items}" for u in range(40) for i in range(9)
        ]
        (tmp_path / name).write_text("\n".join(["user,item", *rows]) + "\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    monkeypatch.setenv("LC_ALL", "C")
    done = launch("prepare", "--target=books", "--source=movies", "--out=données", cwd=tmp_path)
    assert done.returncode == 0 and "written to donn\\xe9es" in done.stdout, done.stderr
    config = default_config("popularity")
    config.data.dir = str(tmp_path / "données")
    fit(config, tmp_path / "run", quiet=True)
    flags = ("--workdir=run", "--user=użytkownik3", "--k=2")
    done = launch("recommend", *flags, cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr
    assert "u\\u017cytkownik3" in done.stdout and "\\xedtem" in done.stdout
