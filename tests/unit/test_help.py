"""Every command explains itself."""

import click
import pytest

from jobs.cli import cli


def leaves(group: click.Group, path: str = "tessera") -> dict[str, click.Command]:
    """Commands of a group and of the groups in it, by what is typed."""
    found: dict[str, click.Command] = {}
    for name, command in group.commands.items():
        typed = f"{path} {name}"
        found |= leaves(command, typed) if isinstance(command, click.Group) else {typed: command}
    return found


COMMANDS = leaves(cli)


@pytest.mark.parametrize("typed", COMMANDS)
def test_help_has_a_sentence_and_examples_of_the_command(typed: str) -> None:
    command = COMMANDS[typed]
    assert command.help
    examples = (command.epilog or "").split("Examples:")[1]
    assert f"  {typed}" in examples
