"""A transfer report in words: the verdict in a sentence, what is behind it, a screen of text."""

from typing import Any

from conet_jax.studies.verdict import interval, percent

Json = dict[str, Any]

ALONE = {
    "popularity": "popularity",
    "ials": "implicit ALS of the target",
    "recipe_mlp": "the recipe without the source",
}


def headline(report: Json) -> str:
    """Returns the verdict in a sentence, with its number and interval."""
    found, names = report["verdict"], report["names"]
    source, target = (names[domain] for domain in ("source", "target"))
    main, metric = found["main"], f"NDCG@{report['k']}"
    gain = f"{metric} {interval(main)}" if main["gain"] is not None else metric
    most = f"; {found['whom']}" if found["whom"] else ""
    match found["outcome"]:
        case "helps":
            control = interval(found["control"])
            return (
                f"Yes, {source} helps {target}: {gain}, and {control} over the same recipe with "
                f"another user's source{most}."
            )
        case "not its content":
            return (
                f"No: the recipe gains ({gain}), but with another user's source it does as well, "
                f"so what {source} says of a user is not what helps."
            )
        case "hurts":
            return f"No, {source} does harm to {target}: {gain}."
        case "none":
            return (
                f"No gain that we could see from {source} for {target}: {gain}; a gain of "
                f"{percent(main['detectable'])} would have been seen, in four of five such studies."
            )
    return f"Not settled whether {source} helps {target}: {gain}."


def details(report: Json) -> list[str]:
    """Returns what is to be said besides, a sentence each."""
    found, names, main = report["verdict"], report["names"], report["verdict"]["main"]
    baseline = ALONE[found["baseline"]]
    lines = [
        f"Compared: the recipe with both domains, and {baseline}: of the methods that know "
        f"{names['target']} alone it is the best on validation. In brackets the 95% interval over "
        "users and seeds."
    ]
    if found["published"]["gain"] is not None and found["published"] != main:
        lines.append(
            "Over all test items, those without a training pair too, as papers count: "
            f"{interval(found['published'])}."
        )
    if report["groups"]["target_only"]:
        lines.append(target_only(report))
    control, joined = found["control"], found["joined"]
    if control and control["gain"] is not None:
        lines.append(
            "Control, the same recipe trained with another user's source: over that the recipe "
            f"gains {interval(control)}."
        )
        if found["outcome"] == "helps" and control["gain"] < main["gain"]:
            lines[-1] += (
                " That much is what the source says of each user; the rest of the gain has other "
                "causes, such as other settings or more towers."
            )
    if joined and joined["gain"] is not None:
        as_good = joined["low"] <= 0
        word = (
            "plain joined implicit ALS, which trains in seconds, is as good as the recipe, as far "
            "as we could see"
            if as_good
            else "the recipe is better than plain joined implicit ALS"
        )
        lines.append(f"{word[0].upper()}{word[1:]} (recipe over it: {interval(joined)}).")
    lines += [line[0].upper() + line[1:] + "." for line in found["why"]]
    if control and control["low"] is not None and control["low"] <= 0 <= control["high"]:
        if found["outcome"] == "none":
            lines.append(
                "The reason may be that the source says nothing of the target: another user's "
                "source does as well."
            )
        if found["outcome"] == "hurts":
            lines.append(
                "Another user's source does as much harm: the source says nothing of the target, "
                "and the recipe pays for reading it."
            )
    return lines


def target_only(report: Json) -> str:
    """Returns what there is to say of users without any source, where there are such."""
    found, target = report["groups"]["target_only"], report["names"]["target"]
    says = "a gain, by what the model has learned of others"
    if found["low"] is None or found["low"] <= 0 <= found["high"]:
        says = "no difference that we could see"
    elif found["high"] < 0:
        says = "a loss"
    return (
        f"That is of users of both domains. Of {found['users']:,} test users of {target} alone: "
        f"{interval(found)}, {says}."
    )


def unsettled(report: Json) -> list[str]:
    """Returns what the study could not settle, a sentence each."""
    return [line[0].upper() + line[1:] + "." for line in report["verdict"]["unsettled"]]


def text(report: Json) -> str:
    """Returns the report on a screen."""
    k = report["k"]
    lines = ["", headline(report), "", *details(report)]
    if open_ := unsettled(report):
        lines += ["", "Not settled:", *(f"  {line}" for line in open_)]
    head = f"warm NDCG@{k}"
    lines += ["", f"{'method':<14}{head:>14}{'gain [95%]':>24}{'published':>12}{'seeds':>7}"]
    for row in report["methods"]:
        gain = "baseline" if row["gain"] is None else interval(row["gain"])
        lines.append(
            f"{row['method']:<14}{row['warm']['ndcg']['mean']:>14.4f}{gain:>24}"
            f"{row['published']['ndcg']['mean']:>12.4f}{row['seeds']:>7}"
        )
    lines += [f"{name} failed: {why}" for name, why in report["failures"].items()]
    lines += ["", f"Next: {report['next']['method']}, {report['next']['says']}"]
    lines += [f"  {step['command']}" for step in report["next"]["steps"]]
    return "\n".join([*lines, ""])
