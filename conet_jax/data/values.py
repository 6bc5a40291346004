"""One value of a raw file: an id, a number, a time. What is wrong with it is a ``ValueError``."""

import datetime
import email.utils
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

NUMBER = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"
DECIMAL_COMMA = r"[+-]?[0-9]+,[0-9]+"
# In lower case and without white space around it, no id: what programs write for a missing value.
MISSING = frozenset(
    ("", "null", "none", "nan", "n/a", "na", "<na>", "#n/a", "#na", "nil", "undefined", r"\n")
)
_YES_NO = {"true": 1.0, "false": 0.0, True: 1.0, False: 0.0}
_IS_NUMBER = re.compile(NUMBER).fullmatch
_IS_DECIMAL_COMMA = re.compile(DECIMAL_COMMA).fullmatch
# Units of times as numbers: from this size up of the largest, a second has so many.
_UNITS = ((1e17, 1e9, "ns"), (1e14, 1e6, "µs"), (1e11, 1e3, "ms"))
_DAY_MONTH_YEAR = re.compile(r"([0-9]{1,2})([/.-])([0-9]{1,2})\2([0-9]{4}|[0-9]{2})(?:[ T]+(.*))?")
_FORMS = (
    *("%Y-%m", "%Y/%m/%d", "%Y/%m/%d %H:%M", "%Y/%m/%d %H:%M:%S", "%Y.%m.%d"),
    *("%B %d, %Y", "%b %d, %Y", "%d %B %Y", "%d %b %Y", "%d-%b-%Y", "%d-%b-%y", "%m %d, %Y"),
    *("%a %b %d %H:%M:%S %z %Y", "%a %b %d %H:%M:%S %Y", "%d/%b/%Y:%H:%M:%S %z"),
)
_CLOCKS = ("%H:%M", "%H:%M:%S", "%H:%M:%S.%f", "%I:%M %p", "%I:%M:%S %p")
WEIGHTS = (1e-30, 1e30)  # the least and the largest: sums of them are numbers in float32
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


class Reading(NamedTuple):
    """How the numbers and times of a file are written.

    Attributes:
      decimal_comma: whether 4,5 is four and a half.
      label: whether the rating may be true or false.
      day_first: whether 3/4/2017 is in April.
    """

    decimal_comma: bool = False
    label: bool = False
    day_first: bool = False


def is_missing(value: Any) -> bool:
    """Whether an id is missing: null, NaN, blank, or what programs write for it.

    Example:
      >>> [is_missing(value) for value in (None, " ", "NULL", "N/A", "0", 0)]
      [True, True, True, True, False, False]
    """
    if type(value) is str:
        return (len(value) < 10 or not value.strip()) and value.strip().lower() in MISSING
    return value is None or (type(value) is float and math.isnan(value))


def id_of(role: str, value: Any) -> str:
    """Returns an id that is not missing as text, as it stands."""
    if type(value) is int:
        return str(value)
    if type(value) is float and value.is_integer():  # of a table that has gaps elsewhere
        return str(int(value))
    if type(value) is not str:
        raise ValueError(f"bad {role} id {value!r:.60}: expected text or a whole number")
    if "\n" in value or "\r" in value or "\0" in value:
        raise ValueError(f"bad {role} id {value!r:.60}: expected no line end and no NUL in it")
    if not value.isascii() and any("\ud800" <= mark <= "\udfff" for mark in value):
        raise ValueError(
            f"bad {role} id {value!r:.60}: half of a UTF-16 surrogate pair, which is no text"
        )
    return value


def real_of(role: str, value: Any, reading: Reading) -> float:
    """Returns a rating or weight."""
    if role == "rating" and reading.label and str(value).strip().lower() in _YES_NO:
        return _YES_NO[str(value).strip().lower()]
    if is_missing(value):
        raise ValueError(f"the {role} is missing{_shown(value)}: expected a number in every row")
    if type(value) in (int, float):
        value = str(value)
    if type(value) is str and reading.decimal_comma and _IS_DECIMAL_COMMA(value):
        value = value.replace(",", ".")
    if type(value) is not str or not _IS_NUMBER(value) or math.isinf(float(value)):
        raise ValueError(f"bad {role} {value!r:.60}: expected a finite number")
    if role == "weight" and not WEIGHTS[0] <= float(value) <= WEIGHTS[1]:
        raise ValueError(
            f"bad weight {value!r:.60}: expected a number above 0, from {WEIGHTS[0]:g} to "
            f"{WEIGHTS[1]:g}"
        )
    return float(value)


def time_of(value: Any, reading: Reading) -> float:
    """Returns a time as a number: seconds since 1970 of a date, else the number itself."""
    if is_missing(value):
        raise ValueError(f"the timestamp is missing{_shown(value)}: expected one in every row")
    comma = reading.decimal_comma and type(value) is str and _IS_DECIMAL_COMMA(value)
    if type(value) is str and not _IS_NUMBER(value) and not comma:
        when = _date(value.strip().removesuffix(" UTC"), reading.day_first)
        if when is not None:
            return when
        raise ValueError(
            f"bad timestamp {value!r:.60}: expected a finite number, or a date such as 2017-08-31"
        )
    if isinstance(value, datetime.date):
        if not isinstance(value, datetime.datetime):
            value = datetime.datetime(value.year, value.month, value.day)
        return _seconds(value)
    return real_of("timestamp", value, reading)


def _shown(value: Any) -> str:
    return f" ({value!r})" if value else ""


def day_first(values: Sequence[str]) -> bool:
    """Whether dates such as 31/8/2017 have the day first, from some of a column.

    Where no part is above 12, a slash says month first, a dot or a dash day first.

    Example:
      >>> day_first(["1/2/2017", "31/2/2017"]), day_first(["1/2/2017"]), day_first(["1.2.2017"])
      (True, False, True)
    """
    parts = [found for value in values if (found := _DAY_MONTH_YEAR.fullmatch(value.strip()))]
    if any(int(found[1]) > 12 for found in parts):
        return True
    if any(int(found[3]) > 12 for found in parts):
        return False
    return bool(parts) and parts[0][2] != "/"


def unit(largest: float) -> tuple[float, str]:
    """Returns how many make a second, and the name, of times of which this is the largest.

    Example:
      >>> unit(1502144324), unit(1502144324000)
      ((1.0, 's'), (1000.0, 'ms'))
    """
    return next(((size, name) for least, size, name in _UNITS if largest >= least), (1.0, "s"))


def _date(text: str, day_first: bool) -> float | None:
    try:
        return _seconds(datetime.datetime.fromisoformat(text))
    except ValueError:
        pass
    found = _DAY_MONTH_YEAR.fullmatch(text)
    if found:
        day, month = (found[1], found[3]) if day_first else (found[3], found[1])
        year = "%Y" if len(found[4]) == 4 else "%y"
        forms = [f"%d %m {year} {clock}" for clock in _CLOCKS] if found[5] else [f"%d %m {year}"]
        text = f"{day} {month} {found[4]} {found[5] or ''}".strip()
    else:
        forms = _FORMS
    for form in forms:
        try:
            return _seconds(datetime.datetime.strptime(text, form))
        except ValueError:
            continue
    try:
        return _seconds(email.utils.parsedate_to_datetime(text))  # Mon, 07 Aug 2017 10:00:00 GMT
    except (ValueError, TypeError, IndexError):
        return None


def _seconds(when: datetime.datetime) -> float:
    """Seconds since 1970; a time without a zone is in UTC."""
    if when.tzinfo is None:
        when = when.replace(tzinfo=datetime.UTC)
    return (when - _EPOCH).total_seconds()
