"""How noise is put into sequences of tokens, and which of their tokens it is."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ranktuner_jax.data import BadRowError, TokenizedChat
from ranktuner_jax.diagnostics.noise.sequences import Sequences, Source
from ranktuner_jax.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Bool

__all__ = ["AFTER", "KINDS", "Kind", "Polluted", "pollute"]

# How many tokens after a span are reported apart: their context is wrong, they are not.
AFTER = 8


@dataclass(frozen=True)
class Kind:
    """A kind of noise.

    Attributes:
      draw: Puts one span into a sequence: all of its tokens and where the noise is, or None if no
        span fits.
      meaning: What it is, as text in which `{length}` is the length of a span.
    """

    draw: Callable[
        [Sequences, Source, np.random.Generator, int], tuple[TokenizedChat, slice] | None
    ]
    meaning: str

    @property
    def has_length(self) -> bool:
        """Whether the length of a span can be chosen."""
        return "{length}" in self.meaning


@dataclass(frozen=True, slots=True)
class Polluted:
    """A sequence with one span of noise.

    Attributes:
      index: Its number among the sequences.
      chat: Its tokens, cut to the length of a row.
      noise: True for the supervised tokens that differ from the original, [length].
      after: True for the supervised ones among the `AFTER` tokens that follow, [length].
      rate: The share of noise that this sequence and those drawn before it give.
    """

    index: int
    chat: TokenizedChat
    noise: Bool[np.ndarray, " length"]
    after: Bool[np.ndarray, " length"]
    rate: float = 0.0


def pollute(sequences: Sequences, kind: str, length: int, rate: float, seed: int) -> list[Polluted]:
    """Draws spans, one a sequence, in sequences in a random order, until `rate` is reached.

    A higher rate has the spans of a lower one and more, so that one draw serves all rates.

    Args:
      sequences: The sequences; they stay as they are.
      kind: One of `KINDS`.
      length: The length of a span, in tokens or words; without meaning for a number or a sentence.
      rate: The share of noise among the supervised tokens of all sequences, above 0.
      seed: Determines the order of the sequences, and the noise.

    Returns:
      The polluted sequences in the order of their draws, to the one with which `rate` is reached.

    Raises:
      UserError: If one span in every sequence is too few.
    """
    rng = np.random.default_rng(seed)
    tokens = sum(int(chat.mask[1:].sum()) for chat in sequences.clean)
    noise = 0
    drawn: list[Polluted] = []
    for index in rng.permutation(len(sequences.sources)).tolist():
        # Of its own, so that one sequence's draws do not depend on those of the others.
        source, own = sequences.sources[index], np.random.default_rng((seed, index))
        polluted = _polluted(sequences, index, KINDS[kind].draw(sequences, source, own, length))
        if polluted is None:
            continue
        noise += int(polluted.noise.sum())
        before = int(sequences.cut(source.chat).mask[1:].sum())
        tokens += int(polluted.chat.mask[1:].sum()) - before
        drawn.append(replace(polluted, rate=noise / tokens))
        if noise / tokens >= rate:
            return drawn
    reached = drawn[-1].rate if drawn else 0.0
    raise UserError(
        f"--rates: expected at most {reached:.4f} for --kinds={kind}"
        + f" with --lengths={length}" * KINDS[kind].has_length
        + f", which is one span in each of the {len(drawn)} sequences with room for it, got "
        f"{rate:g}; lower the rate, or take longer spans"
    )


def _polluted(
    sequences: Sequences, index: int, drawn: tuple[TokenizedChat, slice] | None
) -> Polluted | None:
    """The sequence cut to the length of a row; None if no noise is left in it."""
    if drawn is None:
        return None
    whole, span = drawn
    chat = sequences.cut(whole)
    noise, after = np.zeros((2, len(chat.tokens)), bool)
    noise[span] = True
    after[span.stop : span.stop + AFTER] = True
    noise &= chat.mask
    return Polluted(index, chat, noise, after & chat.mask) if noise.any() else None


# --- noise of tokens ---


def _replaced(
    sequences: Sequences, source: Source, rng: np.random.Generator, length: int
) -> tuple[TokenizedChat, slice] | None:
    """A span replaced by tokens drawn uniformly, each another one than was there."""
    chat, vocabulary = sequences.cut(source.chat), sequences.vocabulary
    start = _start(_ordinary(sequences, chat), length, rng)
    if start is None:
        return None
    span = slice(start, start + length)
    tokens = chat.tokens.copy()
    # Steps around the vocabulary that never end where they began.
    steps = rng.integers(1, len(vocabulary), length)
    places = np.searchsorted(vocabulary, tokens[span]) + steps
    tokens[span] = vocabulary[places % len(vocabulary)]
    return TokenizedChat(tokens, chat.weights), span


def _inserted(
    sequences: Sequences, source: Source, rng: np.random.Generator, length: int
) -> tuple[TokenizedChat, slice] | None:
    """A span of tokens drawn uniformly, put before a token of the response."""
    chat = sequences.cut(source.chat)
    ordinary = _ordinary(sequences, chat)
    # The whole span is to lie in the row.
    start = _start(ordinary[: sequences.row_length + 2 - length], 1, rng)
    if start is None:
        return None
    drawn = rng.choice(sequences.vocabulary, length)
    # What a row has no room for any more is the end of the original.
    tokens = np.insert(source.chat.tokens, start, drawn)
    weights = np.insert(source.chat.weights, start, [source.chat.weights[start]] * length)
    return TokenizedChat(tokens, weights), slice(start, start + length)


def _ordinary(sequences: Sequences, chat: TokenizedChat) -> Bool[np.ndarray, " length"]:
    """True for supervised tokens of the vocabulary: not for the special one that ends a turn."""
    ordinary = chat.mask & np.isin(chat.tokens, sequences.vocabulary)
    ordinary[:1] = False  # Nothing predicts the first token.
    return ordinary


def _start(allowed: np.ndarray, length: int, rng: np.random.Generator) -> int | None:
    """One of the places where `length` allowed tokens follow each other; None if there is none."""
    if len(allowed) < length:
        return None
    places = np.flatnonzero(np.lib.stride_tricks.sliding_window_view(allowed, length).all(axis=1))
    return int(rng.choice(places)) if len(places) else None


# --- noise of words, which is encoded again ---

_WORD = re.compile(r"\S+")
_NUMBER = re.compile(r"\d+")
_SENTENCE = re.compile(r"[^\s.!?][^.!?\n]*[.!?](?=\s|$)")


def _words(
    sequences: Sequences, source: Source, rng: np.random.Generator, length: int
) -> tuple[TokenizedChat, slice] | None:
    """`length` words in a row, in another order."""

    def change(text: str) -> str | None:
        words = list(_WORD.finditer(text))
        if len(words) < length:
            return None
        first = int(rng.integers(len(words) - length + 1))
        chosen = words[first : first + length]
        order = iter(rng.permutation(length).tolist())
        # White space stays where it was.
        start, stop = chosen[0].start(), chosen[-1].end()
        shuffled = _WORD.sub(lambda _: chosen[next(order)].group(), text[start:stop])
        return text[:start] + shuffled + text[stop:]

    return _rewritten(sequences, source, rng, change)


def _number(
    sequences: Sequences, source: Source, rng: np.random.Generator, length: int
) -> tuple[TokenizedChat, slice] | None:
    """A number replaced by another of as many digits."""

    def change(text: str) -> str | None:
        numbers = list(_NUMBER.finditer(text))
        if not numbers:
            return None
        chosen = numbers[rng.integers(len(numbers))]
        digits = [int(digit) for digit in chosen.group()]
        first = 1 if len(digits) > 1 and digits[0] else 0  # No zero is put in front.
        while (other := [int(rng.integers(first, 10)), *rng.integers(0, 10, len(digits) - 1)]) == (
            digits
        ):
            pass
        return text[: chosen.start()] + "".join(map(str, other)) + text[chosen.end() :]

    return _rewritten(sequences, source, rng, change)


def _sentence(
    sequences: Sequences, source: Source, rng: np.random.Generator, length: int
) -> tuple[TokenizedChat, slice] | None:
    """A sentence replaced by one from another conversation."""
    others = [s for s in sequences.sources if s.conversation is not source.conversation]
    if not others:
        return None

    def change(text: str) -> str | None:
        other = others[rng.integers(len(others))].conversation
        answers = [m["content"] for m in other.messages if m["role"] == "assistant"]
        offered = [found.group() for answer in answers for found in _SENTENCE.finditer(answer)]
        sentences = list(_SENTENCE.finditer(text))
        if not offered or not sentences:
            return None
        chosen = sentences[rng.integers(len(sentences))]
        new = offered[rng.integers(len(offered))]
        return text[: chosen.start()] + new + text[chosen.end() :]

    return _rewritten(sequences, source, rng, change)


def _rewritten(
    sequences: Sequences,
    source: Source,
    rng: np.random.Generator,
    change: Callable[[str], str | None],
) -> tuple[TokenizedChat, slice] | None:
    """One supervised turn changed and encoded again.

    Noise is what lies between the longest common beginning of the old and the new tokens and the
    longest common end of what is left.
    """
    conversation = source.conversation
    turns = [i for i, weight in enumerate(conversation.weights) if weight]
    turn = turns[rng.integers(len(turns))]
    text = change(conversation.messages[turn]["content"])
    if text is None:
        return None
    messages = list(conversation.messages)
    messages[turn] = {**messages[turn], "content": text}
    [samples] = sequences.encoder.encode([replace(conversation, messages=tuple(messages))])
    if isinstance(samples, BadRowError) or len(samples) <= source.part:
        return None
    chat = samples[source.part]
    return chat, _difference(source.chat.tokens, chat.tokens)


def _difference(old: np.ndarray, new: np.ndarray) -> slice:
    """The part of `new` without the longest common beginning, and then end, of both.

    Example:
      >>> _difference(np.array([1, 2, 3, 4]), np.array([1, 5, 6, 3, 4]))
      slice(1, 3, None)
    """
    size = min(len(old), len(new))
    start = _common(old[:size], new[:size])
    size -= start
    return slice(start, len(new) - _common(old[::-1][:size], new[::-1][:size]))


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many elements at the beginning of two arrays of one length are equal."""
    return int(np.argmin(np.append(a == b, False)))


KINDS = {
    "replaced": Kind(_replaced, "{length} tokens replaced by others drawn uniformly"),
    "inserted": Kind(_inserted, "{length} tokens drawn uniformly and inserted"),
    "words": Kind(_words, "{length} words in a row in another order"),
    "number": Kind(_number, "a number replaced by another of as many digits"),
    "sentence": Kind(_sentence, "a sentence replaced by one of another conversation"),
}
