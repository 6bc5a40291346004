"""For mkdocs: docstrings as Griffe and Markdown are to read them."""

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Says "Examples:" for our "Example:", and that brackets in prose are no links."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Is called with each module, class, function and attribute."""
        if obj.docstring:
            parts = re.split(r"^Example:$", obj.docstring.value, flags=re.MULTILINE)
            parts[0] = parts[0].replace("][", "]\\[")
            obj.docstring.value = "Examples:".join(parts)
