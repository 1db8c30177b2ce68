"""Records of benchmarks become tables, whose headings and units come from the figures' names."""

import json
import pathlib

import pytest

from ranktuner_jax import cli
from ranktuner_jax.bench.records import Record

MACHINE = {
    "name": "NVIDIA H100",
    "devices": 2,
    "cores": 16,
    "jax": "0.10.2",
    "peak_flops": {"float32": 5e13, "bfloat16": 7e14},
}


def test_figures_stand_in_the_units_of_their_names_below_the_machine(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fused = {"median_s": 0.05, "temp_bytes": 2.5e9, "flops_per_s": 7e14, "÷ dense": 0.5}
    torch = {"median_s": 2.0, "temp_bytes": None, "filled_share": 0.25, "tokens_per_s": 1234.5}
    records = [
        Record("loss", "large", "fused", fused, "bfloat16"),
        Record("loss", "large", "torch", torch, "bfloat16", failed="out of memory"),
    ]
    other = {**MACHINE, "name": "NVIDIA A100", "devices": 1}
    for name, machine in (("one", MACHINE), ("two", other)):
        text = json.dumps([record.to_json(machine) for record in records])
        (tmp_path / name).write_text(text)
    assert cli.main(["bench", "tables", f"{tmp_path}/one", f"{tmp_path}/two"]) == 0
    first, second = capsys.readouterr().out.split("**loss: large**")[1:]
    caption, heading, _, *rows = [line for line in first.splitlines() if line]
    assert caption == (
        "2 × NVIDIA H100, 16 cores, jax 0.10.2; a matrix product by itself: 50.00 TFLOP/s in "
        "float32, 700.00 TFLOP/s in bfloat16"
    )
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in (heading, *rows)]
    by_name = {column[0]: column[1:] for column in zip(*cells, strict=True)}
    assert by_name == {
        "": ("fused", "torch (failed: out of memory)"),
        "median": ("50.0 ms", "2.00 s"),
        "temp memory": ("2.50 GB", ""),
        "FLOP/s": ("700.000 TFLOP/s", ""),
        "÷ dense": ("0.500", ""),
        "of the peak": ("50.0%", ""),
        "filled": ("", "25.0%"),
        "tokens/s": ("", "1,234.5"),
    }
    assert "NVIDIA A100" in second
    assert "100.0%" in second


@pytest.mark.parametrize("text", ["{}", "[1]", '[{"bench": "loss"}]', "no JSON"])
def test_another_file_is_a_user_error(
    text: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text(text)
    assert cli.main(["bench", "tables", f"{tmp_path}/file"]) == 2
    message = capsys.readouterr().err
    assert "bench tables: expected a file that --json of a benchmark wrote" in message
    assert message.count("\n") == 1


def test_a_missing_file_is_a_user_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "tables", "no/such/file"]) == 2
    assert "no/such/file" in capsys.readouterr().err
