"""Writes tests/models/golden: logits of transformers + torch for every tiny checkpoint.

Run it from the repository's root when a case is added (needs the extra `parity`):

    python -m tests.models.make_golden
"""

import pathlib
import tempfile

import numpy as np

from tests.models import tiny

GOLDEN = pathlib.Path(__file__).parent / "golden"


def torch_logits(folder: pathlib.Path) -> np.ndarray:
    """Logits of the folder's model on `tiny.TOKENS`, in float32."""
    # Here, since collecting the tests imports this file, and most have no torch.
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return model(torch.tensor(tiny.TOKENS).long()).logits.numpy()


def main() -> None:
    """Writes one file a case."""
    GOLDEN.mkdir(exist_ok=True)
    for case in tiny.CASES:
        with tempfile.TemporaryDirectory() as folder:
            tiny.write_checkpoint(case, pathlib.Path(folder))
            np.savez_compressed(GOLDEN / f"{case}.npz", logits=torch_logits(pathlib.Path(folder)))


if __name__ == "__main__":
    main()
