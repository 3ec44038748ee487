"""Command-line flags made from option models and dataclasses, so that options are typed once."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from epmq_deploy.options import Options

SEVERAL_HELP = "for several repeat the flag or separate them by commas"
# A panel of the help names its methods up to this number.
_NAMED_METHODS = 4

Command = Callable[..., None]


def with_flags(
    models: Iterable[type[Options]] = (),
) -> Callable[[Command], Command]:
    """Give a command one flag per option of ``models`` and per field of its dataclasses.

    A parameter of the command that is annotated with a dataclass is replaced by the dataclass's
    fields, and the command receives an instance. If there are ``models``, the command declares a
    keyword ``flags`` and receives a dict of option name to value, None where the flag was not
    given. Values are validated by the models, not here.

    Args:
        models: option models; if there are several, each is one method's.
    """
    flags = _flags(list(models))

    def decorate(command: Command) -> Command:
        parameters = inspect.signature(command, eval_str=True).parameters
        groups = {
            name: inspect.signature(item.annotation, eval_str=True).parameters
            for name, item in parameters.items()
            if isinstance(item.annotation, type) and is_dataclass(item.annotation)
        }

        def wrapper(**arguments: Any) -> None:
            # Flags are taken out first: an option may have the name of one of the dataclasses.
            values = {flag.name: arguments.pop(flag.name) for flag in flags}
            for name, fields in groups.items():
                group = {field: arguments.pop(field) for field in fields}
                arguments[name] = parameters[name].annotation(**group)
            if flags:
                arguments["flags"] = values
            command(**arguments)

        expanded: list[inspect.Parameter] = []
        for name, item in parameters.items():
            if name in groups:
                expanded += groups[name].values()
            elif name != "flags":
                expanded.append(item)
        expanded += [flag.parameter() for flag in flags]
        _describe(wrapper, command, expanded)
        return wrapper

    return decorate


def _describe(wrapper: Command, command: Command, parameters: list[inspect.Parameter]) -> None:
    """Make typer see ``wrapper`` as ``command`` with other parameters, all of them keywords."""
    keywords = [item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in parameters]
    wrapper.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {item.name: item.annotation for item in keywords}
    wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__


@dataclass(frozen=True)
class _Flag:
    """One flag, which may be an option of several methods.

    Attributes:
        name: of the option.
        field: the option as one of the methods declares it; its type is that of all.
        choices: the values it takes; empty where the type does not list them.
        help: what it does.
        panel: title of the part of the help it stands in.
    """

    name: str
    field: FieldInfo
    choices: list[str]
    help: str
    panel: str

    def parameter(self) -> inspect.Parameter:
        """Return the flag as a parameter of a command."""
        flag = self.name.replace("_", "-")
        parsed_as = _parsed_type(self.field.annotation)
        text = self.help
        if self.choices:
            text += f" ({' | '.join(self.choices)})"
        if parsed_as == list[str]:
            text += f"; {SEVERAL_HELP}"
        spellings = [f"--{flag}/--no-{flag}" if parsed_as is bool else f"--{flag}"]
        if isinstance(self.field.json_schema_extra, dict):  # another spelling
            spellings.append(str(self.field.json_schema_extra["flag"]))
        option = typer.Option(
            *spellings,
            help=text,
            show_default=False,
            rich_help_panel=self.panel,
            autocompletion=self.complete if self.choices else None,
        )
        return inspect.Parameter(
            self.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[parsed_as | None, option],
        )

    def complete(self, incomplete: str) -> list[str]:
        """Return the choices that begin with what a shell wants completed."""
        return [choice for choice in self.choices if choice.startswith(incomplete)]


def _flags(models: list[type[Options]]) -> list[_Flag]:
    """Return the flags of all options, first those that most methods have."""
    names = dict.fromkeys(name for model in models for name in model.model_fields)
    owners = {name: [model for model in models if name in model.model_fields] for name in names}
    return [
        _flag(name, owners[name], models)
        for name in sorted(names, key=lambda name: len(owners[name]), reverse=True)
    ]


def _flag(name: str, owners: list[type[Options]], models: list[type[Options]]) -> _Flag:
    """Return the flag of one option, which the models ``owners`` have."""
    fields = [owner.model_fields[name] for owner in owners]
    choices = dict.fromkeys(text for field in fields for text in _choices(field.annotation))
    panel = _panel(owners, models)
    methods: dict[str, list[type[Options]]] = {}
    for owner in owners:
        methods.setdefault(_description(name, owner), []).append(owner)
    if len(methods) > 1:
        text = "; ".join(f"{_named(having)}: {text}" for text, having in methods.items())
    else:
        (text,) = methods
        if panel == _OF_SEVERAL:
            text += f" ({_named(owners)})"
    return _Flag(name, fields[0], list(choices), text, panel)


def _description(name: str, model: type[Options]) -> str:
    """Return what an option does, as the model or the nearest of its bases describes it."""
    fields = [base.model_fields for base in model.__mro__ if issubclass(base, Options)]
    descriptions = [each[name].description for each in fields if name in each]
    return next((text for text in descriptions if text), "")


_OF_SEVERAL = "Options of several methods"


def _panel(owners: list[type[Options]], models: list[type[Options]]) -> str:
    """Return the title of the part of the help that an option stands in."""
    if len(models) == 1:
        return "Options of the recipe"
    if len(owners) == len(models):
        return "Options of every method"
    if len(owners) > _NAMED_METHODS:
        return _OF_SEVERAL
    return f"Options of {_named(owners)}"


def _named(models: list[type[Options]]) -> str:
    """Return the names of the methods whose options ``models`` are."""
    return ", ".join(str(model.model_fields["method"].default) for model in models)


def _parsed_type(annotation: Any) -> Any:
    """Return the type a flag is parsed as."""
    origin, arguments = get_origin(annotation), _arguments(annotation)
    if origin is Literal:
        return type(arguments[0])
    if origin in (tuple, dict):
        return list[str]
    if origin is not Annotated and len(arguments) > 1:
        return str  # a value of one of several types, which the model tells apart
    return _parsed_type(arguments[0]) if arguments else annotation


def _choices(annotation: Any) -> list[str]:
    """Return the values to list in a flag's help."""
    origin, arguments = get_origin(annotation), _arguments(annotation)
    if origin is Literal:
        return [str(item) for item in arguments]
    single = origin is Annotated or (origin not in (tuple, dict) and len(arguments) == 1)
    return _choices(arguments[0]) if single else []


def _arguments(annotation: Any) -> list[Any]:
    """Return the arguments of a generic type but for None."""
    return [item for item in get_args(annotation) if item is not type(None)]
