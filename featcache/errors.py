"""The one exception family that both command lines print as a short paragraph (exit code 2, no traceback)."""


class UserError(Exception):
    """Something the user can put right.

    Args:
        what: what is wrong, with the offending value, and why it cannot go on.
        remedy: what to type or do instead.
    """

    def __init__(self, what: str, *, remedy: str | None = None) -> None:
        super().__init__(what if remedy is None else f"{what}\n{remedy}")
        self.what = what
        self.remedy = remedy


class WeightsUnavailable(UserError):
    """Pretrained weights are neither on this machine nor downloadable."""


class CacheError(UserError):
    """A cache is missing, incomplete, damaged, of another format version, or does not hold what is asked of it."""
