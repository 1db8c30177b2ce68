"""Optional logging to Weights & Biases."""

from __future__ import annotations

import importlib.util
import pathlib
import uuid
from collections.abc import Mapping
from typing import Any

from etils import epath

from ranktuner_jax.errors import UserError
from ranktuner_jax.train.config import TelemetryConfig

__all__ = ["check_telemetry", "start_wandb"]


def check_telemetry(config: TelemetryConfig) -> None:
    """Checks, before a run starts, that the packages that its telemetry needs are installed.

    Raises:
      UserError: If Weights & Biases is enabled but not installed.
    """
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"telemetry.wandb={config.wandb}: expected the package wandb, which is not installed; "
            "run pip install 'ranktuner-jax[wandb]'"
        )


def start_wandb(
    project: str, workdir: epath.Path, folder: pathlib.Path, run: Mapping[str, Any] | None
) -> Any:
    """Starts a Weights & Biases run, or resumes that of an interrupted run."""
    import wandb

    identity = workdir / "wandb_id"
    if not identity.exists():
        identity.write_text(uuid.uuid4().hex[:12])
    entity, _, name = project.rpartition("/")
    try:
        return wandb.init(
            entity=entity or None,
            project=name,
            id=identity.read_text(),
            resume="allow",
            name=workdir.name,
            dir=folder,
            config=dict(run or {}),
            settings=wandb.Settings(console="off"),
        )
    except wandb.Error as error:
        raise UserError(f"telemetry.wandb={project}: {str(error).splitlines()[0]}") from error
