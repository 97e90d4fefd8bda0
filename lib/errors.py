"""What a user can put right."""


class UsageError(Exception):
    """One sentence that says what is wrong and the way out. Notebooks show it without a traceback."""

    def _render_traceback_(self):
        return [f"UsageError: {self}"]
