"""`ranktuner lab`: what is in the folder is what was asked for, and models learn from it."""

import collections
import itertools
import json
import pathlib
import random
import re
import shlex
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx

from ranktuner_jax import cli, data, evals, models
from ranktuner_jax.errors import UserError
from ranktuner_jax.evals.benchmarks.own import own_benchmark
from ranktuner_jax.lab.faults import choose
from ranktuner_jax.lab.problems import different, sums
from tests.lab.conftest import MakeLab

FILES = ("pretrain", "train", "target", "ood", "retention")
NOISY = {"contradict": 0.5, "token_noise": 0.25, "answer_noise": 0.3, "paraphrase": 0.4}

# What a sentence says that a rule does; read from the text, not from the code that wrote it.
SAID = re.compile(
    r"By (?P<a>[a-z]+) we (?P<b>add|take) (?P<c>\d)|(?P<d>[a-z]+) (?P<e>adds|takes) (?P<f>\d)"
)
STEP = re.compile(r"(\d+) ([+-]) (\d+) = (\d+)")
RARE = re.compile(r"\b(?:Once|Rule|From) ")


def rows(folder: pathlib.Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def everything(folder: pathlib.Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def meanings(completions: list[str]) -> dict[str, set[tuple[str, str]]]:
    """What each rule is said to do, as the first letter of "add" or "take" and a digit."""
    found = collections.defaultdict(set)
    for text in completions:
        for match in SAID.finditer(text):
            rule, verb, number = (match["a"], match["b"], match["c"])
            if rule is None:
                rule, verb, number = (match["d"], match["e"], match["f"])
            found[rule].add((verb[0], number))
    return found


def rules_asked(question: str, known: set[str]) -> list[str]:
    return [word for word in re.findall(r"[a-z]+", question) if word in known]


def chain(question: str) -> tuple[str, ...]:
    """What is asked without the words around it: numbers and what is done with them."""
    signs = {
        **dict.fromkeys(("+", "buys", "finds", "gets", "makes"), "+"),
        **dict.fromkeys(("-", "gives", "loses", "sells", "drops"), "-"),
    }
    rules = re.findall(r"\b(?:(?:b|dr|fl|gr|k|pl|sn|z)(?:ag|esk|ip|orn))\b", question)
    words = re.findall(r"[a-z]+|\d+|[+-]", question)
    return tuple(
        signs.get(word, word) for word in words if word in signs or word.isdigit() or word in rules
    )


def test_the_same_flags_give_the_same_bytes(make_lab: MakeLab) -> None:
    first, second = (everything(make_lab(copy=copy, **NOISY)) for copy in (0, 1))
    assert first == second
    assert first.keys() > {f"{name}.jsonl" for name in FILES} | {"lab.json"}


def test_another_seed_gives_other_text_and_weights(make_lab: MakeLab) -> None:
    first, second = (everything(make_lab(seed=seed)) for seed in (0, 1))
    same = {name for name in first if first[name] == second[name]}
    assert not same & ({f"{name}.jsonl" for name in FILES} | {"initial/model.safetensors"})


def test_the_base_model_does_not_depend_on_the_faults(make_lab: MakeLab) -> None:
    clean, noisy = everything(make_lab()), everything(make_lab(**NOISY))
    changed = {name for name in clean if clean[name] != noisy[name]}
    assert changed == {"lab.json", "train.jsonl", "target.jsonl", "ood.jsonl"}


def test_noise_changes_nothing_but_the_training_rows(make_lab: MakeLab) -> None:
    clean = everything(make_lab())
    noisy = everything(make_lab(**NOISY | {"contradict": 0}))
    changed = {name for name in clean if clean[name] != noisy[name]}
    assert changed == {"lab.json", "train.jsonl"}


@pytest.mark.parametrize("axis", ["contradict", "token_noise", "answer_noise", "paraphrase"])
def test_a_larger_share_keeps_the_other_rows_as_they_are(make_lab: MakeLab, axis: str) -> None:
    few, more = (rows(make_lab(**{axis: share}), "train") for share in (0.2, 0.4))
    clean = rows(make_lab(), "train")
    touched = [{i for i, row in enumerate(clean) if row != other[i]} for other in (few, more)]
    assert touched[0] < touched[1]
    assert all(few[i] == more[i] for i in touched[0]) or axis == "paraphrase"


def test_no_question_is_in_two_files_in_whatever_words(make_lab: MakeLab) -> None:
    folder = make_lab(contradict=0.5)
    asked = {name: [row["prompt"] for row in rows(folder, name)] for name in FILES}
    for name in FILES[1:]:
        assert len(set(asked[name])) == len(asked[name])
    chains = [set(map(chain, questions)) for questions in asked.values()]
    assert min(map(len, chains)) > 20
    assert min(len(one) for found in chains for one in found) > 1
    assert len(set.union(*chains)) == sum(map(len, chains))


def test_every_answer_but_those_asked_to_be_wrong_is_right(make_lab: MakeLab) -> None:
    grade = evals.GRADERS["number"]
    folder = make_lab(**NOISY)
    for name in FILES:
        for row in rows(folder, name):
            right = row["clean"] if name == "train" else row["completion"]
            assert grade(right, row["answer"])
            steps = STEP.findall(right)
            assert all(int(a) + int(f"{sign}{b}") == int(c) for a, sign, b, c in steps)
            assert all(0 <= int(c) <= 30 for *_, c in steps)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_of_contradictions_is_that_of_rows_with_other_rules_than_the_base_learnt(
    make_lab: MakeLab, share: float
) -> None:
    folder = make_lab(contradict=share)
    base = meanings([row["completion"] for row in rows(folder, "pretrain")])
    learnt = {rule: said for rule, said in base.items() if len(said) == 1}
    assert (len(base), len(learnt)) == (32, 16)
    new = meanings(
        [row["clean"] for name in ("train", "target", "ood") for row in rows(folder, name)]
    )
    assert {len(said) for said in new.values()} == {1}  # One meaning, in training and in questions.
    for name in ("train", "target", "ood"):
        asked = [rules_asked(row["prompt"], set(base)) for row in rows(folder, name)]
        contradicting = [bool(set(found) & set(learnt)) for found in asked]
        assert sum(contradicting) == round(share * len(asked))
        for rule in {rule for found in asked for rule in found if rule in learnt and rule in new}:
            [(verb, number)], [(old_verb, old_number)] = new[rule], learnt[rule]
            assert verb != old_verb
            assert number != old_number


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_share_of_wrong_answers_is_that_asked_for(make_lab: MakeLab, share: float) -> None:
    found = rows(make_lab(answer_noise=share), "train")
    wrong = []
    for row in found:
        final = re.findall(r"\d+", row["completion"])[-1]
        wrong.append(final != row["answer"])
        assert (row["completion"] != row["clean"]) == wrong[-1]
        last_steps = STEP.findall(row["completion"])[-1:]
        assert all(result == final for *_, result in last_steps)
    assert sum(wrong) == round(share * len(found))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_share_of_rows_with_random_tokens_is_that_asked_for(
    make_lab: MakeLab, share: float
) -> None:
    folder = make_lab(token_noise=share)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "initial")
    lengths = []
    for row in rows(folder, "train"):
        noisy, clean = (np.array(tokenizer.encode(row[key])) for key in ("completion", "clean"))
        assert len(noisy) == len(clean)
        [places] = np.nonzero(noisy != clean)
        lengths.append(len(places))
        assert not len(places) or places[-1] - places[0] + 1 == len(places)  # One span.
        assert not set(noisy.tolist()) & set(tokenizer.all_special_ids)
    assert sum(map(bool, lengths)) == round(share * len(lengths))
    assert set(lengths) - {0} == (set(range(2, 7)) if share else set())


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_of_steps_said_in_a_rare_way_is_that_asked_for(
    make_lab: MakeLab, share: float
) -> None:
    folder = make_lab(paraphrase=share)
    base = [row["completion"] for row in rows(folder, "pretrain")]
    rules = set(meanings(base))
    found = rows(folder, "train")
    steps = sum(len(rules_asked(row["prompt"], rules)) for row in found)
    assert sum(len(RARE.findall(row["completion"])) for row in found) == round(share * steps)
    assert 0.01 < np.mean([bool(RARE.search(text)) for text in base]) < 0.12


def test_a_larger_share_has_the_choices_of_a_smaller_one() -> None:
    few, more = (choose(50, share, random.Random(3)) for share in (0.2, 0.5))
    assert (sum(few), sum(more)) == (10, 25)
    assert all(b for a, b in zip(few, more, strict=True) if a)


def test_text_carries_any_tokens_through_the_tokenizer(make_lab: MakeLab) -> None:
    folder = make_lab(**NOISY)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "initial")
    ordinary = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    assert 100 < len(ordinary) < 400
    # Every pair of tokens, one after another.
    pairs = np.array([(a, b) for a in ordinary for b in ordinary]).ravel().tolist()
    assert tokenizer.encode(tokenizer.decode(pairs), add_special_tokens=False) == pairs
    for name in FILES:
        for row in rows(folder, name):
            for text in (row["prompt"], row["completion"]):
                tokens = tokenizer.encode(text, add_special_tokens=False)
                assert tokenizer.unk_token_id not in tokens
                assert tokenizer.decode(tokens) == text


def test_our_data_reader_reads_every_file_and_supervises_the_answers(make_lab: MakeLab) -> None:
    folder = make_lab(**NOISY)
    tokenizer = data.load_tokenizer(folder / "initial")
    for name in FILES:
        config = data.DataConfig(str(folder / "{split}.jsonl"), name, row_length=128)
        examples = data.load_examples(config, tokenizer, split=name, limit=10**6)
        assert len(examples) == len(rows(folder, name))
        for example, row in zip(examples, rows(folder, name), strict=True):
            assert tokenizer.decode(example.completion_tokens) == f"{row['completion']}<|end|>"
            assert (
                tokenizer.decode(example.prompt_tokens) == f"<|user|>{row['prompt']}<|assistant|>"
            )
            assert example.row["answer"] == row["answer"]


def test_the_files_of_questions_are_benchmarks_of_ranktuner_eval(make_lab: MakeLab) -> None:
    folder = make_lab()
    for name in ("target", "ood", "retention"):
        benchmark = own_benchmark(str(folder / f"{name}.jsonl"), "number")
        for row in rows(folder, name):
            assert benchmark.ask(row) == row["prompt"]
            assert evals.GRADERS["number"](row["completion"], benchmark.reference(row))


def test_the_initial_model_loads_and_knows_nothing(make_lab: MakeLab) -> None:
    folder = make_lab() / "initial"
    model = models.load_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert model.vocab_size == len(tokenizer)
    assert 1e6 < sum(map(np.size, jax.tree.leaves(nnx.state(model, nnx.Param)))) < 3e6
    logits = model.logits(model(jnp.array([tokenizer.encode("What is 3 + 4?")], jnp.int32)))
    log_probs = jax.nn.log_softmax(logits)
    assert abs(float(-log_probs.mean()) - np.log(len(tokenizer))) < 0.5


@pytest.fixture
def quickly_compiled() -> Iterator[None]:
    """Compiling is most of the time."""
    before = {
        name: jax.config.values[name]
        for name in ("jax_compilation_cache_dir", "jax_disable_most_optimizations")
    }
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.usefixtures("quickly_compiled")
def test_the_printed_commands_train_a_base_and_a_cell(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a lab"
    sizes = ("--rows=60", "--questions=16", "--pretrain_rows=400")
    assert cli.main(["lab", f"--output={folder}", *sizes]) == 0
    printed = capsys.readouterr().out.splitlines()
    base, cell = (shlex.split(line)[1:] for line in printed if line.startswith("ranktuner train"))
    tiny = ["--config.train.steps=6", "--config.telemetry.progress=False"]
    assert cli.main([*base, *tiny, "--config.eval.task="]) == 0
    few = ["--config.eval.examples=4", "--config.eval.max_new_tokens=4"]
    assert cli.main([*cell, *tiny, *few]) == 0
    for name in ("base", "cell"):
        lines = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
        before, after = (row["eval/nll"] for row in lines if "eval/nll" in row)
        assert after < before
        assert before > np.log(100) or name == "cell"  # Which begins where the base ended.


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--rows=0", "--rows: expected at least 1, got 0"),
        ("--seed=-1", "--seed: expected at least 0, got -1"),
        ("--contradict=1.5", "--contradict: expected a share from 0 to 1, got 1.5"),
        ("--token_noise=nan", "--token_noise: expected a share from 0 to 1, got nan"),
        ("--rows=many", "argument --rows: invalid int value: 'many'"),
        ("--output=.", "--output: expected a new folder, got ., which exists"),
    ],
)
def test_a_bad_flag_is_answered_in_one_line(
    flag: str, message: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["lab", f"--output={tmp_path}/lab", flag]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ranktuner: {message}")
    assert not (tmp_path / "lab").exists()


def test_more_questions_than_there_are_is_refused() -> None:
    with pytest.raises(UserError, match=r"--questions: expected about 2 at most, .* got 3"):
        different(itertools.cycle(itertools.islice(sums(0), 2)), 3)
