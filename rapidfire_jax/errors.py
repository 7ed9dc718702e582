"""The one exception that means "what you gave me cannot be used"."""


class InputError(ValueError):
    """Bad configuration, weights, data, prompt or reward; the message names it and says what would be accepted.

    The command line prints the message without a traceback and exits with code 2.
    """
