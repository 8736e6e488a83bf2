"""The command `polywhiten completion`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")


@click.command(short_help="Print a script that lets a shell complete commands and options.")
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a script that lets a shell complete commands, options and their values.

    \b
    bash: add this line to ~/.bashrc
        eval "$(polywhiten completion bash)"
    zsh: add this line to ~/.zshrc
        eval "$(polywhiten completion zsh)"
    fish: run this command once
        polywhiten completion fish > ~/.config/fish/completions/polywhiten.fish
    """  # noqa: D301  # click's mark for lines that stay as they are is no raw string
    root = ctx.find_root()
    script = get_completion_class(shell)
    assert script is not None
    click.echo(script(root.command, {}, "polywhiten", "_POLYWHITEN_COMPLETE").source())
