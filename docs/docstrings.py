"""For the API reference: fields in our docstrings ("name: what it is", one below the other) become a list."""

import re
from typing import Any

import griffe

FIELD = re.compile(r"(?P<names>\w+(?:, \w+)*): +(?P<text>\S.*)")


def as_markdown(text: str) -> str:
    """`text` with each run of fields as a Markdown list; everything else as it is.

    >>> print(as_markdown("Adds.\\n\\none: the first,\\n     a number\\ntwo: the second"))
    Adds.
    <BLANKLINE>
    - **one**: the first,
      a number
    - **two**: the second
    """
    lines: list[str] = []
    in_list = False
    for line in text.splitlines():
        field = FIELD.fullmatch(line)
        if field:
            if not in_list and lines and lines[-1]:
                lines.append("")
            lines.append(f"- **{field['names']}**: {field['text']}")
            in_list = True
        elif in_list and line.startswith("  ") and lines[-1]:
            lines.append(f"  {line.strip()}")
        else:
            in_list = in_list and not line.strip()  # a blank line may lie between two fields
            lines.append(line)
    return "\n".join(lines)


class Fields(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **given: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
