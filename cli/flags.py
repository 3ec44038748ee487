"""Command-line flags made from option models, so that options are typed once."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from epmq_deploy.options import Options

SEVERAL_HELP = "for several repeat the flag or separate them by commas"
_HELP_GROUP = "Options of the recipe"


def with_flags(
    models: Iterable[type[Options]], summaries: Mapping[str, str] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one flag per option of ``models``.

    The command declares a keyword ``flags``; it receives a dict of option name to value, None where
    the flag was not given. Values are validated by the models, not here.

    Args:
        models: option models; of several, each is one method's.
        summaries: what each method does, for the help.
    """
    options = _merged_fields(list(models), summaries or {})

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def wrapper(**arguments: Any) -> None:
            flags = {name: arguments.pop(name) for name in options}
            command(**arguments, flags=flags)

        own = inspect.signature(command, eval_str=True).parameters.values()
        kept = [item for item in own if item.name != "flags"]
        signature = inspect.Signature(
            [*kept, *(_parameter(name, *found) for name, found in options.items())]
        )
        wrapper.__signature__ = signature  # type: ignore[attr-defined]
        wrapper.__annotations__ = {
            name: item.annotation for name, item in signature.parameters.items()
        }
        wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
        return wrapper

    return decorate


def _merged_fields(
    models: list[type[Options]], summaries: Mapping[str, str]
) -> dict[str, tuple[FieldInfo, list[str]]]:
    """Fields by name, with the methods that have them where not all do."""
    fields: dict[str, tuple[FieldInfo, list[str]]] = {}
    for name in dict.fromkeys(name for model in models for name in model.model_fields):
        having = [model for model in models if name in model.model_fields]
        methods = [] if len(having) == len(models) else [_method_of(model) for model in having]
        fields[name] = (having[0].model_fields[name], methods)
    if "method" in fields:
        described = "; ".join(f"{name}: {summary}" for name, summary in summaries.items())
        fields["method"] = (FieldInfo(annotation=str, description=described), [])
    return fields


def _method_of(model: type[Options]) -> str:
    return str(model.model_fields["method"].default)


def _parameter(name: str, field: FieldInfo, methods: list[str]) -> inspect.Parameter:
    base, choices = _flag_type(field.annotation)
    help_text = field.description or ""
    if choices:
        help_text += f" ({' | '.join(choices)})"
    if base == list[str]:
        help_text += f"; {SEVERAL_HELP}"
    if methods:
        help_text += f" ({', '.join(methods)} only)"
    flag = f"--{name.replace('_', '-')}"
    names = [f"{flag}/--no-{name.replace('_', '-')}"] if base is bool else [flag]
    if isinstance(field.json_schema_extra, dict):  # what else it is called
        names.append(str(field.json_schema_extra["flag"]))
    option = typer.Option(*names, help=help_text, show_default=False, rich_help_panel=_HELP_GROUP)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[base | None, option],
    )


def _flag_type(annotation: Any) -> tuple[Any, list[str]]:
    """The type a flag is parsed as, and the values to list in its help."""
    if get_origin(annotation) is Annotated:
        return _flag_type(get_args(annotation)[0])
    arguments = [item for item in get_args(annotation) if item is not type(None)]
    if get_origin(annotation) is Literal:
        return type(arguments[0]), [str(item) for item in arguments]
    if get_origin(annotation) in (tuple, dict):
        return list[str], []
    if len(arguments) > 1:  # a value of one of several types, which the model tells apart
        return str, []
    if arguments:  # an optional value
        return _flag_type(arguments[0])
    return annotation, []
