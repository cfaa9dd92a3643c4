"""Checks of arguments that are whole numbers."""

from resist.errors import UserError


def check_whole(name: str, value: object, *, least: int) -> None:
    """Check an argument.

    Args:
        name: Its name, for the message.
        value: Its value. True and False are no numbers.
        least: Its lowest value.

    Raises:
        UserError: If it is not an int, or less than that.
    """
    if type(value) is not int:
        raise UserError(f"`{name}={value!r}` is not a whole number; give one")
    if value < least:
        raise UserError(f"`{name}={value}`; must be at least {least}")
