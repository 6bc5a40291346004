"""A transfer report as a page and as text, from report.json alone."""

import html
import shlex
from pathlib import Path
from string import Template
from typing import Any

from conet_jax import files
from conet_jax.files import write_json, write_text
from conet_jax.studies import pictures
from conet_jax.studies.verdict import GROUP_USERS, interval, percent
from conet_jax.studies.words import ALONE, details, headline, target_only, text, unsettled

Json = dict[str, Any]

_WAYS = {
    "on": "as trained",
    "off": "off, every H zero",
    "other": "another's source",
}


def publish(report: Json, workdir: Path) -> str:
    """Writes report.json, and report.html from it; returns what is printed.

    Args:
      report: from ``findings.collect``.
      workdir: of the study.
    """
    write_json(workdir / "report.json", report)
    stored = files.read_json(workdir / "report.json")
    write_text(workdir / "report.html", page(stored))
    return "\n".join([text(stored), f"report: {workdir / 'report.html'}"])


def page(report: Json) -> str:
    """Returns the page, whole: no other file, and nothing from the network."""
    names = report["names"]
    title = f"Does {names['source']} help {names['target']}?"
    sections = [
        f"<h1>{_safe(title)}</h1>",
        *_verdict(report),
        *_whom(report),
        *_compared(report),
        *_carried(report),
        *_examples(report),
        "<h2>Beware</h2>",
        _list(report["beware"]),
        *_next(report),
        *_about(report),
    ]
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.substitute(title=_safe(title), body="\n".join(sections))


def _safe(value: Any) -> str:
    return html.escape(str(value))


def _list(lines: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{_safe(line)}</li>" for line in lines) + "</ul>"


def _table(head: list[str], rows: list[list[str]], *, caption: str = "", main: int = -1) -> str:
    """A table of cells that are HTML already."""
    parts = ['<div class="wide"><table>']
    if caption:
        parts.append(f"<caption>{_safe(caption)}</caption>")
    parts.append("<tr>" + "".join(f'<th scope="col">{cell}</th>' for cell in head) + "</tr>")
    for at, row in enumerate(rows):
        mark = ' class="main"' if at == main else ""
        cells = "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in row)
        parts.append(f"<tr{mark}>{cells}</tr>")
    return "".join([*parts, "</table></div>"])


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{_safe(caption)}</figcaption></figure>"


def _verdict(report: Json) -> list[str]:
    outcome = report["verdict"]["outcome"]
    kind = outcome if outcome in ("helps", "hurts", "none") else "open"
    parts = [f'<div class="verdict {kind}"><p>{_safe(headline(report))}</p>']
    parts += [f"<p>{_safe(line)}</p>" for line in details(report)]
    parts.append("</div>")
    if open_ := unsettled(report):
        parts += ["<h3>What this study could not settle</h3>", _list(open_)]
    return parts


def _whom(report: Json) -> list[str]:
    found, names = report["groups"], report["names"]
    parts = ["<h2>For whom</h2>"]
    parts.append(
        _figure(
            pictures.groups(found, names),
            f"Gain of the recipe over {ALONE[report['verdict']['baseline']]} in warm "
            f"NDCG@{report['k']}, by a user's interactions: blue in {names['target']}, orange in "
            f"{names['source']}. Lines are 95% intervals, of which one of twenty is off by chance. "
            f"Grey are groups of fewer than {GROUP_USERS} users, of which the text does not speak; "
            "they may lie beyond the picture.",
        )
    )
    if found["target_only"]:
        parts.append(f"<p>{_safe(target_only(report))}</p>")
    else:
        parts.append(
            '<p class="soft">These data hold no test users of the target alone '
            "(<code>launch/prepare.py --users=all</code> keeps them).</p>"
        )
    return parts


def _compared(report: Json) -> list[str]:
    k, baseline = report["k"], report["verdict"]["baseline"]
    order = sorted(report["methods"], key=lambda row: -row["warm"]["ndcg"]["mean"])
    rows = []
    for row in order:
        gain = "baseline" if row["gain"] is None else _safe(interval(row["gain"]))
        rows.append(
            [
                _safe(row["method"]),
                gain,
                _mean(row["warm"]["ndcg"]),
                f"{row['warm']['hit_ratio']['mean']:.4f}",
                f"{row['warm']['mrr']['mean']:.4f}",
                f"{row['published']['ndcg']['mean']:.4f}",
                f"{row['seeds']}",
                f"{row['trials']}",
            ]
        )
    head = [
        "method",
        "gain, % [95%]",
        f"NDCG@{k}",
        f"HR@{k}",
        f"MRR@{k}",
        f"NDCG@{k}<br>as published",
        "seeds",
        "trials",
    ]
    main = next(at for at, row in enumerate(order) if row["method"] == "recipe")
    tried = (
        "Settings were chosen on validation, with equally many trials for each method that has any"
        if order[main]["trials"] > 1
        else "All settings are the defaults"
    )
    parts = [
        "<h2>What was compared</h2>",
        _figure(
            pictures.methods(order, baseline),
            "Blue knows the source, grey does not. Lines are 95% intervals over users and seeds.",
        ),
        _table(head, rows, caption="Test items, warm unless said otherwise.", main=main),
        '<p class="soft">Warm: held-out items with a training pair, among candidates with one; as '
        f"published: all of them. ± is the standard deviation over seeds. {tried}; each run was "
        "tested once. Methods that do not decide the verdict have fewer seeds.</p>",
        "<ul>"
        + "".join(f"<li><b>{_safe(r['method'])}</b>: {_safe(r['says'])}</li>" for r in order)
        + "</ul>",
    ]
    parts += [
        f"<p>{_safe(name)} failed: {_safe(why)}</p>" for name, why in report["failures"].items()
    ]
    return parts


def _mean(spread: Json) -> str:
    deviation = "" if spread["std"] is None else f" ± {spread['std']:.4f}"
    return f"{spread['mean']:.4f}{deviation}"


def _carried(report: Json) -> list[str]:
    found = report["carried"]
    rows = [
        [
            _safe(_WAYS[row["way"]]),
            f"{row['ndcg']:.4f}",
            "" if row["gain"] is None else _safe(interval(row["gain"])),
        ]
        for row in found["crossing"]
    ]
    parts = [
        "<h2>What carries it</h2>",
        "<p>The recipe has two ways to use the source: the factors that both domains share, and "
        "the cross connections H. The table is about the second, in the trained model: where "
        "switching it off costs less than the whole gain, the factors carry the rest. A fall alone "
        "proves nothing: towers lean on what they were trained with, even where it is of no use. "
        "The control above, which is trained with another's source, is the proof, and of both "
        "ways.</p>",
        _table(
            ["crossing", f"NDCG@{report['k']}", "change, % [95%]"],
            rows,
            caption=f"The first {found['seeds']} seeds; intervals over users."
            if found["seeds"] > 1
            else "The first seed; intervals over users.",
        ),
    ]
    if found["items"]:
        most = max(row["share"] for row in found["items"])
        bars = [
            [
                _safe(row["item"]),
                f"{percent(row['share'])}",
                f"{row['users']}",
                f'<td class="left"><span class="bar" style="width: '
                f'{8 * row["share"] / most:.2f}rem"></span></td>',
            ]
            for row in found["items"]
        ]
        caption = (
            f"Source items by their share of what the source adds to the lists of {found['of']} "
            "users drawn at random, and for how many of these users."
        )
        head = ["source item", "share", "users", "<span></span>"]
        parts += ["<h3>Source items that weigh most</h3>", _table(head, bars, caption=caption)]
    if found["matrices"]:
        zeros = ", ".join(percent(row["zeros"]) for row in found["matrices"])
        parts.append(
            _figure(
                pictures.matrices(found["matrices"]),
                "The cross connections of the first run, from the units in rows to those in "
                f"columns: blue positive, orange negative, empty zero. Exact zeros: {zeros}.",
            )
        )
    return parts


def _examples(report: Json) -> list[str]:
    names, items = report["names"], report["data"]["target_items"]
    parts = [
        "<h2>Examples</h2>",
        '<p>Users drawn at random. Their test item is <span class="hit">marked</span> where it '
        f"is on a list. Lists are of all {items:,} items, of which a single one is rarely found: "
        "judge the lists as a whole.</p>",
        '<div class="examples">',
    ]
    for row in report["examples"]:
        parts.append(f'<div class="example"><h3>{_safe(row["user"])}</h3>')
        for domain in ("target", "source"):
            own = row[domain]
            more = own["count"] - len(own["items"])
            listed = ", ".join(map(str, own["items"])) or "nothing"
            rest = f" and {more} more" if more else ""
            parts.append(f"<p><b>{_safe(names[domain])}</b>: {_safe(listed)}{rest}</p>")
        parts.append('<div class="lists">')
        for key, title in (("with", "with the source"), ("without", "without")):
            parts.append(f"<div>{title}{_ranked(row[key], row['held_out'])}</div>")
        parts.append(f'</div><p class="soft">Test item: {_safe(row["held_out"])}</p></div>')
    return [*parts, "</div>"]


def _ranked(items: list[str] | None, held_out: str) -> str:
    if items is None:
        return '<p class="soft">the most popular items</p>'
    cells = (
        f'<li class="hit">{_safe(item)}</li>' if item == held_out else f"<li>{_safe(item)}</li>"
        for item in items
    )
    return "<ol>" + "".join(cells) + "</ol>"


def _next(report: Json) -> list[str]:
    found = report["next"]
    parts = [
        "<h2>What next</h2>",
        f"<p>Take <b>{_safe(found['method'])}</b>: {_safe(found['says'])}. {_settings(report)}</p>",
    ]
    for step in found["steps"]:
        parts.append(f"<p>{_safe(step['what'])}</p><pre>{_safe(_lines(step['command']))}</pre>")
    return parts


def _settings(report: Json) -> str:
    """What the commands' config is."""
    row = next(row for row in report["methods"] if row["method"] == report["next"]["method"])
    if row["trials"] == 1:
        return "Its settings are the defaults."
    best = "the best on validation" if row["chosen"] else "the defaults, the best on validation"
    return f"Its settings are {best} of {row['trials']} trials."


def _lines(command: str) -> str:
    """The same command for a shell, an option a line: a page would break it within their names."""
    first, *rest = shlex.split(command)
    breaks = (" \\\n    " if word.startswith("--") else " " for word in rest)
    return first + "".join(map("".join, zip(breaks, map(shlex.quote, rest), strict=True)))


def _about(report: Json) -> list[str]:
    counts, target = report["data"], report["names"]["target"]
    tested = f"{counts['test_users']:,} users of both domains have a test item"
    if only := counts.get("test_target_only_users"):
        tested += f", and {only:,} of {target} alone"
    return [
        "<h2>The data</h2>",
        _table(
            ["", "items", "interactions", "a user of it"],
            [
                [
                    _safe(report["names"][domain]),
                    f"{counts[f'{domain}_items']:,}",
                    f"{counts[f'{domain}_interactions']:,}",
                    f"{counts[f'{domain}_interactions'] / (counts['users'] - others):.1f}",
                ]
                for domain, others in (
                    ("target", counts.get("source_only_users", 0)),
                    ("source", counts.get("target_only_users", 0)),
                )
            ],
            caption=f"{counts['users']:,} users. {tested}.",
        ),
        f'<p class="soft">Data {counts["hash"][:12]}. All figures are in report.json.</p>',
    ]
