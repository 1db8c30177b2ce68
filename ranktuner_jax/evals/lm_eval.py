"""The decoder as a model of lm-eval, EleutherAI's harness, for the tasks that it has.

python -m ranktuner_jax.evals.lm_eval run --model ranktuner \
  --model_args pretrained=runs/first/model --tasks arc_challenge
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from ranktuner_jax.data import load_tokenizer
from ranktuner_jax.errors import UserError
from ranktuner_jax.evals.likelihood import log_likelihoods
from ranktuner_jax.evals.sampler import Completion, generate
from ranktuner_jax.evals.stopping import stop_ids
from ranktuner_jax.models import Decoder, load_pretrained, resolve

try:
    import lm_eval.utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models import utils
except ImportError as error:
    raise UserError(
        "this needs the package lm-eval; pip install 'ranktuner-jax[lm-eval]'"
    ) from error

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerBase

__all__ = ["RankTunerLM", "main"]

# Fields of a task's generation_kwargs, as `normalize_gen_kwargs` names them.
_KNOWN = {"until", "do_sample", "temperature", "top_p", "top_k", "max_gen_toks"}


@register_model("ranktuner")
class RankTunerLM(TemplateLM):
    """Answers lm-eval's requests, on the decoder's mesh; for `lm_eval.simple_evaluate`.

    Contexts and continuations are split into tokens by lm-eval itself. Texts longer than the
    model's context are refused, or read in windows where a task asks for that. Importing this
    module gives lm-eval the model `ranktuner`, whose arguments are those of `load`.

    Args:
      model: The decoder.
      tokenizer: Its tokenizer.
      batch_size: Texts scored together.
      seed: Of answers that a task wants drawn; another one draws others.
      enable_thinking: Passed to the chat template; Qwen3's uses it.
      options: Of `generate`, such as its memory for the cache.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int | str = 16,
        seed: int = 0,
        enable_thinking: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit():
            raise UserError(f"batch_size: expected a number, got {batch_size}; try 16")
        self.model, self.tokenizer = model, tokenizer
        self.max_length = model.config.max_positions
        self._batch_size, self._seed = int(batch_size), seed
        self._enable_thinking, self._options = enable_thinking, options

    @classmethod
    def load(cls, pretrained: str, dtype: str = "float32", **options: Any) -> RankTunerLM:
        """The model in a folder or with a name, over all devices.

        Args:
          pretrained: See `models.resolve`.
          dtype: Of the arithmetic.
          options: Further arguments of this class.
        """
        folder = resolve(pretrained)
        mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), (jax.sharding.AxisType.Auto,))
        return cls(load_pretrained(folder, mesh, dtype), load_tokenizer(folder), **options)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> RankTunerLM:
        """Called by lm-eval with the `--model_args` and with flags of its own."""
        batch_size = (additional_config or {}).get("batch_size")
        return cls.load(**({"batch_size": batch_size} if batch_size else {}) | dict(arg_dict))

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> RankTunerLM:
        """The same, with the arguments in one text."""
        arguments = lm_eval.utils.simple_parse_args_string(arg_string)
        return cls.create_from_arg_obj(arguments, additional_config)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval calls its cache of requests by."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **unused: Any
    ) -> list[int]:
        """The tokens of a text, which gets the tokenizer's first token unless it has it already."""
        if add_special_tokens is None:
            first = self.tokenizer.bos_token
            add_special_tokens = not (first and string.startswith(first))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation, up to where the assistant goes on."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                enable_thinking=self._enable_thinking,
            )
        )

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        **unused: Any,
    ) -> list[tuple[float, bool]]:
        for texts, context, continuation in requests:
            # The last token is only predicted.
            self._check_length(len(context) + len(continuation) - 1, texts and texts[0])
        found = log_likelihoods(
            self.model,
            [(context, continuation) for _, context, continuation in requests],
            batch_size=self._batch_size,
        )
        results = [(value.total, value.greedy) for value in found]
        for (texts, _, _), result in zip(requests, results, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-probability of whole texts, read in windows of the model's context."""
        owners: list[int] = []
        windows: list[tuple[None, list[int], list[int]]] = []
        for number, request in enumerate(requests):
            for window in lm_eval.utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                owners.append(number)
                windows.append((None, *lm_eval.utils.make_disjoint_window(window)))
        found = self._loglikelihood_tokens(windows)
        totals = [0.0] * len(requests)
        for number, (total, _) in zip(owners, found, strict=True):
            totals[number] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """An answer to each request, cut before the first of its stop texts.

        Raises:
          UserError: If a request is to be answered several times, or wants an option that the
            sampler does not have.
        """
        groups: dict[str, list[int]] = collections.defaultdict(list)
        options = [_read_options(request) for request in requests]
        _refuse_repeats(requests, options)
        for index, of_request in enumerate(options):
            groups[repr(sorted(of_request.items()))].append(index)
        answers: dict[int, str] = {}
        for group in groups.values():
            self._generate([requests[i] for i in group], options[group[0]], group, answers)
        return [answers[index] for index in range(len(requests))]

    def _generate(
        self,
        requests: Sequence[Instance],
        options: Mapping[str, Any],
        indices: Sequence[int],
        answers: dict[int, str],
    ) -> None:
        """Answers the requests that share options, into `answers`."""
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        for request, prompt in zip(requests, prompts, strict=True):
            self._check_length(len(prompt) + options["max_gen_toks"] - 1, request.args[0])

        def done(number: int, completion: Completion) -> None:
            text = self.tokenizer.decode(completion.tokens, skip_special_tokens=True)
            text = utils.postprocess_generated_text(text, options["until"], None)
            answers[indices[number]] = text
            self.cache_hook.add_partial("generate_until", requests[number].args, text)

        generate(
            self.model,
            prompts,
            keys=[(request.doc_id, request.idx) for request in requests],
            max_new_tokens=options["max_gen_toks"],
            stop_ids=stop_ids(self.tokenizer),
            temperature=options["temperature"],
            top_p=options["top_p"],
            top_k=options["top_k"],
            seed=self._seed,
            done=done,
            **self._options,
        )

    def _check_length(self, length: int, text: str | None) -> None:
        if length > self.max_length:
            raise UserError(
                f"expected at most {self.max_length} tokens, the model's context, got {length} in "
                f"the request that begins {(text or '')[:40]!r}; ask for fewer examples "
                "(num_fewshot) or shorter answers (max_gen_toks)"
            )


def _read_options(request: Instance) -> dict[str, Any]:
    """How a request is to be answered, with lm-eval's defaults."""
    options: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "top_k": 0}
    options |= utils.normalize_gen_kwargs(request.args[1])
    if unknown := sorted(options.keys() - _KNOWN):
        raise UserError(
            f"{request.task_name}: expected generation_kwargs among {', '.join(sorted(_KNOWN))}, "
            f"got {unknown[0]}, which this model does not have"
        )
    return options


def _refuse_repeats(requests: Sequence[Instance], options: Sequence[Mapping[str, Any]]) -> None:
    """Refuses what lm-eval's cache would answer once: several draws of one answer."""
    seen = set()
    for request, of_request in zip(requests, options, strict=True):
        again = of_request["temperature"] > 0 and repr(request.args) in seen
        if again or (request.repeats or 1) > 1:
            raise UserError(
                f"{request.task_name}: expected one answer to each question, got repeats, whose "
                "answers lm-eval's cache makes the same; set repeats: 1, or draw several with "
                "ranktuner eval --samples"
            )
        seen.add(repr(request.args))


def main() -> int:
    """The command line of lm-eval, with the model `ranktuner`; 2 after a user's mistake, else 0."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as error:
        print(f"ranktuner: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
