"""The class of every command: flags for one value are given once."""

from collections import Counter
from typing import Any

from typer.core import TyperCommand

from epmq_deploy.errors import RecipeError


class Command(TyperCommand):
    """Refuses a flag that is given twice, of which click would silently take the last."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse arguments; raises ``RecipeError`` where one value is given twice."""
        if not ctx.resilient_parsing and args:
            _, _, order = self.make_parser(ctx).parse_args(list(args))
            for option, count in Counter(order).items():
                # A switch that can only be turned on may be turned on twice.
                only_on = getattr(option, "is_flag", False) and not option.secondary_opts
                if count > 1 and not only_on and not getattr(option, "multiple", True):
                    raise RecipeError(f"{option.opts[0]} is given {count} times; give it once")
        return super().parse_args(ctx, args)
