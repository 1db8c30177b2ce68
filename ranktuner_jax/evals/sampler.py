"""Sampling with a key-value cache, in which a row that is done is replaced by the next prompt."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from ranktuner_jax.errors import UserError
from ranktuner_jax.evals import decoding
from ranktuner_jax.evals.choosing import Rule
from ranktuner_jax.models import Decoder, partition

__all__ = ["Completion", "Progress", "divisible", "generate"]

# The most steps between two looks at the tokens written.
_SEGMENT_STEPS = 32
# With less room than this for steps in the cache, tokens are moved to its front.
_LEAST_ROOM = 8
# A share of the rows, which is replaced at once: fewer prompts a pass waste more time between
# passes, and more of them leave more rows idle.
_REFILL_SHARE = 1 / 8
# How many widths of prompts, and lengths of the cache, programs are compiled for, and what divides
# them. A program that writes takes longer to compile than one that reads.
_WIDTHS, _LENGTHS, _MULTIPLE = 8, 4, 32


class Completion(NamedTuple):
    """The tokens that a model wrote before the stop token, and whether it reached one."""

    tokens: list[int]
    finished: bool


class Progress(NamedTuple):
    """How far a call of `generate` is.

    Attributes:
      done: Prompts whose completions are done.
      total: All prompts.
      tokens: Tokens written so far, stop tokens included.
      seconds: Time since the call.
    """

    done: int
    total: int
    tokens: int
    seconds: float

    @property
    def share(self) -> float:
        """The share of the prompts that is done."""
        return self.done / self.total

    @property
    def tokens_per_second(self) -> float:
        """The mean speed so far."""
        return self.tokens / self.seconds


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    stop_ids: Sequence[int],
    keys: Sequence[tuple[int, int]] | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    cache_gb: float = 1.0,
    batch_size: int | None = None,
    done: Callable[[int, Completion], None] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> list[Completion]:
    """Continues each prompt until a stop token or `max_new_tokens`.

    As many prompts are continued together as the memory for the cache holds, the longest first;
    as completions are done, the next prompts take their place. A completion does not depend on the
    prompts beside it: positions start at its own first token, other rows are never attended to,
    and random numbers are drawn by `seed`, the prompt's key and the number of tokens written. Only
    roundings differ between batches, which matters where two tokens are all but equally likely.

    Prompts are padded to one of eight widths and the cache has one of four lengths, so that a call
    compiles at most eight programs that read prompts and four that write, and a few that copy.
    Later calls with the same sizes use them again.

    Over a mesh (`model.mesh`) the cache is divided over its batch axes, and heads over `tensor` if
    that divides them. With several processes all must call, with the same prompts, and all get
    every completion.

    Args:
      model: The decoder.
      prompts: Token ids, at least one each.
      max_new_tokens: The most tokens to write, stop token included: one number, or one for each
        prompt.
      stop_ids: Tokens that end a completion.
      keys: Of each prompt the numbers of its question and of the sample, by which random numbers
        are drawn; by default its index, and 0. A call with some of the prompts and their keys
        draws what a call with all of them does.
      temperature: 0 takes the likeliest token (the lowest id in a tie); otherwise tokens are
        drawn from `softmax(logits / temperature)`.
      top_p: Only the likeliest tokens are drawn, as many as have this probability together.
      top_k: Only this many of the likeliest tokens are drawn; 0 for all.
      seed: Of the random numbers, with `keys`.
      cache_gb: Memory for the cache on each device, in GB (1e9 bytes).
      batch_size: The most prompts to continue together, if not as many as fit.
      done: Called with the index of a prompt and its completion as soon as it is done.
      progress: Called each time that the host looks at what was written.

    Returns:
      One completion per prompt, in the order of `prompts`.

    Raises:
      UserError: If `cache_gb` is too little for one prompt, or a setting is out of its range.
      ValueError: If a prompt is empty, a size is below one, or `keys` are not as many as prompts.

    Example:
      >>> from ranktuner_jax.models import Decoder, DecoderConfig
      >>> config = DecoderConfig(vocab_size=11, hidden_size=8, num_layers=1, num_heads=2,
      ...                        num_kv_heads=1, head_dim=4, intermediate_size=16)
      >>> model = Decoder(config, rngs=nnx.Rngs(0))
      >>> [c] = generate(model, [[1, 2, 3]], max_new_tokens=4, stop_ids=[0])
      >>> len(c.tokens) <= 4
      True
    """
    count = len(prompts)
    limits = [max_new_tokens] * count if isinstance(max_new_tokens, int) else list(max_new_tokens)
    names = [(index, 0) for index in range(count)] if keys is None else list(keys)
    if (len(limits), len(names)) != (count, count):
        raise ValueError(
            f"max_new_tokens and keys must be as many as prompts, which are {count}: "
            f"got {len(limits)} and {len(names)}"
        )
    if min([*limits, 1 if batch_size is None else batch_size]) < 1:
        raise ValueError(
            "batch_size and max_new_tokens must be at least 1: "
            f"got {batch_size} and {max_new_tokens}"
        )
    lengths = [len(prompt) for prompt in prompts]
    if not all(lengths):
        raise ValueError(f"every prompt needs a token: prompt {lengths.index(0)} is empty")
    rule = Rule.of(temperature, top_k, top_p)
    if not prompts:
        return []

    start = time.monotonic()
    sizes = _Sizes.of(model, lengths, max(limits), batch_size, cache_gb)
    writer = _Writer(model, sizes, np.asarray(stop_ids, np.int32), rule, np.uint32(seed))
    # The longest first: those admitted together are of one width, and none starts late.
    order = sorted(range(count), key=lambda index: -lengths[index])
    queue = collections.deque(_Request(i, list(prompts[i]), limits[i], *names[i]) for i in order)
    completions: dict[int, Completion] = {}
    while len(completions) < count:
        writer.admit(queue)
        for request in writer.write(waiting=bool(queue)):
            finished = request.written[-1] in stop_ids
            completion = Completion(request.written[: -1 if finished else None], finished)
            completions[request.index] = completion
            if done is not None:
                done(request.index, completion)
        if progress is not None:
            seconds = time.monotonic() - start
            progress(Progress(len(completions), count, writer.tokens, seconds))
    return [completions[i] for i in range(count)]


def divisible(batch_size: int, mesh: Mesh | None) -> int:
    """The smallest size, `batch_size` or more, that divides over the mesh's batch axes.

    Example:
      >>> divisible(3, None)
      3
    """
    if mesh is None:
        return batch_size
    axes = [axis for axis in partition.RULES["batch"] if axis in mesh.shape]
    return _round_up(batch_size, math.prod(mesh.shape[axis] for axis in axes))


def _round_up(length: float, multiple: int) -> int:
    return math.ceil(length / multiple) * multiple


@dataclasses.dataclass
class _Request:
    """A prompt, what is asked of it, and the tokens written after it so far."""

    index: int
    prompt: list[int]
    limit: int
    question: int
    sample: int
    written: list[int] = dataclasses.field(default_factory=list)

    @property
    def cached(self) -> int:
        """Its tokens in the cache: all but the last."""
        return len(self.prompt) + max(len(self.written) - 1, 0)


class _Sizes(NamedTuple):
    """The shapes of the programs: rows of the batch and of a prefill, and what these may hold."""

    rows: int
    new_rows: int
    widths: tuple[int, ...]
    lengths: tuple[int, ...]

    @classmethod
    def of(
        cls,
        model: Decoder,
        prompt_lengths: Sequence[int],
        max_new_tokens: int,
        batch_size: int | None,
        cache_gb: float,
    ) -> _Sizes:
        longest = max(prompt_lengths)
        widths = cls._steps(longest, _WIDTHS)
        lengths = cls._steps(widths[-1] + max_new_tokens, _LENGTHS)
        # Of one row on each of the devices that the batch is divided over.
        together = divisible(1, model.mesh)
        c = model.config
        shape: tuple[int, ...] = (together, c.num_kv_heads, lengths[-1], c.head_dim)
        if model.mesh is not None:
            spec = partition.spec(model.mesh, ("batch", "kv_heads"), shape)
            shape = NamedSharding(model.mesh, spec).shard_shape(shape)
        size = 2 * c.num_layers * math.prod(shape) * model.cache_dtype.itemsize
        fitting = int(cache_gb * 1e9 / size) * together
        if not fitting:
            raise UserError(
                f"cache_gb: expected at least {math.ceil(size / 1e6) / 1e3} for a prompt of "
                f"{longest} tokens and {max_new_tokens} new ones, got {cache_gb}"
            )
        wanted = min(batch_size or len(prompt_lengths), len(prompt_lengths))
        rows = min(fitting, divisible(wanted, model.mesh))
        return cls(rows, divisible(math.ceil(rows * _REFILL_SHARE), model.mesh), widths, lengths)

    @staticmethod
    def _steps(largest: int, count: int) -> tuple[int, ...]:
        sizes = {_round_up(largest * (step + 1) / count, _MULTIPLE) for step in range(count)}
        return tuple(sorted(sizes))


class _Writer:
    """The rows on the devices, and the requests that they answer."""

    def __init__(
        self, model: Decoder, sizes: _Sizes, stop_ids: np.ndarray, rule: Rule, seed: np.generic
    ) -> None:
        self._graph, params = nnx.split(model)
        self._weights = decoding.split(self._graph, params)
        self._mesh, self._sizes = model.mesh, sizes
        self._stop_ids, self._rule, self._seed = stop_ids, rule, seed
        self._requests: dict[int, _Request] = {}
        self._firsts: list[tuple[list[_Request], jax.Array]] = []
        self._rows: decoding.Rows | None = None
        self._index = self._length = self._done_tokens = 0

    def admit(self, queue: collections.deque[_Request]) -> None:
        """Moves requests from the queue to the rows that are free."""
        free = [row for row in range(self._sizes.rows) if row not in self._requests]
        new = [queue.popleft() for _ in range(min(len(free), len(queue)))]
        groups = [list(group) for group in _batched(new, self._sizes.new_rows)]
        widths = [self._width(group) for group in groups]
        cached = [request.cached for request in self._requests.values()]
        self._make_room(max(*cached, *widths, 0, 0))
        for group, width in zip(groups, widths, strict=True):
            rows = [free.pop() for _ in group]
            self._requests.update(zip(rows, group, strict=True))
            self._prefill(group, rows, width)

    def _width(self, group: Sequence[_Request]) -> int:
        longest = max(len(request.prompt) for request in group)
        return next(width for width in self._sizes.widths if width >= longest)

    def _make_room(self, held: int) -> None:
        """Makes the next slot of the cache one before which `held` tokens fit, with room after."""
        lengths = self._sizes.lengths
        wanted = min(held + _SEGMENT_STEPS, lengths[-1])
        length = next(length for length in lengths if length >= wanted)
        room = min(_LEAST_ROOM, length - held)
        if self._rows is None:
            options = {"batch_size": self._sizes.rows, "length": length}
            self._rows = decoding.empty(self._graph, self._weights.params, **options)
        elif length == self._length and held <= self._index <= length - room:
            return
        by = held - self._index
        self._rows = decoding.move(self._rows, by, length=length, mesh=self._mesh)
        self._index, self._length = held, length

    def _prefill(self, group: list[_Request], rows: list[int], width: int) -> None:
        size = self._sizes.new_rows
        tokens = np.zeros((size, width), np.int32)
        lengths = np.zeros(size, np.int32)
        asked = decoding.Asked(*(np.zeros(size, np.int32) for _ in range(3)))
        source = np.full(self._sizes.rows, -1, np.int32)
        for i, (request, row) in enumerate(zip(group, rows, strict=True)):
            lengths[i], source[row] = len(request.prompt), i
            tokens[i, width - lengths[i] :] = request.prompt
            asked.limit[i], asked.question[i] = request.limit, request.question
            asked.sample[i] = request.sample
        new = decoding.prefill(
            self._graph, self._weights, tokens, lengths, asked, self._seed, self._rule
        )
        assert self._rows is not None
        self._rows, first = decoding.admit(self._rows, new, source, self._stop_ids, mesh=self._mesh)
        self._firsts.append((group, first))

    def write(self, *, waiting: bool) -> list[_Request]:
        """Writes tokens for a while, less long if requests are waiting for free rows.

        Returns:
          The requests that are done, whose rows are free again.
        """
        idle = self._sizes.rows - len(self._requests)
        enough = max(1, int(self._sizes.rows * _REFILL_SHARE))
        assert self._rows is not None
        self._rows, out, written, steps = decoding.decode(
            self._graph,
            self._weights,
            self._rows,
            self._stop_ids,
            self._seed,
            self._rule,
            np.int32(min(_SEGMENT_STEPS, self._length - self._index)),
            np.int32(idle + enough if waiting else self._sizes.rows),
            buffer=_SEGMENT_STEPS,
        )
        out, written, steps = jax.device_get((out, written, steps))
        self._index += int(steps)
        for group, first in self._firsts:
            for request, token in zip(group, jax.device_get(first), strict=False):
                request.written.append(int(token))
        self._firsts.clear()
        ended = []
        for row, request in list(self._requests.items()):
            request.written += out[row, : written[row] - len(request.written)].tolist()
            if self._ended(request):
                ended.append(self._requests.pop(row))
                self._done_tokens += len(request.written)
        return ended

    @property
    def tokens(self) -> int:
        """All tokens written so far."""
        return self._done_tokens + sum(len(r.written) for r in self._requests.values())

    def _ended(self, request: _Request) -> bool:
        full = len(request.written) == request.limit
        return full or request.written[-1] in self._stop_ids


def _batched(items: list[_Request], size: int) -> Iterator[list[_Request]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk
