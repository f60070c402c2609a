"""Groups of commands, and the settings that all commands share."""

from __future__ import annotations

from typing import Any

import click

from fastcnn.errors import UsageError, nearest

SETTINGS: dict[str, Any] = {
    "context_settings": {
        "help_option_names": ["-h", "--help"],
        "max_content_width": 110,
        "show_default": True,
        "token_normalize_func": lambda token: token.replace("_", "-"),  # --batch_size is --batch-size
    }
}


class Commands(click.Group):
    """A group that names the nearest command to a mistyped one."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Return the command that `args` begin with."""
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            raise UsageError(
                f"no command '{args[0]}'{nearest(args[0], self.list_commands(ctx))}; see {ctx.command_path} --help"
            )
        return super().resolve_command(ctx, args)
