"""Errors that are shown in one line: a user error, and a run that cannot continue."""

__all__ = ["AlreadyReported", "DivergedError", "RunError", "UserError"]


class UserError(Exception):
    """An error in the user's input, such as a config, a flag or a file.

    The message names the key or flag, what was expected, what was given and how to fix it.
    The command line prints it without a traceback and exits with code 2.

    Example:
      >>> raise UserError("data.split: expected 'train' or 'test', got 'trian'; fix the spelling")
      Traceback (most recent call last):
      ranktuner_jax.errors.UserError: data.split: expected 'train' or 'test', got 'trian'; ...
    """


class AlreadyReported(UserError):  # noqa: N818 (not an error of its own)
    """A user error that process 0 has already printed.

    The command line exits with code 2 and prints nothing.

    Example:
      >>> raise AlreadyReported("data.source: expected a file, got rows.json, which does not exist")
      Traceback (most recent call last):
      ranktuner_jax.errors.AlreadyReported: data.source: expected a file, got rows.json, ...
    """


class RunError(Exception):
    """A failure that is not the user's mistake, such as a full disk or a lost process.

    The message says what happened, what is safe and what to do. The command line prints it
    without a traceback and exits with code 1.

    Example:
      >>> raise RunError("checkpoint 40: no space left on device; free some space and try again")
      Traceback (most recent call last):
      ranktuner_jax.errors.RunError: checkpoint 40: no space left on device; free some space ...
    """


class DivergedError(RunError):
    """A run stopped because the loss or the gradient of a step is not finite.

    Example:
      >>> raise DivergedError("step 7: the loss is nan and the gradient norm inf")
      Traceback (most recent call last):
      ranktuner_jax.errors.DivergedError: step 7: the loss is nan and the gradient norm inf
    """
