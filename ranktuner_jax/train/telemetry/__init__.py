"""Telemetry of a run: metrics, progress, speed and memory."""
