"""Which column of a table is the user, the item, the rating, the time: by its name, or as asked.

Names are compared without case, punctuation and the word for a thing or a person in front of them:
``Book-Rating``, ``review/overall`` and ``artistID`` are a rating, a rating and an item.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from conet_jax.errors import InputError

ROLES = ("user", "item", "rating", "timestamp", "weight")
# A role as a flag says it: --time_column.
ASKED_AS = {role: role for role in ROLES} | {"timestamp": "time"}
NONE = "none"  # as the name of a column: take none for this role

# Names of columns in order of preference, in lower case and without punctuation.
SPELLINGS = {
    "user": (
        *("userid", "user", "uid", "reviewerid", "customerid", "memberid", "profileid"),
        *("accountid", "clientid", "visitorid", "personid", "steamid", "reviewer", "customer"),
        *("member", "visitor", "username", "profilename", "reviewername"),
    ),
    "item": (
        *("itemid", "item", "iid", "parentasin", "asin", "productid", "product", "movieid"),
        *("bookid", "musicid", "songid", "trackid", "newsid", "appid", "isbn", "goodsid"),
    ),
    "rating": (
        *("rating", "ratings", "overall", "score", "stars", "starrating", "rate", "grade"),
        *("ratingvalue", "ratingscore", "overallrating", "points"),
    ),
    "timestamp": (
        *("timestamp", "unixreviewtime", "time", "ts", "unixtime", "date", "datetime"),
        *("reviewdate", "reviewtime", "ratingdate", "createdat", "dateadded", "dateupdated"),
    ),
    "weight": (),  # never without being asked for
}
# Feedback of yes or no, where there is no rating: a row with 0 is no positive.
LABELS = ("label", "click", "clicked", "like", "liked", "recommended", "votedup", "favorite")
_PEOPLE = ("user", "reviewer", "customer", "member", "profile", "author", "my")
_THINGS = (
    *("item", "product", "book", "movie", "film", "music", "song", "track", "album", "artist"),
    *("game", "app", "news", "article", "video", "show", "series", "anime", "recipe", "business"),
    *("restaurant", "hotel", "place", "venue", "poi", "beer", "wine", "podcast", "course", "goods"),
    *("magazine", "comic", "event", "ad", "sku", "store", "shop", "brand", "joke", "photo", "cd"),
    *("dvd", "toy", "pet"),
)
_FRONTS = {*_PEOPLE, *_THINGS, "review", "rating"}
_ENDS_OF_ITEMS = ("", "id", "ids", "key", "code", "no", "number", "isbn")
_RATING_WORDS = {
    *("rating", "ratings", "rated", "rate", "score", "stars", "star", "overall", "grade"),
    *("points", "vote", "evaluation", "preference", "bewertung", "voto", "puntuacion"),
    "评分",
}
# With one of these, the rating is not that of the row: average_rating, ratings_count, imdb_score.
_NOT_OF_THE_ROW = {
    *("average", "avg", "mean", "median", "count", "counts", "num", "number", "n", "total", "sum"),
    *("helpful", "helpfulness", "sentiment", "predicted", "imdb", "metacritic", "global", "max"),
    *("min", "std", "text", "title", "summary", "date", "time", "timestamp", "id", "rank"),
}
_MARKS = (3, 21)  # distinct values of a column of marks: 1 to 5, or half steps from 0 to 10
_YES_NO = {"0", "1", "0.0", "1.0", "true", "false"}


class Found(NamedTuple):
    """What ``find`` makes of a table.

    Attributes:
      places: position of the column of each role that is there.
      label: whether the rating is one of ``LABELS``.
      notes: what a reader of the output should know, a sentence each.
    """

    places: dict[str, int]
    label: bool = False
    notes: tuple[str, ...] = ()


def plain(name: str) -> str:
    """Returns a name in lower case and without punctuation, and without RecBole's type.

    Example:
      >>> plain("User-ID:token")
      'userid'
    """
    return "".join(words(name))


def words(name: str) -> list[str]:
    """Returns the words of a name: ``review/userId`` is review, user, id."""
    name = re.sub(r":(token|float)(_seq)?\s*$", "", name)
    return re.findall(r"[^\W_]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name).lower())


def names_both(names: Sequence[str]) -> bool:
    """Whether a header names the user and the item."""
    return all(candidates(role, names) for role in ("user", "item"))


def find(
    where: str,
    names: Sequence[str],
    asked: Mapping[str, str],
    values: Sequence[Sequence[str]],
) -> Found:
    """Finds the column of each role.

    Args:
      where: file and line, for messages.
      names: of all columns.
      asked: names that were asked for by role, ``none`` for no such column.
      values: of each column, some of its values as text.

    Raises:
      InputError: user or item, or a column that was asked for, is not there, or two columns are it.

    Example:
      >>> find("x", ["User-ID", "ISBN", "Book-Rating"], {}, [[], [], ["5"]]).places
      {'user': 0, 'item': 1, 'rating': 2}
    """
    places = {
        role: _named(where, names, name, role)
        for role, name in asked.items()
        if name and name != NONE
    }
    if len(set(places.values())) < len(places):
        raise InputError(f"{where}: one column is asked for twice: expected another for each role")
    notes, label = [], False
    for role in ROLES:
        if asked.get(role):
            continue
        found = candidates(role, names, places.values())
        if role == "rating" and not found:
            found, label = _like_ratings(names, places.values(), values)
        if role in ("user", "item") and not found:
            found = _the_other(role, names, places)
        if len(found) > 1:
            raise InputError(
                f"{where}: {len(found)} columns could be the {ASKED_AS[role]}: "
                f"{_listed(names, found)}; expected one: --{ASKED_AS[role]}_column=NAME tells which"
                + ("" if role in ("user", "item") else f", and {NONE} that it is none")
            )
        if found:
            places[role] = found[0]
    for role in ("user", "item"):
        if role not in places:
            raise InputError(
                f"{where}: no column is known to be the {role}: found "
                f"{_listed(names, range(len(names)))}; --{role}_column=NAME tells which"
            )
    item = plain(names[places["item"]])
    if item == "parentasin" and "asin" in map(plain, names):
        notes.append("of parent_asin (the product) and asin (a variant of it), the product is read")
    return Found({role: places[role] for role in ROLES if role in places}, label, tuple(notes))


def is_name(text: str) -> bool:
    """Whether a field of a first line is the name of a column rather than a value.

    Example:
      >>> [is_name(text) for text in ("userID", "track_id", "rating", "david", "book")]
      [True, True, True, False, False]
    """
    ranks = {role: _rank(role, text) for role in SPELLINGS}
    return bool(re.search(r"[_ -](id|ID|Id)$|[a-z]I[dD]$", text.strip())) or any(
        rank is not None and rank[1] < len(SPELLINGS[role]) for role, rank in ranks.items()
    )


def left_over(names: Sequence[str], places: Mapping[str, int]) -> list[str]:
    """Returns the names of the columns that have no role."""
    return [name for at, name in enumerate(names) if at not in places.values()]


def overlooked(
    names: Sequence[str], places: Mapping[str, int], values: Sequence[Sequence[str]]
) -> list[str]:
    """Returns the columns without a role that look like a rating, or like yes and no.

    By a word of the name, or by their values: 0 and 1 alone, or, where no rating is read, a few
    numbers from 0 to 10.
    """
    found = []
    for at, name in enumerate(names):
        seen = {value.strip().lower() for value in values[at]} if at < len(values) else set()
        rating = _RATING_WORDS & set(words(name)) or plain(name) in LABELS
        few = "rating" not in places and _MARKS[0] <= len(seen) <= _MARKS[1]
        marks = few and all(_is_number(x) and x[:1].isdecimal() and _up_to_ten(x) for x in seen)
        if at not in places.values() and (rating or marks or (seen and seen <= _YES_NO)):
            found.append(name)
    return found


def _the_other(role: str, names: Sequence[str], places: Mapping[str, int]) -> list[int]:
    """Of two columns, of which one is known to be the item, or the user, the one that is left."""
    known = "item" if role == "user" else "user"
    at = [places[known]] if known in places else candidates(known, names)
    if len(names) != 2 or len(at) != 1:
        return []
    name = names[1 - at[0]]
    other = [_rank(kind, name) for kind in ("rating", "timestamp")] != [None, None]
    other = other or _RATING_WORDS & set(words(name)) or plain(name) in LABELS
    return [] if other else [1 - at[0]]


def _named(where: str, names: Sequence[str], name: str, role: str) -> int:
    same = [at for at, other in enumerate(names) if other == name]
    same = same or [at for at, other in enumerate(names) if plain(other) == plain(name)]
    if len(same) != 1:
        raise InputError(
            f"{where}: --{ASKED_AS[role]}_column={name} is {len(same) or 'none'} of the columns: "
            f"expected one of {_listed(names, range(len(names)))}"
        )
    return same[0]


def candidates(role: str, names: Sequence[str], taken: Sequence[int] = ()) -> list[int]:
    """Returns the columns whose names fit a role best: none, one, or several."""
    ranks = {at: _rank(role, name) for at, name in enumerate(names) if at not in taken}
    best = min((rank for rank in ranks.values() if rank is not None), default=None)
    return [at for at, rank in ranks.items() if best is not None and rank == best]


def _rank(role: str, name: str) -> tuple[int, int] | None:
    """How well a name fits a role, the lower the better: words in front, place in the table."""
    left = words(name)
    for front in range(len(left)):
        if front and left[front - 1] not in _FRONTS:
            break
        rest = "".join(left[front:])
        if rest in SPELLINGS[role]:
            return front, SPELLINGS[role].index(rest)
        if role == "item" and any(
            rest == thing + end for thing in _THINGS for end in _ENDS_OF_ITEMS
        ):
            return front, len(SPELLINGS[role])
    return None


def _like_ratings(
    names: Sequence[str], taken: Sequence[int], values: Sequence[Sequence[str]]
) -> tuple[list[int], bool]:
    """Columns of numbers that by a word of their name are ratings; else the first label."""
    numbers = [
        at
        for at in range(len(names))
        if at not in taken and at < len(values) and values[at] and all(map(_is_number, values[at]))
    ]
    found = [
        at
        for at in numbers
        if _RATING_WORDS & set(words(names[at])) and not _NOT_OF_THE_ROW & set(words(names[at]))
    ]
    if found:
        return found, False
    by_name = {plain(names[at]).removeprefix("is"): at for at in reversed(numbers)}
    found = [by_name[label] for label in LABELS if label in by_name][:1]
    return found, bool(found)


def _is_number(value: str) -> bool:
    return re.fullmatch(r"\s*[+-]?([0-9]+[.,]?[0-9]*|true|false)\s*", value, re.I) is not None


def _up_to_ten(value: str) -> bool:
    return float(value.replace(",", ".")) <= 10


def _listed(names: Sequence[str], places: Sequence[int]) -> str:
    shown = [repr(names[at])[:40] for at in places]
    return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")
