"""The one error that users are meant to read."""


class HymbaError(ValueError):
    """Bad input, told in one line: what was wrong and what to do. The CLI prints it and exits with 1."""
