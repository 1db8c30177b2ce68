"""The one exception that stands for a user's mistake."""

__all__ = ["UserError"]


class UserError(Exception):
    """A mistake of the user that one line explains.

    The message names the thing, what was expected, what came and what to do.
    The command line prints it without a traceback and exits with code 2.

    Example:
      >>> raise UserError("data.split: expected 'train' or 'test', got 'trian'; fix the spelling")
      Traceback (most recent call last):
      ranktuner_jax.errors.UserError: data.split: expected 'train' or 'test', got 'trian'; ...
    """
