"""The exceptions that one line explains: a user's mistake, and a run that cannot go on."""

__all__ = ["RunError", "SaidElsewhere", "UserError"]


class UserError(Exception):
    """A mistake of the user that one line explains.

    The message names the thing, what was expected, what came and what to do.
    The command line prints it without a traceback and exits with code 2.

    Example:
      >>> raise UserError("data.split: expected 'train' or 'test', got 'trian'; fix the spelling")
      Traceback (most recent call last):
      ranktuner_jax.errors.UserError: data.split: expected 'train' or 'test', got 'trian'; ...
    """


class SaidElsewhere(UserError):  # noqa: N818 (it is no error of its own)
    """A mistake of the user that another process of the run has said already.

    The command line exits with code 2 and says nothing.

    Example:
      >>> raise SaidElsewhere("data.source: expected a file, got rows.json, which does not exist")
      Traceback (most recent call last):
      ranktuner_jax.errors.SaidElsewhere: data.source: expected a file, got rows.json, ...
    """


class RunError(Exception):
    """What stopped a run, where nobody asked for anything wrong: a full disk, a lost process.

    The message says what happened, what is safe and what to do. The command line prints it
    without a traceback and exits with code 1.

    Example:
      >>> raise RunError("checkpoint 40: no space left on device; make room, then start again")
      Traceback (most recent call last):
      ranktuner_jax.errors.RunError: checkpoint 40: no space left on device; make room, ...
    """
