"""Where in Python an instruction of a compiled program comes from."""

from __future__ import annotations

import re

__all__ = ["Frames"]


class Frames:
    """The tables at the head of a program that lead from an instruction to a line of Python."""

    def __init__(self, text: str) -> None:
        self._names = _table(text, "FileNames", r'(\d+) "(.*)"')
        self._functions = _table(text, "FunctionNames", r'(\d+) "(.*)"')
        self._locations = _table(text, "FileLocations", r"(\d+) \{(.*)\}")
        self._frames = _table(text, "StackFrames", r"(\d+) \{(.*)\}")

    def source(self, attributes: str) -> str:
        """The line of Python that an instruction comes from, as FILE:LINE, or ""."""
        match = re.search(r"stack_frame_id=(\d+)", attributes)
        frame = match[1] if match else ""
        while frame in self._frames:
            fields = dict(re.findall(r"(\w+)=(\d+)", self._frames[frame]))
            location = dict(re.findall(r"(\w+)=(\d+)", self._locations[fields["file_location_id"]]))
            file = self._names.get(location["file_name_id"], "")
            if "/site-packages/" not in file:
                return f"{file.rpartition('/ranktuner_jax/')[2]}:{location['line']}"
            parent = fields.get("parent_frame_id", "")
            if parent == frame:
                break
            frame = parent
        return ""


def _table(text: str, title: str, row: str) -> dict[str, str]:
    match = re.search(rf"^{title}\n((?:.+\n)*)", text, re.MULTILINE)
    return dict(re.findall(row, match[1])) if match else {}
