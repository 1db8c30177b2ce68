"""One rendering of a conversation that also tells how its beginnings would be rendered.

A chat template may look at any message before it writes the first, so in general the first n
messages have to be rendered to know their text, which takes time quadratic in the turns. But most
templates write message by message. Whether one did is observed while it renders: as long as it has
not asked for message n + 1, it cannot know that there is one, and what it has written is what it
would have written for n messages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2 import nodes

__all__ = ["Trace", "Tracer"]

# Objects that carry a state out of a loop, unseen.
_STATEFUL = {"namespace", "cycler", "joiner"}
# Called where the body of a loop begins, and where it ends.
_BEGIN, _END = "__begin_of_turn__", "__end_of_turn__"


@dataclass(frozen=True)
class Trace:
    """A rendering, and which part of it depends on the first messages only.

    Attributes:
      text: The rendering of all messages.
      ends: The rendering of the first n messages is `text[:ends[n]] + tail`, for each n in it.
      tail: What the template writes after the last message.
    """

    text: str
    ends: dict[int, int]
    tail: str = ""


class Tracer:
    """Renders with a template and records what it asks of the messages.

    Let the template loop over the messages, and let it ask for message n + 1 at the end of the
    loop's body, and not earlier. Given n messages only, it would have run in the same way up to
    there, and would then have left the loop. What follows the loop is the same for every n if it
    neither looks at the messages nor at a state that the loop has changed. Jinja's loops have a
    scope of their own and the sandbox forbids to change lists, so only namespaces (and `cycler`
    and `joiner`) are such states: a template with one of them is not traced, nor is one whose
    loops may end in other ways (`break`, recursion, `batch`).

    Args:
      template: The compiled template.
      source: Its text.

    Example:
      >>> source = "{% for m in messages %}<{{ m.content }}>{% endfor %}{{ end }}"
      >>> template = jinja2.sandbox.ImmutableSandboxedEnvironment().from_string(source)
      >>> Tracer(template, source).trace([{"content": "a"}, {"content": "b"}], end="!")
      Trace(text='<a><b>!', ends={1: 3, 2: 6}, tail='!')
    """

    def __init__(self, template: jinja2.Template, source: str) -> None:
        environment = template.environment
        tree = environment.parse(source)
        names = {node.name for node in tree.find_all(nodes.Name)}
        # Of the lazy filters, `batch` asks for messages that it keeps for later.
        unusual = (
            tree.find(nodes.Break) is not None
            or any(loop.recursive for loop in tree.find_all(nodes.For))
            or any(node.name == "batch" for node in tree.find_all(nodes.Filter))
        )
        self._template: jinja2.Template | None = None
        if not names & _STATEFUL and not unusual:
            _mark_loops(tree.body)
            tree.set_environment(environment)
            self._template = environment.from_string(tree)

    def trace(self, messages: Sequence[dict[str, Any]], **options: Any) -> Trace | None:
        """Renders the messages.

        Args:
          messages: The conversation.
          **options: What else the template is given.

        Returns:
          The rendering; `ends` is empty if it does not tell how beginnings are rendered. None if
          the template cannot be traced, or fails.
        """
        if self._template is None:
            return None
        record = _Record(messages)
        parts = []
        options |= {"messages": _Messages(record), _BEGIN: record.begin, _END: record.end}
        try:
            for part in self._template.generate(**options):
                record.written += len(part)
                parts.append(part)
        except Exception:  # The caller renders without a trace, and reports what fails there.
            return None
        text = "".join(parts)
        last = record.ends.get(len(messages))
        if last is None or record.looked_back:
            return Trace(text, {})
        return Trace(text, record.ends, text[last:])


def _mark_loops(body: list[nodes.Node]) -> None:
    """Calls `_Record.begin` and `end` in the body of each loop that is inside no other loop.

    Loops in macros, blocks and the like are left out: their text is written later.
    """
    for node in body:
        if isinstance(node, nodes.For):
            begin, end = (
                nodes.Output([nodes.Call(nodes.Name(name, "load"), [], [], None, None)])
                for name in (_BEGIN, _END)
            )
            node.body = [begin.set_lineno(node.lineno), *node.body, end.set_lineno(node.lineno)]
        elif isinstance(node, nodes.If):
            for part in (node.body, node.elif_, node.else_):
                _mark_loops(part)  # type: ignore[arg-type]  # elif_ is a list of If


class _UntraceableError(Exception):
    """The template does something with the messages that a trace cannot follow."""


class _Record:
    """What a template has asked of the messages so far, and written before it did."""

    def __init__(self, messages: Sequence[dict[str, Any]]) -> None:
        self.messages = messages
        self.written = 0
        self.ends: dict[int, int] = {}
        self.looked_back = False
        # The template knows of this many messages; one more than there are once it knows the end.
        self._known = 0
        self._reader = object()  # What the template asked last in a loop.
        self._between = False

    def begin(self) -> str:
        """The body of a loop begins here."""
        self._between = False
        return ""

    def end(self) -> str:
        """The body of a loop ends here, and the loop asks for its next item."""
        self._between = True
        return ""

    def ask(self, count: int, reader: object = None) -> None:
        """The template learns whether there are `count` messages."""
        self.looked_back |= self._known > len(self.messages)
        if count == self._known + 1 and self._between and reader is self._reader:
            self.ends[self._known] = self.written
        if reader is not None:
            self._reader, self._between = reader, False
        self._known = max(self._known, count)

    def ask_all(self) -> None:
        """The template learns how many messages there are."""
        self.ask(len(self.messages) + 1)


class _Messages:
    """The messages from one of them on, for a template, in the place of a list.

    What a list can do and this cannot raises, so that no answer differs from a list's.
    """

    def __init__(self, record: _Record, start: int = 0) -> None:
        self._record = record
        self._start = start

    def __iter__(self) -> Iterator[dict[str, Any]]:
        reader = object()
        index = self._start
        while True:
            self._record.ask(index + 1, reader)
            if index >= len(self._record.messages):
                return
            yield self._record.messages[index]
            index += 1

    def __getitem__(self, key: Any) -> Any:
        rest = self._record.messages[self._start :]
        if isinstance(key, slice):
            if (key.start or 0) >= 0 and key.stop is None and key.step in (None, 1):
                return _Messages(self._record, self._start + (key.start or 0))
            self._record.ask_all()
        elif not isinstance(key, int):
            raise _UntraceableError
        elif key < 0:
            self._record.ask_all()
        else:
            self._record.ask(self._start + key + 1)
        return rest[key]

    def __len__(self) -> int:
        self._record.ask_all()
        return max(0, len(self._record.messages) - self._start)

    def __bool__(self) -> bool:
        self._record.ask(self._start + 1)
        return self._start < len(self._record.messages)

    def _refuse(self, *_: Any) -> Any:
        raise _UntraceableError

    __contains__ = __eq__ = __ne__ = __hash__ = __repr__ = __getattr__ = _refuse
