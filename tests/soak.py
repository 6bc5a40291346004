"""A thousand epochs of configs/demo.py, shrunk: memory, open files, and metrics.jsonl throughout.

python tests/soak.py [--epochs=1000] [--workdir=DIR]

Prints a line every tenth of the run. Exits with status 1 if from the second tenth on resident
memory grows by more than 5%, if more files are open at the end than ever before, or if
metrics.jsonl could not be read at some moment.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from crash import ROOT, SMALL, config_flags, environment

LARGEST_GROWTH = 0.05


def mebibytes(pid):
    """Resident memory without the pages of mapped files, which the system drops as it likes."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) / 1024


def soak(epochs, workdir, say=print):
    """Returns [(epochs done, MiB, open files)], a row every tenth of the run.

    Raises:
      AssertionError: the run failed, or metrics.jsonl was not whole.
    """
    flags = config_flags(":lasso", SMALL | {"epochs": epochs, "patience": epochs})
    command = [sys.executable, ROOT / "launch" / "train.py", *flags, f"--workdir={workdir}"]
    metrics, rows, reads = workdir / "metrics.jsonl", [], 0
    with open(workdir.with_name(f"{workdir.name}.log"), "w") as log:
        process = subprocess.Popen(command, stdout=log, env=environment(), cwd=ROOT)
        try:
            while process.poll() is None:
                time.sleep(0.1)
                if not metrics.exists():
                    continue
                read = [json.loads(line) for line in metrics.read_text().splitlines()]
                reads += 1
                done = len(read)
                assert [row["epoch"] for row in read] == list(range(1, done + 1))
                if done >= (len(rows) + 1) * epochs // 10:
                    files = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
                    rows.append((done, mebibytes(process.pid), files))
                    say("epoch {:5,}  {:7.1f} MiB  {:3} open files".format(*rows[-1]))
        finally:
            process.kill()
    assert process.wait() == 0, Path(log.name).read_text()[-3000:]
    say(f"metrics.jsonl was read {reads:,} times, whole each time")
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=1000)
    parser.add_argument("--workdir", type=Path, default=None)
    args = parser.parse_args()
    workdir = args.workdir or Path(tempfile.mkdtemp(prefix="conet_jax-soak-")) / "run"
    rows = soak(args.epochs, workdir.absolute())
    (_, before, _), (_, after, still) = rows[1], rows[-1]
    opened = max(files for *_, files in rows[:-1])
    print(f"from a fifth of the run on memory grew by {after / before - 1:+.1%}")
    print(f"{still} files open at the end, {opened} at most before")
    sys.exit(after > before * (1 + LARGEST_GROWTH) or still > opened)


if __name__ == "__main__":
    main()
