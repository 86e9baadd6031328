"""``pyramid-serve``: the library's commands, a server on this machine, and a client for any server.

What a command needs is imported when it runs: Ray and torch take seconds to import, and a client needs neither. Even
what is needed to read the command line is imported within ``main``, so that Ctrl-C is handled from its first line on.
"""

from collections.abc import Sequence

from deployments.cli.importing import leaving_at_interrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``pyramid-serve``; the exit status."""
    with leaving_at_interrupt(arguments):
        from deployments.cli.batch import add_batch_command
        from deployments.cli.client import add_client_commands
        from deployments.cli.planning import add_planning_commands
        from deployments.cli.serving import add_serving_commands
        from pyramid_serve import cli

        families = cli.asked_families(arguments)
        parser, commands = cli.new_parser()
        cli.add_commands(commands, families)
        add_serving_commands(commands, families)
        add_planning_commands(commands)
        add_client_commands(commands, families)
        add_batch_command(commands)
    return cli.run(parser, arguments)
