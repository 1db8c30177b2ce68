"""Answers of a server that speaks the OpenAI API, such as vLLM."""

from __future__ import annotations

import asyncio
import os
import queue
import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from ranktuner_jax.errors import RunError, UserError
from ranktuner_jax.evals.benchmarks import Question
from ranktuner_jax.evals.engines.engine import Answer, Choice, Request, Sampling

if TYPE_CHECKING:
    import openai

__all__ = ["OpenAIEngine"]


class OpenAIEngine:
    """Asks a server for chat completions, several at a time.

    The server applies the model's chat template. A request that gets no answer, 429 or an error
    of the server (5xx) is sent again, after half a second and then twice as long each time up to
    8 seconds, or after as long as the server says. Each sample has a seed of its own, computed
    from the seed, the question and the number of the sample; whether the same seed gives the same
    answer is up to the server.

    Args:
      base_url: Its address, which usually ends in `/v1`.
      model: What the server calls the model.
      api_key: The key; that in the environment variable OPENAI_API_KEY if empty. Servers of one's
        own usually need none.
      concurrency: Requests under way at the same time.
      retries: How often a request is sent again.
      timeout: Seconds to wait for one answer.
      extra_body: Further fields of each request, such as
        `{"chat_template_kwargs": {"enable_thinking": False}}` for vLLM.

    Attributes:
      description: The model and the further fields; the server may move.

    Raises:
      UserError: If the package `openai` is not installed, an argument is out of its range, or
        there are several processes, each of which would ask the server everything.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str = "",
        concurrency: int = 16,
        retries: int = 6,
        timeout: float = 600.0,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            import anyio  # noqa: F401 (found missing here, not after the questions are read)
            import openai  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"--engine=openai needs the package {error.name}; "
                "pip install 'ranktuner-jax[openai]'"
            ) from error
        if jax.process_count() > 1:
            raise UserError(
                "--engine=openai: expected one process, which asks the server, got "
                f"{jax.process_count()}; run the command on one machine, without --distributed"
            )
        if not base_url.startswith(("http://", "https://")):
            raise UserError(
                f"--base_url: expected an address such as http://localhost:8000/v1, got {base_url}"
            )
        for name, value, least in (("concurrency", concurrency, 1), ("retries", retries, 0)):
            if value < least:
                raise UserError(f"{name}: expected at least {least}, got {value}")
        self._base_url, self._model = base_url, model
        self._api_key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
        self._concurrency, self._retries, self._timeout = concurrency, retries, timeout
        self._extra_body = dict(extra_body or {})
        self.description: Mapping[str, Any] = {
            "engine": "openai",
            "model": model,
            "extra_body": self._extra_body,
        }

    def answer(
        self, requests: Sequence[Request], sampling: Sampling, done: Callable[[int, Answer], None]
    ) -> None:
        """Gets an answer to each request; see `Engine.answer`.

        `done` is called in the thread of the caller, in the order in which answers arrive. Their
        length is what the server counts: most count the token that ends an answer as well.

        Raises:
          UserError: If the server refuses a request: the key, the model, or its length.
          RunError: If it still gives no answer after all retries.
        """
        import anyio.from_thread
        import openai

        client = openai.AsyncOpenAI(
            base_url=self._base_url,
            api_key=self._api_key,
            max_retries=self._retries,
            timeout=openai.Timeout(self._timeout, connect=min(self._timeout, 10.0)),
        )
        answers: queue.SimpleQueue[tuple[int, Answer | Exception]] = queue.SimpleQueue()
        free = asyncio.Semaphore(self._concurrency)

        async def ask(index: int) -> None:
            try:
                async with free:
                    answer = await self._ask(client, requests[index], sampling)
                answers.put((index, answer))
            except Exception as error:
                answers.put((index, error))

        async def ask_all() -> None:
            async with client:
                await asyncio.gather(*map(ask, range(len(requests))))

        # In a thread, since a notebook's own event loop may run in this one. An exception here,
        # Ctrl-C included, cancels what is under way.
        with anyio.from_thread.start_blocking_portal() as portal:
            portal.start_task_soon(ask_all)
            for _ in requests:
                index, answer = answers.get()
                if isinstance(answer, Exception):
                    raise self._explain(answer) from answer
                done(index, answer)

    def choose(self, questions: Sequence[Question], done: Callable[[int, Choice], None]) -> None:
        """Refuses: chat completions do not tell how likely a given text is.

        Raises:
          UserError: Always.
        """
        raise UserError(
            "--engine=openai: expected tasks with written answers, got one that compares the "
            "likelihoods of choices, which a server does not tell; use --engine=local for it"
        )

    async def _ask(
        self, client: openai.AsyncOpenAI, request: Request, sampling: Sampling
    ) -> Answer:
        # Seeding with text goes through SHA-512: the same on every machine and version.
        seed = random.Random(f"{sampling.seed} {request.question.index} {request.sample}")
        top_k = {"top_k": sampling.top_k} if sampling.top_k else {}
        completion = await client.chat.completions.create(
            model=self._model,
            messages=list(request.question.messages),  # type: ignore[arg-type]
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_new_tokens,
            seed=seed.getrandbits(31),
            extra_body=top_k | self._extra_body,
        )
        choice, usage = completion.choices[0], completion.usage
        if usage is None:
            raise ValueError("the answer has no usage")
        # No text where all of it is reasoning, which servers may return apart.
        text = choice.message.content or ""
        return Answer(text, usage.completion_tokens, choice.finish_reason == "stop")

    def _explain(self, error: Exception) -> Exception:
        """What the user is told of an error."""
        import openai

        status, reason = 0, str(error.__cause__ or error)
        if isinstance(error, openai.APIStatusError):
            status, reason = error.status_code, f"{error.status_code}: {error.response.text}"
        reason = " ".join(reason.split())[:300]
        if status in (401, 403):
            return UserError(
                f"--base_url: {self._base_url} refused the key ({reason}); "
                "set the environment variable OPENAI_API_KEY"
            )
        if isinstance(error, openai.APIConnectionError) or status == 429 or status >= 500:
            return RunError(
                f"--base_url: {self._base_url} gave no answer in {self._retries + 1} tries "
                f"({reason}); check the address and that the server is up, then run the same "
                "command again: answers so far are kept"
            )
        if status:
            return UserError(
                f"--base_url: {self._base_url} refused a request ({reason}); check "
                f"--model={self._model}, that the address ends in /v1 if the server's does, and "
                "that the question and --max_new_tokens fit the model"
            )
        return UserError(
            f"--base_url: expected chat completions from {self._base_url}, got something else "
            f"({type(error).__name__}: {reason}); check the address, which usually ends in /v1"
        )
