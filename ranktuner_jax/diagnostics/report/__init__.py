"""Pages that people read: an audit, two audits side by side, a training run."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ranktuner_jax.diagnostics.report.audit_page import write_audit_report, write_figures
    from ranktuner_jax.diagnostics.report.moved import write_moved_report
    from ranktuner_jax.diagnostics.report.training import write_training_report

__all__ = [
    "write_audit_report",
    "write_figures",
    "write_moved_report",
    "write_training_report",
]

_MODULES = {
    "write_audit_report": "audit_page",
    "write_figures": "audit_page",
    "write_moved_report": "moved",
    "write_training_report": "training",
}


def __getattr__(name: str) -> Any:
    # Altair takes a second to import, which whoever needs another module here should not wait for.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
