"""`ranktuner eval --tasks`, from the command line."""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

import pytest

from ranktuner_jax import cli
from ranktuner_jax.evals.samples import SampleFile
from ranktuner_jax.train.runtime.preemption import PREEMPTED
from tests.train import processes
from tests.train.happenings import sigterm_inside

DATA = pathlib.Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Five questions."""
    path = tmp_path_factory.mktemp("questions") / "mine.jsonl"
    lines = [{"question": f"{a}+{a}", "answer": str(2 * a)} for a in range(5)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def command(tiny_model: pathlib.Path, rows: pathlib.Path) -> list[str]:
    return [
        "eval",
        f"--model={tiny_model}",
        f"--tasks={rows}",
        "--grader=exact",
        "--samples=3",
        "--temperature=1",
        "--max_new_tokens=6",
    ]


def completions(folder: pathlib.Path) -> dict[tuple[int, int], str]:
    samples = SampleFile(folder / "samples.jsonl").samples
    assert len({(s.question, s.sample) for s in samples}) == len(samples)
    return {(s.question, s.sample): s.completion for s in samples}


@pytest.fixture(scope="module")
def whole(
    tiny_model: pathlib.Path, rows: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
    """The folder of an evaluation that nothing happened to."""
    folder = tmp_path_factory.mktemp("evals") / "whole"
    flags = ["--grader=exact", "--samples=3", "--temperature=1", "--max_new_tokens=6"]
    where = [f"--model={tiny_model}", f"--tasks={rows}", f"--output={folder}"]
    assert cli.main(["eval", *where, *flags]) == 0
    return folder


def test_it_prints_shares_with_intervals_and_keeps_every_answer(
    command: list[str], whole: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (whole / "samples.jsonl").read_bytes()
    assert cli.main([*command, f"--output={whole}"]) == 0  # Finished: nothing is sampled again.
    shown = capsys.readouterr().out
    assert "pass@1" in shown
    assert "pass@2" in shown
    assert "mine: 5 questions, 3 answers each, " in shown
    assert (whole / "samples.jsonl").read_bytes() == before
    answers = completions(whole)
    assert len(answers) == 15
    assert len(set(answers.values())) > 5
    assert cli.main([*command, f"--output={whole}", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["mine"]["shares"]["pass@1"]["low"] == 0.0


def test_answers_depend_on_their_question_and_the_seed_only(
    command: list[str], whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    assert cli.main([*command, f"--output={tmp_path / 'few'}", "--limit=2"]) == 0
    few = completions(tmp_path / "few")
    assert few == {key: text for key, text in completions(whole).items() if key[0] < 2}
    assert cli.main([*command, f"--output={tmp_path / 'other'}", "--seed=1"]) == 0
    assert completions(tmp_path / "other") != completions(whole)


def test_a_stopped_evaluation_goes_on_with_the_same_answers(
    command: list[str],
    whole: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = [*command, f"--output={tmp_path / 'part'}"]
    with sigterm_inside("SampleFile.append", 7):
        assert cli.main(command) == PREEMPTED
    said = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"mine: 2 of 15 answers  [\d,]+ tokens/s  \d+ min left", said[0])
    assert said[-1] == "stopped: run the same command to go on"
    assert 0 < len(completions(tmp_path / "part")) < 15
    assert cli.main(command) == 0
    assert completions(tmp_path / "part") == completions(whole)


def test_two_processes_give_the_answers_of_one(
    command: list[str], whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    arguments = [*command[1:], f"--output={tmp_path / 'both'}"]
    ends = processes.wait(processes.start(arguments, command="eval"), timeout=240)
    assert [code for code, _ in ends] == [0, 0], ends
    assert completions(tmp_path / "both") == completions(whole)


def test_another_evaluation_is_compared_question_by_question(
    command: list[str],
    whole: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # As if the first two questions had been answered right.
    file = SampleFile(whole / "samples.jsonl")
    better = tmp_path / "better"
    better.mkdir()
    (better / "result.json").write_bytes((whole / "result.json").read_bytes())
    lines = [
        json.loads(sample.to_json())
        | ({"completion": sample.reference} if sample.question < 2 else {})
        for sample in file.samples
    ]
    (better / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [*command, f"--output={better}", "--regrade", f"--against={whole}"]
    assert cli.main(command) == 0
    assert "mine, pass@1: +40.0 points (" in capsys.readouterr().out


def test_questions_that_were_trained_on_are_counted(
    tiny_model: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = " ".join(f"word{i}" for i in range(13))
    asked = [{"prompt": words, "answer": "1"}, {"prompt": "short", "answer": "1"}]
    trained = [{"prompt": f"Well, {words.upper()}!", "completion": "1"}]
    for name, lines in (("asked", asked), ("trained", trained)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text)
    flags = ["--grader=exact", "--max_new_tokens=1", f"--output={tmp_path / 'out'}"]
    where = [f"--tasks={tmp_path / 'asked.jsonl'}", f"--overlap={tmp_path / 'trained.jsonl'}"]
    assert cli.main(["eval", f"--model={tiny_model}", *where, *flags]) == 0
    assert "asked: 1 of 2 questions share 13 words in a row with" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--output="], "--output: expected a folder for the answers, got none"),
        (["--samples=4", "--temperature=0"], "--samples=4: expected --temperature above 0"),
        (["--k=1,4"], "--k: expected numbers from 1 to the 3 samples of a question, got 4"),
        (["--k=many"], "--k: expected numbers separated by commas, got 'many'"),
        (["--limit=0"], "--limit: expected at least 1, got 0"),
        (["--data=nowhere"], "--data: expected a folder or NAME=SOURCE, got 'nowhere'"),
        (["--data=typo=rows.jsonl"], "--data: expected a name in --tasks="),
        (["--tasks=math500"], "--grader, --system: expected a file of your own in --tasks"),
        (["--tasks=", "--config=own_data"], "--output: expected --tasks beside it, got none"),
        (["--tasks=math501"], "--tasks: expected math500, minerva,"),
        (["--grader=taste"], "--grader: expected one of choice, exact, math, number, python"),
        (["--against=nowhere"], "--against: expected the folder of a finished evaluation"),
        (["--model=nowhere"], "nowhere"),
        (["--engine=openai"], "--engine=openai: expected --base_url"),
        (["--regrade"], "holds no answers to mine"),
    ],
)
def test_a_mistake_is_one_line(
    flags: list[str],
    said: str,
    command: list[str],
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main([*command, f"--output={tmp_path / 'out'}", *flags]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]


def test_a_reference_that_the_grader_cannot_use_is_named_before_anything_is_sampled(
    tiny_model: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"question": "2+2?", "answer": {"value": 4}}\n')
    flags = ["--grader=exact", f"--output={tmp_path / 'out'}"]
    assert cli.main(["eval", f"--model={tiny_model}", f"--tasks={path}", *flags]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("ranktuner: mine: question 0: reference: expected a text, a number")
    assert not (tmp_path / "out").exists()


@pytest.mark.drill
def test_another_evaluation_in_the_folder_ends_both_of_two_processes(
    command: list[str], whole: pathlib.Path
) -> None:
    arguments = [*command[1:], f"--output={whole}", "--seed=7"]
    ends = processes.wait(processes.start(arguments, command="eval"), timeout=240)
    assert [code for code, _ in ends] == [2, 2], ends
    assert sum("holds an evaluation with sampling.seed 0" in said for _, said in ends) == 1


def test_without_data_or_tasks_it_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "--model=any"]) == 2
    assert "expected --workdir or --config, whose held-out data to use, or --tasks" in (
        capsys.readouterr().err
    )


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the files of the benchmarks")
def test_the_published_benchmarks_are_read_from_a_folder(
    tiny_model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    tasks = ["math500", "arc_challenge_likelihood", "gsm8k", "humaneval", "mbpp"]
    output = tmp_path / "out"
    flags = ["--limit=2", "--max_new_tokens=4", f"--data={DATA}", f"--output={output}"]
    assert cli.main(["eval", f"--model={tiny_model}", f"--tasks={','.join(tasks)}", *flags]) == 0
    result: dict[str, Any] = json.loads((output / "result.json").read_text())
    assert list(result["tasks"]) == tasks
    assert all(task["questions"] == 2 for task in result["tasks"].values())
