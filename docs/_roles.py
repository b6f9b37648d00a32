"""Show Sphinx roles in docstrings as code: mkdocstrings reads Markdown."""

import re
from typing import Any

from griffe import Extension, Object

_ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):`~?([^`]+)`")


class Roles(Extension):
    """An extension that rewrites every docstring once it is loaded."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Turn roles and literal blocks into Markdown."""
        if obj.docstring:
            text = _ROLE.sub(r"`\1`", obj.docstring.value).replace("``", "`")
            obj.docstring.value = re.sub(r"::\n\n(?= {4})", ":\n\n", text)
