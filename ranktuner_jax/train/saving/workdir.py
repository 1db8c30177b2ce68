"""The folder of a run: which run it belongs to, and which configs may resume it."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from ranktuner_jax import files
from ranktuner_jax.errors import UserError
from ranktuner_jax.train.config import TrainConfig, differences, to_dict
from ranktuner_jax.train.config.load import CODE, read_config_json, write_out
from ranktuner_jax.train.config.show import flatten

__all__ = ["claim_workdir", "config_differences"]

# Keys that affect where a run computes, what it logs and saves, and when it gives up, but not its
# results: they may change when an interrupted run is resumed.
_MAY_CHANGE = (
    *("mesh.", "checkpoint.", "telemetry.", "train.log_every:", "train.profile_steps:"),
    *("train.on_nonfinite:", "train.nonfinite_limit:", "data.cache:"),
)


def claim_workdir(workdir: epath.PathLike, config: TrainConfig) -> Callable[[], None]:
    """Creates the folder of a run, and checks that it holds no run with another config.

    Keys that do not affect the results may differ: `mesh`, `checkpoint` and the like. Nothing is
    written to the folder yet, so that a later error does not leave it claimed.

    Args:
      workdir: The folder.
      config: The run's config.

    Returns:
      A function that writes config.json and a copy of the user's config file; from then on the
      folder belongs to the run.

    Raises:
      UserError: If the folder cannot be written, or holds a run with another config.
    """
    workdir = epath.Path(workdir)
    path = workdir / "config.json"
    probe = workdir / f".probe-{jax.process_index()}"
    mine = to_dict(write_out(config))
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
        exists = path.exists()
    except OSError as error:
        raise UserError(
            f"--workdir: expected a writable folder, got {workdir}: {error.strerror}"
        ) from error
    if config.code and (workdir / CODE).exists():
        _check_code((workdir / CODE).read_text(), config.code, workdir)
    if exists and (found := config_differences(to_dict(read_config_json(path)), mine)):
        raise UserError(
            f"--workdir: {workdir} holds a run with another config ({'; '.join(found)}); "
            "use another folder, or the same config"
        )

    def claim() -> None:
        if jax.process_index() == 0:
            # Keep the first copy: the code that the run started with.
            if config.code and not (workdir / CODE).exists():
                files.write_whole(workdir / CODE, config.code)
            files.write_whole(path, json.dumps(mine, indent=2) + "\n")

    return claim


def _check_code(old: str, new: str, workdir: epath.Path) -> None:
    """Refuses other code in the user's config file; the values are compared as values."""

    def without_values(code: str) -> str:
        tree = ast.parse(code)
        tree.body = [n for n in tree.body if getattr(n, "name", "") != "get_config"]
        return ast.dump(tree)

    if without_values(old) != without_values(new):
        raise UserError(
            f"--workdir: {workdir} holds a run whose config file has other code, see "
            f"{workdir / CODE}; use another folder, or the same code"
        )


def config_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The differences between two configs that prevent resuming.

    Keys missing in the old config, which an older version wrote, are ignored.
    """
    known = {key for key, _ in flatten(old)}
    return [
        line
        for line in differences(old, new)
        if line.split(":")[0] in known and not line.startswith(_MAY_CHANGE)
    ]
