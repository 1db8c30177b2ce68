"""The decoder in lm-eval, against the benchmark here and against PyTorch in lm-eval."""

from __future__ import annotations

import importlib.resources
import importlib.util
import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest
import yaml

from ranktuner_jax.data import load_tokenizer
from ranktuner_jax.errors import UserError
from ranktuner_jax.evals import LocalEngine, Sampling, Suite, find_benchmark, read_questions
from ranktuner_jax.models import load_pretrained
from tests.evals.exported import export
from tests.tolerances import MEAN_NLL

pytestmark = [
    pytest.mark.drill,
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None or importlib.util.find_spec("torch") is None,
        reason="needs lm-eval and PyTorch: .venv-parity/bin/pip install '.[drill]'",
    ),
    pytest.mark.filterwarnings("ignore:::lm_eval", "ignore:::datasets", "ignore:::torch"),
]

DATA = pathlib.Path(__file__).parents[3] / "shared" / "data"
SUBJECTS = ["a spider", "the moon", "cold water", "a green leaf", "iron", "the human eye", "sand"]
VERBS = ["needs", "is made of", "moves because of", "is found near", "changes with"]
THINGS = ["light", "heat", "eight legs", "salt", "gravity", "tides", "air and water", "nothing"]


def arc_rows(count: int) -> list[dict[str, Any]]:
    """Rows in the form of ARC, some with digits as labels and five choices."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        texts = [f"{rng.choice(VERBS)} {rng.choice(THINGS)}" for _ in range(4 + i % 2)]
        labels = list("12345" if i % 3 == 0 else "ABCDE")[: len(texts)]
        rows.append(
            {
                "question": f"Which is true: {rng.choice(SUBJECTS)} or {rng.choice(SUBJECTS)}?",
                "choices": {"label": labels, "text": texts},
                "answerKey": str(rng.choice(labels)),
            }
        )
    return rows


def write_task(folder: pathlib.Path, rows: Sequence[dict[str, Any]]) -> pathlib.Path:
    """lm-eval's own ARC, reading these rows: a folder for its --include_path."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    theirs = yaml.safe_load(
        importlib.resources.files("lm_eval").joinpath("tasks/arc/arc_easy.yaml").read_text()
    )
    for name in ("tag", "dataset_name", "training_split", "validation_split"):
        del theirs[name]
    theirs |= {
        "task": "arc_local",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "rows.jsonl")},
            "cache_dir": str(folder / "cache"),
        },
    }
    (folder / "arc_local.yaml").write_text(yaml.safe_dump(theirs))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    rows = arc_rows(20)
    texts = [f"Question: {r['question']}\nAnswer: {t}" for r in rows for t in r["choices"]["text"]]
    return export(tmp_path_factory.mktemp("exported"), texts)


@pytest.fixture(scope="module")
def ours(folder: pathlib.Path) -> Any:
    from ranktuner_jax.evals.lm_eval import RankTunerLM

    return RankTunerLM(load_pretrained(folder), load_tokenizer(folder))


@pytest.fixture(scope="module")
def theirs(folder: pathlib.Path) -> Any:
    """The same folder in PyTorch, through lm-eval's own class."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)


def instances(kind: Any, arguments: Sequence[tuple[Any, ...]], repeats: int = 1) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [
        Instance(kind, doc={}, arguments=of_one, idx=0, metadata=("mine", number, repeats))
        for number, of_one in enumerate(arguments)
    ]


def likelihoods(model: Any, pairs: Sequence[tuple[str, str]]) -> tuple[list[float], list[bool]]:
    found = model.loglikelihood(instances("loglikelihood", pairs))
    return [total for total, _ in found], [greedy for _, greedy in found]


def evaluate(model: Any, task: pathlib.Path, **options: Any) -> Any:
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(task), include_defaults=False)
    return lm_eval.simple_evaluate(
        model=model, tasks=["arc_local"], task_manager=manager, bootstrap_iters=0, **options
    )


def check_arc(
    model: Any, folder: pathlib.Path, rows: Sequence[dict[str, Any]], path: pathlib.Path
) -> None:
    """The same likelihoods and scores through lm-eval and through the benchmark here."""
    result = evaluate(model, write_task(path, rows))
    benchmark = find_benchmark("arc_challenge_likelihood")
    questions = read_questions(benchmark, {benchmark.name: str(path / "rows.jsonl")})
    engine = LocalEngine(load_pretrained(folder), load_tokenizer(folder))
    Suite([(benchmark, questions)], Sampling(), path / "out").run(engine)
    samples = [json.loads(line) for line in (path / "out" / "samples.jsonl").open()]

    by_lm_eval = sorted(result["samples"]["arc_local"], key=lambda sample: sample["doc_id"])
    assert len(samples) == len(by_lm_eval) == len(rows)
    samples.sort(key=lambda sample: sample["question"])
    for sample, by_theirs, question in zip(samples, by_lm_eval, questions, strict=True):
        assert [tuple(pair) for pair in by_theirs["arguments"]] == [
            (question.text, choice) for choice in question.choices
        ]
        values = [float(response[0][0]) for response in by_theirs["resps"]]
        np.testing.assert_allclose(sample["log_likelihoods"], values, **MEAN_NLL)
        assert (sample["correct"], sample["correct_per_character"]) == (
            bool(by_theirs["acc"]),
            bool(by_theirs["acc_norm"]),
        )
    scores = result["results"]["arc_local"]
    accuracy = np.mean([sample["correct"] for sample in samples])
    per_character = np.mean([sample["correct_per_character"] for sample in samples])
    np.testing.assert_allclose(scores["acc,none"], accuracy)
    np.testing.assert_allclose(scores["acc_norm,none"], per_character)


def test_arc_is_scored_as_by_the_benchmark_here(
    ours: Any, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    check_arc(ours, folder, arc_rows(30), tmp_path)


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the files of the benchmarks")
def test_published_arc_is_scored_as_by_the_benchmark_here(
    ours: Any, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    rows = []
    for line in list((DATA / "arc_challenge_test.jsonl").open())[:40]:
        row = json.loads(line)
        choices = row["question"]["choices"]
        listed = {name: [choice[name] for choice in choices] for name in ("label", "text")}
        rows.append(
            {
                "question": row["question"]["stem"],
                "choices": listed,
                "answerKey": row["answerKey"],
            }
        )
    check_arc(ours, folder, rows, tmp_path)


def test_likelihoods_are_those_of_pytorch(ours: Any, theirs: Any) -> None:
    pairs = [
        ("Question: Which is true?\nAnswer:", " the moon is made of salt"),
        ("a spider needs ", "light"),  # The space goes to the continuation.
        ("", "iron changes with heat"),
        ("<|im_start|>user\nsand<|im_end|>\n<|im_start|>assistant\n", "is found near air"),
        ("x", " x"),
    ]
    # The likeliest token each time: greedy.
    [likeliest] = theirs.generate_until(
        instances("generate_until", [("a spider", {"until": [], "max_gen_toks": 1})])
    )
    pairs.append(("a spider", likeliest))
    found, greedy = likelihoods(ours, pairs)
    expected, greedy_theirs = likelihoods(theirs, pairs)
    np.testing.assert_allclose(found, expected, **MEAN_NLL)
    assert greedy == greedy_theirs
    assert greedy[-1]


def test_long_texts_are_scored_in_the_windows_of_pytorch(ours: Any, theirs: Any) -> None:
    words = " ".join(f"{s} {v} {t}." for s in SUBJECTS for v in VERBS for t in THINGS)
    texts = [("cold water moves because of gravity",), (words,)]
    assert len(ours.tok_encode(words)) > 2 * ours.max_length
    found, expected = (
        m.loglikelihood_rolling(instances("loglikelihood_rolling", texts)) for m in (ours, theirs)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("until", [[], ["e"], [" the", "\n"]])
def test_greedy_answers_are_those_of_pytorch(ours: Any, theirs: Any, until: list[str]) -> None:
    turns = [[{"role": "user", "content": f"What is {subject}?"}] for subject in SUBJECTS]
    options = {"until": until, "max_gen_toks": 16, "do_sample": False}
    found, expected = (
        m.generate_until(
            instances("generate_until", [(m.apply_chat_template(t), options) for t in turns])
        )
        for m in (ours, theirs)
    )
    assert found == expected
    assert len(set(found)) > 3


def test_a_mesh_gives_the_same_likelihoods(ours: Any, folder: pathlib.Path) -> None:
    from ranktuner_jax.evals.lm_eval import RankTunerLM

    over_all = RankTunerLM.load(str(folder))
    assert over_all.model.mesh is not None
    assert over_all.model.mesh.size == jax.device_count() == 8
    pairs = [(f"What is {subject}?", " light") for subject in SUBJECTS]
    found, expected = (likelihoods(model, pairs)[0] for model in (over_all, ours))
    np.testing.assert_allclose(found, expected, **MEAN_NLL)


def test_drawn_answers_depend_on_the_question_and_the_seed_only(
    ours: Any, folder: pathlib.Path
) -> None:
    from ranktuner_jax.evals.lm_eval import RankTunerLM

    options = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    asked = instances("generate_until", [(f"What is {s}?", options) for s in SUBJECTS])
    drawn = ours.generate_until(asked)
    assert ours.generate_until(asked[2:4]) == drawn[2:4]
    other = RankTunerLM(ours.model, ours.tokenizer, seed=1)
    assert other.generate_until(asked) != drawn


def test_several_answers_to_a_question_are_refused(ours: Any, tmp_path: pathlib.Path) -> None:
    task = write_task(tmp_path, arc_rows(2))
    config = yaml.safe_load((task / "arc_local.yaml").read_text())
    del config["doc_to_choice"], config["metric_list"]
    config |= {
        "output_type": "generate_until",
        "generation_kwargs": {"until": ["\n"], "do_sample": True, "temperature": 1.0},
        "metric_list": [{"metric": "exact_match"}],
        "repeats": 2,
    }
    (task / "arc_local.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=r"^arc_local: .*got repeats.*ranktuner eval --samples"):
        evaluate(ours, task)
    twice = [("q", {"until": [], "temperature": 1.0})] * 2
    with pytest.raises(UserError, match=r"^mine: .*got repeats"):
        ours.generate_until(instances("generate_until", twice))
    greedy = [("q", {"until": [], "max_gen_toks": 4})] * 2
    first, second = ours.generate_until(instances("generate_until", greedy))
    assert first == second


def test_what_the_sampler_lacks_is_refused(ours: Any) -> None:
    beams = instances("generate_until", [("q", {"until": [], "num_beams": 4})])
    with pytest.raises(UserError, match=r"^mine: expected generation_kwargs .*got num_beams"):
        ours.generate_until(beams)
    long = instances("generate_until", [("q", {"until": [], "max_gen_toks": 513})])
    with pytest.raises(UserError, match=r"at most 512 tokens.* got 513 .*begins 'q'.*num_fewshot"):
        ours.generate_until(long)
    with pytest.raises(UserError, match="batch_size: expected a number, got auto"):
        type(ours)(ours.model, ours.tokenizer, batch_size="auto")
    long = instances("loglikelihood", [("x" * 5000, " x")])
    with pytest.raises(UserError, match="at most 512 tokens"):
        ours.loglikelihood(long)


def test_the_command_line_of_lm_eval_knows_the_model(
    ours: Any, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    task = write_task(tmp_path, arc_rows(4))
    command = [sys.executable, "-m", "ranktuner_jax.evals.lm_eval", "--model", "ranktuner"]
    command += ["--model_args", f"pretrained={folder}", "--tasks", "arc_local"]
    command += ["--include_path", str(task), "--output_path", str(tmp_path / "out")]
    subprocess.run(command, check=True, cwd=tmp_path)
    [path] = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(path.read_text())["results"]["arc_local"]
    expected = evaluate(ours, task)["results"]["arc_local"]
    assert {name: found[name] for name in ("acc,none", "acc_norm,none")} == {
        name: expected[name] for name in ("acc,none", "acc_norm,none")
    }


def test_a_mistake_on_the_command_line_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    from ranktuner_jax.evals.lm_eval import main

    arguments = ["--model", "ranktuner", "--model_args", f"pretrained={tmp_path / 'none'}"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments, "--tasks", "arc_challenge"])
    assert main() == 2
    assert "none" in capsys.readouterr().err.splitlines()[-1]
