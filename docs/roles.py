"""Cross-references of docstrings, ``:class:`Student```, as plain code."""

import re

import griffe

ROLE = re.compile(r":(?:class|meth|func|mod|data|attr|exc):`~?([^`]+)`")


class Roles(griffe.Extension):
    """Replaces roles, which Markdown does not have, before docstrings are parsed."""

    def on_instance(self, *, obj, **_):
        """Rewrite an object's docstring."""
        if obj.docstring:
            obj.docstring.value = ROLE.sub(r"``\1``", obj.docstring.value)
