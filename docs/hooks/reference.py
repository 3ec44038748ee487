"""Write the reference pages from the code: option models, commands, registries.

MkDocs calls ``on_files``. The pages exist only in the built site, so they cannot be out of date.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args, get_origin

import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic.fields import FieldInfo

from epmq_deploy import recipe
from epmq_deploy.cli.main import app
from epmq_deploy.options import Options
from epmq_deploy.options.merging import MergeOptions
from epmq_deploy.options.quantization import QuantizeOptions
from epmq_deploy.recipe.prompt import Prompt
from epmq_deploy.registry import MERGE_METHODS, QUANTIZATION_METHODS, Method


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {
        "reference/recipe.md": recipe_page(),
        "reference/commands.md": commands_page(),
        "reference/methods.md": methods_page(),
        "reference/targets.md": targets_page(),
    }
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    titles = list(titles)
    lines = [titles, ["---"] * len(titles), *(list(row) for row in rows)]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines) + "\n"


def recipe_page() -> str:
    """Return the page of all recipe keys."""
    parts = [
        "# Recipe",
        "One YAML file with the sections below. Relative paths are taken from its folder; hub ids "
        "(`owner/name`, `owner/name@revision`) work wherever a model or dataset folder does. "
        "`epmq_deploy.load_recipe` reads it, and every key of `merge`, `quantize`, `export` and "
        "`eval` is also a flag of its command and a keyword of its Python function.",
        "## preflight",
        _rows({"preflight": recipe.Recipe.model_fields["preflight"]}),
        "## base",
        _keys(recipe.Base),
        "## tasks",
        "A mapping from task names to tasks. A task's name becomes part of the exported graph's "
        "output names: letters, digits, `_` and `-`.",
        _keys(recipe.Task),
        "### calibration, evaluation",
        _keys(recipe.DataSource),
        "### head",
        _keys(recipe.Head),
        "### prompt",
        _keys(Prompt),
        "## merge",
        "Keys of every method:",
        _keys(MergeOptions),
        *_method_sections(MERGE_METHODS, MergeOptions),
        "## quantize",
        "Keys of every method:",
        _keys(QuantizeOptions),
        *_method_sections(QUANTIZATION_METHODS, QuantizeOptions),
        "## export",
        _keys(recipe.ExportOptions),
        "## eval",
        _keys(recipe.EvalOptions),
    ]
    return "\n\n".join(parts)


def commands_page() -> str:
    """Return the page of all commands and their flags."""
    group: Any = typer.main.get_command(app)
    parts = [
        "# Commands",
        "Flags override the recipe. Options with several values may be repeated or "
        "comma-separated. Progress and logs go to stderr, results to stdout.",
    ]
    for name, command in group.commands.items():
        parts += [f"## epmq {name}", *_description(command.help or "")]
        panels: dict[str, list[list[str]]] = {}
        for parameter in command.params:
            if getattr(parameter, "hidden", False):
                continue
            panel = getattr(parameter, "rich_help_panel", None) or "Options"
            panels.setdefault(panel, []).append(_flag(parameter))
        for panel, rows in panels.items():
            if len(panels) > 1:
                parts.append(f"### {panel} {{ #{name}-{_slug(panel)} }}")
            parts.append(table(("flag", "what it does"), rows))
    return "\n\n".join(parts)


def methods_page() -> str:
    """Return the page of merge and quantization methods."""
    return "\n\n".join(
        [
            "# Methods",
            "## Merge methods",
            "`merge.method` in a recipe, `--method` of `epmq merge`. Their options are in the "
            "[recipe reference](recipe.md#merge).",
            _methods(MERGE_METHODS),
            "## Quantization methods",
            "`quantize.method` in a recipe, `--method` of `epmq quantize`. Their options are in "
            "the [recipe reference](recipe.md#quantize).",
            _methods(QUANTIZATION_METHODS),
        ]
    )


def targets_page() -> str:
    """Return the page of deployment targets and formats."""
    from epmq_deploy.exporters.formats import FORMATS
    from epmq_deploy.exporters.targets import TARGETS

    targets = [
        (
            f"`{name}`",
            ", ".join(f"`{each}`" for each in target.formats),
            _constraints(target),
            f"{target.why} {target.unverified and f'Not verified: {target.unverified}'}",
        )
        for name, target in TARGETS.items()
    ]
    return "\n\n".join(
        [
            "# Targets and formats",
            "## Deployment targets",
            "`export.target` in a recipe, `--target` of `epmq export`.",
            table(("target", "formats", "its kernels support", "why"), targets),
            "## Formats",
            "`export.formats` in a recipe, `--formats` of `epmq export`.",
            table(
                ("format", "what it is"), ((f"`{name}`", FORMATS[name].summary) for name in FORMATS)
            ),
        ]
    )


def _constraints(target: Any) -> str:
    """Return what a target's kernels take, in a few words."""
    limits = [f"{' and '.join(map(str, target.widths))} bits"]
    if target.blocks:
        limits.append(f"groups of {' or '.join(map(str, target.blocks))}")
    if target.whole_blocks:
        limits.append("groups that divide a layer's inputs")
    if target.symmetric:
        limits.append("`symmetric: true`")
    return ", ".join(limits)


def _method_sections(methods: Mapping[str, Method], shared: type[Options]) -> Iterator[str]:
    for name, method in methods.items():
        yield f"### {name} {{ #{shared.__name__.lower().removesuffix('options')}-{name} }}"
        yield f"{_sentence(method.summary)}"
        fields = {
            key: field
            for key, field in method.options.model_fields.items()
            if key not in shared.model_fields
        }
        if fields:
            yield _rows(fields)


def _methods(methods: Mapping[str, Any]) -> str:
    return table(
        ("method", "what it does", "source"),
        ((f"`{name}`", method.summary, method.source) for name, method in methods.items()),
    )


def _keys(model: type[Options]) -> str:
    return _rows(model.model_fields)


def _rows(fields: Mapping[str, FieldInfo]) -> str:
    return table(
        ("key", "type", "default", "meaning"),
        (
            (f"`{name}`", _type(field.annotation), _default(field), field.description or "")
            for name, field in fields.items()
        ),
    )


def _type(annotation: Any) -> str:
    """Return a type as a reader of YAML would say it."""
    plain = {str: "text", int: "integer", float: "number", bool: "true or false"}
    if annotation in plain:
        return plain[annotation]
    arguments = [each for each in get_args(annotation) if each is not type(None)]
    name = getattr(get_origin(annotation), "__name__", "")
    if name == "Literal":
        return " or ".join(f"`{each}`" for each in arguments)
    if name in ("tuple", "list"):
        return f"list of {_type(arguments[0])}"
    if name == "dict":
        return "mapping"
    if name == "Annotated":
        return _type(arguments[0])
    if arguments:
        return " or ".join(dict.fromkeys(_type(each) for each in arguments))
    if isinstance(annotation, type) and issubclass(annotation, Options):
        return "mapping"
    return "text"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value in (None, (), {}):
        return ""
    if isinstance(value, bool):
        return "`true`" if value else "`false`"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return "" if isinstance(value, Options) else f"`{value}`"


def _flag(parameter: Any) -> list[str]:
    names = [*parameter.opts, *parameter.secondary_opts]
    if parameter.param_type_name == "argument":
        names = [str(parameter.name).upper()]
    text = getattr(parameter, "help", "") or ""
    return [", ".join(f"`{name}`" for name in names), text]


def _description(text: str) -> Iterator[str]:
    """Yield a command's help as Markdown: paragraphs, and examples as code."""
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        lines = paragraph.replace("\b", "").strip("\n").split("\n")
        lines = [line for line in lines if line.strip()]
        if lines and lines[0].strip() == "Examples:":
            yield "```\n" + "\n".join(line.strip() for line in lines[1:]) + "\n```"
        elif lines:
            yield " ".join(line.strip() for line in lines)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _cell(text: str) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
