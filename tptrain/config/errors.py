"""The one exception a user's mistake raises."""


class UserError(Exception):
    """What the user asked for cannot be done: the message names key, value and fix. Ends a command with exit code 2."""
