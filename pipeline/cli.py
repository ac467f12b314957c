"""The `diffprune` command: parses, calls, prints, and turns errors into exit statuses."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from pipeline.config import Config, load_config
from pipeline.errors import DiffpruneError

app = typer.Typer(
    name="diffprune",
    help="Find out which image-text pairs help a CLIP model, and train on those alone.",
    epilog="Start with:  diffprune demo DIR  |  diffprune init SHARDS  |  diffprune run CONFIG",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML config (`diffprune init` writes one).")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a config value; may be repeated.")
]
Out = Annotated[str | None, typer.Option("--out", metavar="DIR", help="The run's folder, instead of the config's.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's folder: a path or an fsspec URL.")]
Selection = Annotated[str, typer.Option("--selection", metavar="NAME", help="Which selection of the run.")]


def _load(config: str, overrides: list[str] | None, out: str | None) -> Config:
    return load_config(config, overrides, out)


@app.command()
def run(
    config: ConfigPath,
    set_: Overrides = None,
    out: Out = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Take up shards that were set aside.")] = False,
) -> None:
    """Run all stages; started again, go on where it stopped.

    Example: `diffprune run my.yaml --set select.keep=0.5 --out runs/half`
    """
    from pipeline.stages import runner

    runner.run_all(_load(config, set_, out), retry_failed=retry_failed)


def _stage_command(name: str, description: str) -> None:
    def command(config: ConfigPath, set_: Overrides = None, out: Out = None) -> None:
        from pipeline.stages import runner

        runner.run_stage(name, _load(config, set_, out))

    app.command(name, help=description)(command)


_stage_command("inventory", "Find the shards and count their pairs.")
_stage_command("train", "Train the proxy run, or read the checkpoints given.")
_stage_command("directions", "Compute, per checkpoint, what every pair is scored along.")


@app.command()
def score(
    config: ConfigPath,
    set_: Overrides = None,
    out: Out = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Take up shards that were set aside.")] = False,
) -> None:
    """Score every pair, shard by shard."""
    from pipeline.stages import runner

    runner.run_stage("score", _load(config, set_, out), retry_failed=retry_failed)


@app.command()
def select(
    config: ConfigPath,
    set_: Overrides = None,
    out: Out = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be kept; write nothing.")] = False,
) -> None:
    """Choose the pairs to keep from finished scores; never rescores.

    Example: `diffprune select my.yaml --set select.name=half --set select.keep=0.5 --dry-run`
    """
    from pipeline.stages import runner

    loaded = _load(config, set_, out)
    if dry_run:
        runner.show_plan(loaded)
    else:
        runner.run_stage("select", loaded)


_stage_command("emit", "Write manifests, uid lists, the training command and, if asked for, pruned tars.")
_stage_command("report", "Write the report page.")
_stage_command("evaluate", "Train on the kept pairs and on baselines of the same size.")
_stage_command("validate", "Measure how far the scores can be trusted, by retraining.")


@app.command()
def status(run: Run) -> None:
    """How far a run is, from its files alone: works from any machine, while it runs or after."""
    from pipeline.engine.status import print_status

    print_status(run)


@app.command()
def verify(run: Run) -> None:
    """Check what a run wrote against itself; exit status 1 and the reasons if anything is off."""
    from pipeline.emit.verify import verify as find_problems

    problems = find_problems(run)
    for problem in problems:
        typer.echo(problem)
    if problems:
        typer.echo(f"{len(problems)} problem{'s' if len(problems) > 1 else ''} found in {run}", err=True)
        raise typer.Exit(1)
    typer.echo(f"{run}: everything written agrees with itself")


@app.command()
def compare(
    run: Run,
    first: Annotated[str, typer.Argument(metavar="A", help="A selection's name.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another selection's name.")],
) -> None:
    """Overlap of two selections of a run, and where they differ."""
    from pipeline.stages import runner

    runner.show_comparison(run, first, second)


@app.command()
def demo(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Where the demo shards go.")] = "demo-data",
) -> None:
    """Write the demo data: scans of handwritten digits with captions, a recorded share of them wrong."""
    from pipeline.data.demo import make_demo

    paths = make_demo(folder, seed=0)
    typer.echo(f"training shards: {paths.train}\ntarget shards:   {paths.target}\ntest shards:     {paths.test}")


def main() -> None:
    """Entry point of the `diffprune` command."""
    sys.exit(invoke(sys.argv[1:]))


def invoke(arguments: list[str]) -> int:
    """Run one command line and return its exit status (contract: 0 complete, 2 config or usage, 1 anything else)."""
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        result: Any = app(arguments, standalone_mode=False)
    except DiffpruneError as error:
        errors.print(f"[bold red]error:[/] {_escape(str(error))}")
        return error.exit_status
    except KeyboardInterrupt:
        errors.print("stopped; the same command goes on from here")
        return 130
    except Exception as error:
        return _usage_error(error)
    return result if isinstance(result, int) else 0


def _usage_error(error: Exception) -> int:
    import click

    if isinstance(error, click.ClickException):
        error.show()
        return error.exit_code
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, click.exceptions.Abort):
        return 130
    raise error


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


if __name__ == "__main__":
    main()
