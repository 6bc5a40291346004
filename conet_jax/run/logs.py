"""Where a run's numbers go: metrics.jsonl for programs, the console and TensorBoard for people."""

import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from conet_jax import metrics
from conet_jax.config import flatten
from conet_jax.errors import InputError
from conet_jax.files import append_line, parse_json, write_text
from conet_jax.variants import VARIANTS


def saved_line(folder: Path, epoch: int, steps: int = 0) -> str:
    """Returns what a run that a signal has stopped says."""
    more = f" and {steps:,} steps" if steps else ""
    return f"saved after epoch {epoch}{more} in {folder}; the same command goes on from there"


def headline(experiment: Any, workdir: Path) -> str:
    """Returns the line that a run begins with."""
    config, counts = experiment.config, experiment.dataset.meta["counts"]
    steps = f", {experiment.plan.steps:,} steps an epoch" if experiment.plan is not None else ""
    return (
        f"{VARIANTS[config.variant].says} ({config.name}:{config.variant}, model {config.model}): "
        f"{counts['users']:,} users, "
        f"{counts['target_interactions']:,} target and {counts['source_interactions']:,} source "
        f"interactions{steps}; writing to {workdir}"
    )


def start_line(experiment: Any) -> str:
    """Returns what is said before a start that may take a minute, else nothing."""
    config = experiment.config
    if config.pretrain_epochs:
        return f"start: an MLP on the source, {config.pretrain_epochs} epochs"
    if experiment.model.start is None:
        return ""
    without = f", then {config.fold_sweeps} without each of {config.folds} folds"
    without = without if config.folds else ""
    return f"start: a factorisation, {config.ials_sweeps} sweeps{without}"


def taken_over_line(record: dict[str, Any]) -> str:
    """Returns what a run says of the earlier run that it starts from."""
    known = ", ".join(f"{count:,} rows of {name}" for name, count in record["known"].items())
    return f"start: {record['workdir']}, epoch {record['best_epoch']}; it knows {known}"


def search_line(trials: int) -> str:
    """Returns what is said before the search of a start, which may take a minute."""
    return f"start: a search for the constants of the factorisation, {trials} points"


def found_line(tuned: dict[str, Any], seconds: float | None) -> str:
    """Returns what is said after it; without ``seconds``, it was found before."""
    values = ", ".join(f"{name} {value:.4g}" for name, value in tuned.items() if name != "trials")
    return f"start: {values}, " + ("found before" if seconds is None else f"in {seconds:.1f} s")


def epoch_line(row: dict[str, Any], metric: str, better: bool) -> str:
    """Returns the line of an epoch; a star marks the best so far."""
    losses = ", ".join(f"{domain} {loss:.4f}" for domain, loss in row["train_loss"].items())
    value = f"{row['valid_warm'][metric]:.4f}" + (" *" if better else "  ")
    rate = f"{row['rows_per_second']:,.0f} rows/s"
    losses = f"train loss: {losses}  " if losses else ""
    return f"epoch {row['epoch']:3d}  {losses}warm valid {metric} {value}  {rate}"


def _users(metrics_of: dict[str, Any]) -> str:
    """How many users, and how many held-out items where these are more."""
    items = f" ({metrics_of['pairs']:,} items)" if "pairs" in metrics_of else ""
    return f"{metrics_of['users']:,}{items}"


def result_markdown(result: dict[str, Any]) -> str:
    """Returns a result as a small Markdown page."""
    first = ("test", "test_warm", "valid", "valid_warm")
    others = [name for name in result if name.startswith(("test_", "valid_"))]
    splits = (*first, *(name for name in others if name not in first))
    k, *more = result["config"]["eval_k"]
    shown = [[metric.key(k) for metric in metrics.METRICS]]
    if more:
        of_cuts = [metric for metric in metrics.in_tables() if metric.has_cut]
        shown.append([metric.key(cut) for cut in more for metric in of_cuts])
    lines = [f"# {result['config']['name']} {result['config']['variant']}".rstrip(), ""]
    for names in shown:
        rows = [
            [_users(result[split]), *(f"{result[split][name]:.4f}" for name in names)]
            for split in splits
        ]
        labels = [split.replace("_", ", ") for split in splits]
        lines += [*_table("split", ["users", *names], labels, rows), ""]
    lists = result["lists"]
    names = [name for name in lists if name not in ("users", "k")]
    cells = ["-" if lists[name] is None else f"{lists[name]:,.4f}" for name in names]
    lines += _table("lists", ["users", *names], [f"first {k}"], [[f"{lists['users']:,}", *cells]])
    lines += [
        "",
        f"Best epoch {result['best_epoch']} of {result['epochs']} by warm validation, seed "
        f"{result['seed']}, {result['parameters']:,} parameters, {result['seconds']:,.1f} s; data "
        f"{result['dataset']['hash'][:12]}.",
        "",
    ]
    return "\n".join(lines)


def _table(corner: str, head: list[str], labels: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table of numbers."""
    return [
        f"| {' | '.join([corner, *head])} |",
        "| --- |" + " ---: |" * len(head),
        *(f"| {' | '.join([label, *row])} |" for label, row in zip(labels, rows, strict=True)),
    ]


class MetricsFile:
    """metrics.jsonl: one JSON object an epoch, in order, without gaps.

    Args:
      path: the file.
      epochs: rows of later epochs are dropped: a run that resumes after epoch ``epochs`` comes by
        them again.
    """

    def __init__(self, path: Path, *, epochs: int) -> None:
        self._path = path
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    row = parse_json(line)
                    epoch = int(row["epoch"])
                except (ValueError, LookupError, TypeError, OverflowError):  # of a killed run
                    break
                if epoch <= epochs:
                    kept.append(line + "\n")
        write_text(path, "".join(kept))

    def append(self, row: dict[str, Any]) -> None:
        """Appends one row and flushes it to disk.

        Raises:
          OSError: the file has gone, or there is no room.
        """
        self._path.stat()
        append_line(self._path, row)


def load_tensorboardx() -> ModuleType:
    """Returns ``tensorboardX``.

    Raises:
      InputError: it is not installed.
    """
    try:
        import tensorboardX
    except ImportError:
        raise InputError(
            'event files need tensorboardX: pip install "conet-jax[tensorboard]"'
        ) from None
    return tensorboardX


class TensorBoard:
    """Event files of the numbers of metrics.jsonl, a scalar each under its path: train_loss/target.

    Args:
      folder: of the event files, for ``tensorboard --logdir``.
      epochs: epochs done; TensorBoard forgets those of later epochs, which are come by again.
    """

    def __init__(self, folder: Path, *, epochs: int) -> None:
        # Files are named by the second: without a suffix, a run that goes on within one would
        # overwrite the file before.
        self._writer = load_tensorboardx().SummaryWriter(
            str(folder), purge_step=epochs + 1, filename_suffix=f".{epochs}"
        )

    def append(self, row: dict[str, Any]) -> None:
        """Writes one row and flushes it to disk; ``epoch`` is the step."""
        for name, value in flatten(row).items():
            if name != "epoch" and not isinstance(value, list):
                tag = name.replace(".", "/").replace("@", "_")  # TensorBoard allows no @
                self._writer.add_scalar(tag, value, row["epoch"])
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


class Console:
    """Progress for people: a bar on a terminal, one plain line an epoch elsewhere."""

    def __init__(self, *, epochs: int, steps: int, rows_a_step: int, out: TextIO | None = None):
        self._out = out or sys.stdout
        self._epochs, self._steps, self._rows = epochs, steps, rows_a_step
        self._bar = self._task = None
        if self._out.isatty():
            from rich.console import Console as RichConsole
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:3.0f}%"),
                TextColumn("loss {task.fields[loss]}"),
                TextColumn("{task.fields[rate]} rows/s"),
                TimeRemainingColumn(),
                console=RichConsole(file=self._out),
                transient=True,
            )
            self._task = self._bar.add_task("", total=epochs * steps, loss="-", rate="-")
            self._bar.start()
        self._since = time.perf_counter()

    def chunk(self, *, epoch: int, done: int, steps: int, loss: float) -> None:
        """Moves the bar: ``done`` steps of ``epoch`` (from 1) are done, ``steps`` of them new."""
        now = time.perf_counter()
        rate = f"{self._rows * steps / max(now - self._since, 1e-9):,.0f}"
        self._since = now
        if self._bar is not None:
            self._bar.update(
                self._task,
                completed=(epoch - 1) * self._steps + done,
                description=f"epoch {epoch}/{self._epochs}",
                loss=f"{loss:.4f}",
                rate=rate,
            )

    def line(self, text: str) -> None:
        """Prints one line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=self._out, flush=True)

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
