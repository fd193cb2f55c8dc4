"""The one exception that tells a user about bad input."""


class InputError(ValueError):
    """Bad input, said in one sentence: which argument or file, what was expected, what came.

    The command line prints the sentence without a traceback and exits with status 2.
    """
