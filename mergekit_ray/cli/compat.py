"""`compat`: mergekit's commands, with their own arguments and options, as commands of ours."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Annotated, Any

import typer

from mergekit_ray.cli.app import HELP, app
from mergekit_ray.cli.mergekit_options import ARGUMENTS, COMMANDS, OPTIONS, Option
from mergekit_ray.cli.options import Overwrite
from mergekit_ray.cli.running import OurCommand, OurGroup, told_errors
from mergekit_ray.cli.usage import number, whole
from mergekit_ray.cli.voice import tell

_PARSERS = {"INTEGER": (int, whole()), "FLOAT": (float, number)}


class _Group(OurGroup):
    """Knows each command by mergekit's name, too."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """See `click.Group.get_command`."""
        return super().get_command(ctx, cmd_name.removeprefix("mergekit-"))


compat = typer.Typer(cls=_Group, no_args_is_help=True, context_settings=HELP, rich_markup_mode=None)
app.add_typer(compat, name="compat")


def aliases() -> str:
    """Shell code that gives these commands mergekit's names.

    They are functions in bash, which passes them on to the scripts that it starts, and in zsh. Other shells refuse a
    function with a hyphen in its name, but expand aliases in scripts, too.
    """
    functions = [f'{theirs}() {{ mergekit-ray compat {ours} "$@"; }}' for ours, theirs in COMMANDS.items()]
    return "\n".join(
        [
            'if [ -n "${BASH_VERSION-}${ZSH_VERSION-}" ]; then',
            *(f"  eval '{function}'" for function in functions),
            f'  if [ -n "${{BASH_VERSION-}}" ]; then export -f {" ".join(COMMANDS.values())}; fi',
            "else",
            *(f"  alias {theirs}='mergekit-ray compat {ours}'" for ours, theirs in COMMANDS.items()),
            "fi",
            "",
        ]
    )


def _print_aliases(wanted: bool) -> None:
    if wanted:
        typer.echo(aliases(), nl=False)
        raise typer.Exit


@compat.callback()
def compat_group(
    *,
    wanted: Annotated[
        bool,
        typer.Option(
            "--aliases",
            callback=_print_aliases,
            is_eager=True,
            help="Print shell code that gives these commands mergekit's names.",
        ),
    ] = False,
) -> None:
    """Run a command line of mergekit.

    Shows which command of ours it is, explains options that have no counterpart, and runs it.
    `eval "$(mergekit-ray compat --aliases)"` makes old scripts work as they are.
    """
    del wanted


def _run(command: str) -> Callable[..., None]:
    def run(**given: Any) -> None:
        quiet = bool(given.get("quiet"))
        with told_errors(False, quiet=quiet):
            from mergekit_ray.cli.translation import translate

            found = translate(command, {name: value or None if name == "v" else value for name, value in given.items()})
        if not quiet:
            tell(found.told())
        if found.prints:
            typer.echo(found.prints, nl=False)
        os.environ.update(found.environ)
        if found.words:
            group: Any = typer.main.get_command(app)
            with group.make_context("mergekit-ray", found.words) as context:
                group.invoke(context)

    parameters = [_argument(name) for name in ARGUMENTS[command]]
    parameters += [_option(option) for option in sorted(OPTIONS[command], key=lambda each: not each.required)]
    # mergekit writes over what is at the output. Its commands know no option for that, so ours keeps its name.
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    parameters.append(inspect.Parameter("overwrite", keyword_only, default=False, annotation=Overwrite))
    # What typer reads: see `takes_merge_options`.
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined] # functions may have it
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__ = f"Do what {COMMANDS[command]} does."
    return run


def _argument(name: str) -> inspect.Parameter:
    annotation = Annotated[str, typer.Argument(metavar=name)]
    return inspect.Parameter(name.lower(), inspect.Parameter.KEYWORD_ONLY, annotation=annotation)


def _option(option: Option) -> inspect.Parameter:
    declared: dict[str, Any] = {"help": f"Here: {option.here}."}
    kind: Any
    names = list(option.names)
    if option.names == ("-v",):
        kind, declared["count"] = int, True
    elif not option.takes:
        kind = bool
        names = ["/".join(pair) for pair in zip(names, option.off, strict=True)] if option.off else names
    else:
        kind, parser = _PARSERS.get(option.takes, (str, None))
        declared |= {"metavar": option.takes, **({"parser": parser} if parser else {})}
    wanted: Any = list[kind] if option.repeats else kind
    if not option.required:
        wanted = wanted | None
    return inspect.Parameter(
        option.key,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if option.required else None,
        annotation=Annotated[wanted, typer.Option(*names, **declared)],
    )


for _name in OPTIONS:
    compat.command(_name, cls=OurCommand)(_run(_name))
