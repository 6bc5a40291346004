"""For mkdocs: Griffe reads the section "Examples:", our docstrings say "Example:"."""

import re
from typing import Any

import griffe


class Sections(griffe.Extension):
    """Renames the section in what Griffe reads, so that doctests are shown as code."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Is called with each module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = re.sub(
                r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE
            )
