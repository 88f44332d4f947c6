"""``batchnorm completion``: the script that lets a shell complete commands, options and sections."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

_VARIABLE = "_BATCHNORM_COMPLETE"


@click.command(
    short_help="Print a script that completes commands in your shell.",
    epilog="""\b
Examples:
  eval "$(batchnorm completion bash)"                                        in ~/.bashrc
  eval "$(batchnorm completion zsh)"                                         in ~/.zshrc
  batchnorm completion fish > ~/.config/fish/completions/batchnorm.fish""",
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script of SHELL."""
    script = get_completion_class(shell)
    assert script is not None  # the choice names click's own three
    click.echo(script(context.find_root().command, {}, "batchnorm", _VARIABLE).source())
