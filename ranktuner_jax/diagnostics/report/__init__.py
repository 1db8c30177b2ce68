"""Pages that people read: an audit, two audits side by side, a training run."""

from ranktuner_jax.diagnostics.report.audit_page import write_audit_report, write_figures
from ranktuner_jax.diagnostics.report.moved import write_moved_report
from ranktuner_jax.diagnostics.report.training import write_training_report

__all__ = [
    "write_audit_report",
    "write_figures",
    "write_moved_report",
    "write_training_report",
]
