"""What process 0 finds, or refuses, every process knows: two real processes over loopback."""

from tests.train import processes

SCRIPT = """
import sys

import jax

jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from ranktuner_jax.errors import UserError
from ranktuner_jax.evals.processes import on_first_process

def refuse():
    raise UserError(f"refused by process {jax.process_index()}")

print("found by process", on_first_process(jax.process_index), file=sys.stderr)
try:
    on_first_process(refuse)
except UserError as error:
    print(error, file=sys.stderr)
"""


def test_the_result_and_the_mistake_of_process_0_are_those_of_all() -> None:
    ends = processes.wait(processes.start_script(SCRIPT), timeout=120)
    for code, said in ends:
        assert code == 0, said
        assert "found by process 0" in said
        assert "refused by process 0" in said
