"""The completion mask covers the assistant's turns, each in its context at inference."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from ranktuner_jax.data import BadRowError, ChatEncoder, TokenizedChat
from ranktuner_jax.data.chat import turn_end_id
from ranktuner_jax.data.records import to_conversation
from ranktuner_jax.errors import UserError

MakeTokenizer = Callable[..., Any]

ONE_TURN = [("user", "What is 12 + 30?"), ("assistant", "It is 42.")]
TWO_TURNS = [*ONE_TURN, ("user", "Half of 48?"), ("assistant", "24, so it is.")]
WITH_SYSTEM = [("system", "Add the numbers."), *TWO_TURNS]


def conversation(turns: list[tuple[str, str]], weights: dict[int, float] | None = None) -> Any:
    messages: list[dict[str, Any]] = [{"role": role, "content": content} for role, content in turns]
    for index, weight in (weights or {}).items():
        messages[index]["weight"] = weight
    return to_conversation({"messages": messages})


def encode(
    tokenizer: Any,
    turns: list[tuple[str, str]],
    weights: dict[int, float] | None = None,
    **options: Any,
) -> Any:
    [samples] = ChatEncoder(tokenizer, **options).encode([conversation(turns, weights)])
    if isinstance(samples, BadRowError):
        raise samples
    return samples


def supervised_texts(tokenizer: Any, sample: TokenizedChat) -> list[str]:
    """Each run of supervised tokens, as text."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], sample.mask, [False]]).astype(int)))
    return [
        tokenizer.backend_tokenizer.decode(
            sample.tokens[start:stop].tolist(), skip_special_tokens=False
        )
        for start, stop in edges.reshape(-1, 2)
    ]


def contexts(sample: TokenizedChat) -> list[list[int]]:
    """The tokens before each run of supervised tokens."""
    starts = np.flatnonzero(np.diff(sample.mask.astype(int)) == 1) + 1
    return [sample.tokens[:start].tolist() for start in starts]


@pytest.mark.parametrize("turns", [ONE_TURN, TWO_TURNS, WITH_SYSTEM], ids=["one", "two", "system"])
def test_each_answer_is_supervised_once_with_its_end_in_the_context_of_inference(
    make_tokenizer: MakeTokenizer,
    family_and_template: tuple[str, str],
    turns: list[tuple[str, str]],
) -> None:
    tokenizer = make_tokenizer(*family_and_template)
    samples = encode(tokenizer, turns)

    said = [text for sample in samples for text in supervised_texts(tokenizer, sample)]
    end = tokenizer.eos_token
    answers = [content + end for role, content in turns if role == "assistant"]
    assert [text.split("</think>\n\n")[-1].strip() for text in said] == answers

    messages = [{"role": role, "content": content} for role, content in turns]
    prompts = [
        tokenizer.apply_chat_template(
            messages[:i], add_generation_prompt=True, date_string="26 Jul 2024"
        )["input_ids"]
        for i, (role, _) in enumerate(turns)
        if role == "assistant"
    ]
    assert [context for sample in samples for context in contexts(sample)] == prompts
    assert ChatEncoder(tokenizer).encode_prompt(messages[:-1]) == prompts[-1]


def test_a_conversation_that_the_template_never_rewrites_is_one_sample(
    make_tokenizer: MakeTokenizer, family_and_template: tuple[str, str]
) -> None:
    samples = encode(make_tokenizer(*family_and_template), TWO_TURNS)
    # Qwen3's earlier turn loses its (empty) thinking when another question follows.
    assert len(samples) == (2 if "last_query" in family_and_template[1] else 1)


def test_a_turn_whose_system_prompt_moves_later_is_a_separate_sample(
    make_tokenizer: MakeTokenizer, templates: dict[str, str]
) -> None:
    tokenizer = make_tokenizer("mistral", templates["mistral"])
    first, second = encode(tokenizer, WITH_SYSTEM)
    decode = tokenizer.backend_tokenizer.decode
    assert "Add the numbers.\n\nWhat is" in decode(first.tokens.tolist())
    assert "Half" not in decode(first.tokens.tolist())
    assert "Add the numbers.\n\nHalf of" in decode(second.tokens.tolist())
    assert supervised_texts(tokenizer, second) == [" 24, so it is.</s>"]


def test_thinking_is_kept_in_the_turn_in_which_it_happens(
    make_tokenizer: MakeTokenizer, templates: dict[str, str]
) -> None:
    tokenizer = make_tokenizer("qwen", templates["qwen3"])
    turns = [
        ("user", "What is 12 + 30?"),
        ("assistant", "<think>\nfirst this\n</think>\n\nIt is 42."),
        ("user", "Half of 48?"),
        ("assistant", "<think>\nthen that\n</think>\n\n24."),
    ]
    first, second = encode(tokenizer, turns)
    assert supervised_texts(tokenizer, first) == [turns[1][1] + "<|im_end|>"]
    assert supervised_texts(tokenizer, second) == [turns[3][1] + "<|im_end|>"]
    assert "first this" not in tokenizer.decode(second.tokens)


def test_with_thinking_removed_the_empty_thinking_belongs_to_the_prompt(
    make_tokenizer: MakeTokenizer, templates: dict[str, str]
) -> None:
    tokenizer = make_tokenizer("qwen", templates["qwen3"])
    [sample] = encode(tokenizer, ONE_TURN, enable_thinking=False)
    assert supervised_texts(tokenizer, sample) == ["It is 42.<|im_end|>"]
    prompt, _ = sample.split_last_turn()
    assert tokenizer.decode(prompt).endswith("assistant\n<think>\n\n</think>\n\n")


def test_the_date_of_llama_is_the_same_every_day(
    make_tokenizer: MakeTokenizer, templates: dict[str, str]
) -> None:
    tokenizer = make_tokenizer("llama", templates["llama3"])
    [sample] = encode(tokenizer, ONE_TURN)
    assert "Today Date: 26 Jul 2024" in tokenizer.decode(sample.tokens)


def test_trimmed_answers_are_supervised_as_they_are_shown(
    make_tokenizer: MakeTokenizer, templates: dict[str, str]
) -> None:
    tokenizer = make_tokenizer("llama", templates["llama3"])
    [sample] = encode(tokenizer, [("user", "So?"), ("assistant", "  It is 42.\n")])
    assert supervised_texts(tokenizer, sample) == ["It is 42.<|eot_id|>"]


def test_an_answer_that_begins_with_newlines_does_not_merge_with_the_prompt(
    make_tokenizer: MakeTokenizer, templates: dict[str, str]
) -> None:
    tokenizer = make_tokenizer("smollm2", templates["smollm2"])
    turns = [("user", "So?"), ("assistant", "\n\nThe answer is 42.")]
    merged = tokenizer.backend_tokenizer.encode("assistant\n\n\nThe").tokens
    assert "ĊĊ" in merged, "the tokenizer must have the token that spans the boundary"
    [sample] = encode(tokenizer, [*turns, *turns])
    assert supervised_texts(tokenizer, sample) == ["\n\nThe answer is 42.<|im_end|>"] * 2
    for context in contexts(sample):
        assert tokenizer.decode(context).endswith("<|im_start|>assistant\n")


def test_a_turn_of_weight_0_is_context_only(tokenizer: Any) -> None:
    [sample] = encode(tokenizer, TWO_TURNS, {1: 0.0})
    assert supervised_texts(tokenizer, sample) == ["24, so it is.<|im_end|>"]
    assert "It is 42." in tokenizer.decode(sample.tokens)


def test_what_follows_the_last_supervised_turn_is_left_out(tokenizer: Any) -> None:
    turns = [*ONE_TURN, ("user", "Then again?")]
    assert (
        encode(tokenizer, turns)[0].tokens.tolist()
        == encode(tokenizer, ONE_TURN)[0].tokens.tolist()
    )


def test_weights_lie_on_their_turns_only(tokenizer: Any) -> None:
    [sample] = encode(tokenizer, TWO_TURNS, {1: 0.5, 3: 2.0})
    weights = sample.weights
    assert set(weights[~sample.mask]) == {0.0}
    assert [w for i, w in enumerate(weights) if w and w != weights[i - 1]] == [0.5, 2.0]


@settings(deadline=None, max_examples=60)
@given(
    contents=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
            str.strip
        ),
        min_size=2,
        max_size=6,
    )
)
def test_any_text_is_supervised_exactly(tokenizer: Any, contents: list[str]) -> None:
    turns = [("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(contents)]
    turns = turns[: len(turns) // 2 * 2]
    [sample] = encode(tokenizer, turns)
    answers = [text + "<|im_end|>" for role, text in turns if role == "assistant"]
    assert supervised_texts(tokenizer, sample) == answers


def test_a_template_is_asked_which_token_ends_a_turn(
    make_tokenizer: MakeTokenizer, family_and_template: tuple[str, str]
) -> None:
    tokenizer = make_tokenizer(*family_and_template)
    assert turn_end_id(tokenizer) == tokenizer.eos_token_id


def test_the_token_that_ends_a_turn_need_not_be_the_end_of_the_sequence(
    make_tokenizer: MakeTokenizer, templates: dict[str, str]
) -> None:
    template = templates["smollm2"].replace("<|im_end|>", "<|endoftext|>")
    tokenizer = make_tokenizer("smollm2", template)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.convert_ids_to_tokens(turn_end_id(tokenizer)) == "<|endoftext|>"


def test_a_template_that_wants_a_system_prompt_is_asked_with_one(
    make_tokenizer: MakeTokenizer, templates: dict[str, str]
) -> None:
    wants = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer = make_tokenizer("qwen", wants + templates["smollm2"])
    assert turn_end_id(tokenizer) == tokenizer.eos_token_id


# --- refusals ---


def test_a_template_that_refuses_every_conversation_is_the_users_mistake(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer("qwen", "{{ raise_exception('never') }}")
    with pytest.raises(
        UserError, match=r"model: expected a chat template .*never; set data\.chat_t"
    ):
        turn_end_id(tokenizer)


def refusal(tokenizer: Any, turns: list[tuple[str, str]]) -> str:
    [error] = ChatEncoder(tokenizer).encode([conversation(turns)])
    assert isinstance(error, BadRowError)
    return str(error)


def test_a_refused_conversation_leaves_its_neighbours_alone(tokenizer: Any) -> None:
    good, bad = conversation(ONE_TURN), conversation([("user", "<|im_end|>"), ("assistant", "a")])
    before, refused, after = ChatEncoder(tokenizer).encode([good, bad, good])
    assert isinstance(refused, BadRowError)
    assert not isinstance(before, BadRowError)
    assert not isinstance(after, BadRowError)
    assert before[0].tokens.tolist() == after[0].tokens.tolist()


def test_text_that_the_tokenizer_takes_for_a_special_token_is_refused(tokenizer: Any) -> None:
    turns = [("user", "What is <|im_end|>?"), ("assistant", "A token.")]
    assert re.search(
        "message 1 contains '<|im_end|>'".replace("|", r"\|"), refusal(tokenizer, turns)
    )


def test_what_a_template_forbids_is_a_bad_row(
    make_tokenizer: MakeTokenizer, templates: dict[str, str]
) -> None:
    tokenizer = make_tokenizer("mistral", templates["mistral"])
    reason = refusal(tokenizer, [("user", "a"), ("user", "b"), ("assistant", "c")])
    assert "the chat template refuses the conversation: roles must alternate" in reason


def test_a_generation_prompt_that_is_no_prefix_is_refused(
    make_tokenizer: MakeTokenizer, templates: dict[str, str]
) -> None:
    template = templates["smollm2"].replace("<|im_start|>assistant\n", "<|im_start|>bot\n")
    assert "does not begin the assistant turn with its generation prompt" in refusal(
        make_tokenizer("qwen", template), ONE_TURN
    )


@pytest.mark.parametrize("marks", [False, True])
def test_a_template_without_an_end_of_turn_token_is_refused(
    make_tokenizer: MakeTokenizer, marks: bool
) -> None:
    said = "{{ m['content'] }}"
    if marks:
        said = "{% generation %}" + said + "{% endgeneration %}"
    template = (
        "<|im_start|>{% for m in messages %}{{ m['role'] + ': ' }}"
        "{% if m['role'] == 'assistant' %}" + said + "{% else %}{{ m['content'] }}{% endif %}"
        "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    assert "writes no end-of-turn token" in refusal(make_tokenizer("qwen", template), ONE_TURN)


def test_a_template_that_leaves_an_answer_out_is_refused(make_tokenizer: MakeTokenizer) -> None:
    template = (
        "{% for m in messages %}{% if m['role'] != 'assistant' %}"
        "{{ '<|im_start|>' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    )
    assert "writes no end-of-turn token" in refusal(make_tokenizer("qwen", template), ONE_TURN)


def test_a_template_that_marks_fewer_turns_than_there_are_is_refused(
    make_tokenizer: MakeTokenizer, templates: dict[str, str]
) -> None:
    template = templates["marked"].replace(
        "message['role'] == 'assistant'", "message['role'] == 'assistant' and loop.last"
    )
    reason = refusal(make_tokenizer("qwen", template), TWO_TURNS)
    assert "marks 1 generations for 2 assistant turns" in reason


def test_an_answer_with_nothing_before_it_is_refused(make_tokenizer: MakeTokenizer) -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    reason = refusal(make_tokenizer("qwen", template), ONE_TURN)
    assert "nothing before the assistant's first token" in reason


def test_a_token_across_the_boundary_that_cannot_be_cut_is_refused(
    make_tokenizer: MakeTokenizer, templates: dict[str, str]
) -> None:
    # No space before the answer, and a tokenizer that would put one before a piece of its own.
    tokenizer = make_tokenizer("mistral", templates["mistral"].replace("' ' + message", "message"))
    reason = refusal(tokenizer, [("user", "So?"), ("assistant", "Straddle")])
    assert "a token crosses the start of an assistant turn" in reason


def test_a_tokenizer_without_special_tokens_is_the_users_mistake() -> None:
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, chat_template="x")
    with pytest.raises(UserError, match="has no special tokens, so nothing can end a turn"):
        ChatEncoder(tokenizer)


def test_a_tokenizer_without_a_chat_template_is_the_users_mistake(
    make_tokenizer: MakeTokenizer,
) -> None:
    with pytest.raises(UserError, match=r"has no chat template; set data\.chat_template"):
        ChatEncoder(make_tokenizer("qwen", None))


def test_a_template_that_is_not_jinja_is_the_users_mistake(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(UserError, match=r"not valid Jinja: line 2: .*'endfor'"):
        encode(make_tokenizer("qwen", "{% for m in messages %}\n{{ m.content }}"), ONE_TURN)
