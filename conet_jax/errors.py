"""The one exception that means: the input is at fault, and this is how to mend it."""


class InputError(ValueError):
    """Bad input: a file, a flag, a config value or prepared data that cannot be used.

    The message is one line that names the file, line and value (or the config field), says what
    was expected and, where there is one, the command or flag that helps. Launchers print it on
    stderr and exit with status 2; library callers may catch it as a ``ValueError``.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))


class Diverged(InputError):
    """A loss, gradient, parameter or score is NaN or infinite: no more of the run can be trusted.

    An input error, since another config is what mends it: ``what`` is the message without that.
    """

    def __init__(
        self,
        what: str,
        cure: str = "the run has diverged; lower config.learning_rate or set config.clip_norm",
    ) -> None:
        super().__init__(f"{what}: {cure}")
        self.what = what
