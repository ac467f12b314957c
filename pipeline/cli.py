"""The `diffprune` command: parses, calls, prints, and turns errors into exit statuses."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from pipeline.config import MAX_PIXELS, Config, load_config, parse_config
from pipeline.errors import ConfigError, DiffpruneError

BEFORE, JOB, STAGES, AFTER, TRUST = (
    "Before a run", "The job", "Its stages, one at a time", "During and after a run", "Trust"
)  # fmt: skip

#: The exit status where Ctrl-C or SIGTERM ends a command at once; where they let shards and tasks in hand finish, that
#: is 1.
INTERRUPTED = 130

app = typer.Typer(
    name="diffprune",
    help="Find out which image-text pairs help a CLIP model, and train on those alone.",
    epilog="Start with `diffprune init SHARDS`, then `diffprune run my.yaml`. `diffprune COMMAND --help` has examples. "
    "Exit status: 0 when everything asked for is complete, 2 for a config or usage error, 130 when stopped at once by "
    "Ctrl-C, 1 for anything else.",
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
Shards = Annotated[
    list[str],
    typer.Argument(
        metavar="SHARDS", help="WebDataset tars: paths, folders, globs, brace patterns, URLs, a .txt of these."
    ),
]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Take up shards that were set aside.")]


@contextmanager
def _loaded(file: str, overrides: list[str] | None, out: str | None) -> Iterator[Config]:
    """The config of a command; an error that is found in it later names its file, too."""
    config = load_config(file, overrides, out)
    try:
        yield config
    except ConfigError as error:
        raise error.in_file(file) from None


def _show_version(wanted: bool) -> None:
    if wanted:
        import importlib.metadata

        typer.echo(f"diffprune {importlib.metadata.version('diffprune')}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(rich_help_panel=BEFORE)
def init(
    shards: Shards,
    to: Annotated[str, typer.Option("--to", metavar="CONFIG", help="Where the config goes.")] = "my.yaml",
    out: Annotated[str | None, typer.Option("--out", metavar="DIR", help="The run's folder, for the config.")] = None,
) -> None:
    """Look at shards and this machine, and write a commented config that fits both.

    Example: `diffprune init 'data/{00000..00099}.tar' --to my.yaml --out runs/mine`
    """
    from pipeline.inspecting import print_inspection
    from pipeline.scaffold import write_config

    print_inspection(write_config(to, shards, out=out))
    typer.echo(f"wrote {to}; go on with: diffprune run {to}")


@app.command(rich_help_panel=BEFORE)
def inspect(
    shards: Shards,
    caption: Annotated[str, typer.Option(metavar="WHERE", help="`txt`, or `json:KEY`.")] = "txt",
    examples: Annotated[int, typer.Option(min=0, help="Pairs to show.")] = 4,
    max_pixels: Annotated[int, typer.Option(min=1, help="Larger images count as problems.")] = MAX_PIXELS,
) -> None:
    """Show a few pairs of shards, how many there are, how large, and what is wrong with some.

    Exit status 1 when no pair can be used.

    Example: `diffprune inspect 's3://bucket/laion/{00000..00999}.tar' --caption json:caption`
    """
    from pipeline.inspecting import first_problem, inspect_shards, print_inspection

    data = parse_config({"data": {"shards": shards, "caption": caption, "max_pixels": max_pixels}}).data
    found = inspect_shards(data, examples=examples)
    print_inspection(found, max_pixels=max_pixels)
    problem = first_problem(found)
    if problem is not None:
        raise problem


@app.command(rich_help_panel=BEFORE)
def plan(
    config: ConfigPath,
    set_: Overrides = None,
    out: Out = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say what a run will take: time, GPU hours, memory and storage of each stage, after a short calibration here.

    Nothing is written to the run's folder.

    Example: `diffprune plan my.yaml --set score.sample=0.05`
    """
    from pipeline.stages.planning import show_plan

    with _loaded(config, set_, out) as loaded:
        show_plan(loaded, as_json=json)


@app.command(rich_help_panel=BEFORE)
def estimators() -> None:
    """List the estimators: what they cost in passes per pair and checkpoint, and what they are good for.

    A tangent pass costs about three forward passes, or about two where many share one point (`tracin-self`, `grand`,
    `diff-in-self`). Loss and similarity come from the pass at the last checkpoint; `diff-in` and `random`, and with
    `score.method: forward` also `tracin` and `moso`, take one more forward pass for them. A utility is the score with
    the sign that makes higher mean keep.

    Example: `diffprune estimators`, then `diffprune run my.yaml --set score.estimator=tracin`
    """
    from rich.table import Table
    from rich.text import Text

    from pipeline.estimators import ESTIMATORS

    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("estimator", "passes", "needs", "good for"):
        table.add_column(heading, no_wrap=heading in ("estimator", "passes"))
    for facts in ESTIMATORS:
        table.add_row(facts.name, facts.passes, facts.needs, Text(facts.purpose))
    Console().print(table)


@app.command(rich_help_panel=BEFORE)
def demo(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Where the demo shards go.")] = "demo-data",
) -> None:
    """Write the demo data: scans of handwritten digits with captions, a recorded share of them wrong.

    Example: `diffprune demo demo-data`
    """
    from pipeline.data.demo import make_demo

    paths = make_demo(folder, seed=0)
    typer.echo(f"training shards: {paths.train}\ntarget shards:   {paths.target}\ntest shards:     {paths.test}")


@app.command(rich_help_panel=JOB)
def run(config: ConfigPath, set_: Overrides = None, out: Out = None, retry_failed: RetryFailed = False) -> None:
    """Run all stages; started again, a run goes on where it stopped.

    Example: `diffprune run my.yaml --set select.keep=0.5 --out runs/half`
    """
    from pipeline.stages import runner

    with _loaded(config, set_, out) as loaded:
        runner.run_all(loaded, retry_failed=retry_failed)


def _stage_command(name: str, description: str, panel: str = STAGES) -> None:
    def command(config: ConfigPath, set_: Overrides = None, out: Out = None) -> None:
        from pipeline.stages import runner

        with _loaded(config, set_, out) as loaded:
            runner.run_stage(name, loaded)

    app.command(name, help=description, rich_help_panel=panel)(command)


_stage_command("inventory", "Find the shards and count their pairs.\n\nExample: `diffprune inventory my.yaml`")
_stage_command(
    "train",
    "Train the proxy runs, or read the checkpoints given.\n\nExample: `diffprune train my.yaml --set proxy.runs=3`",
)
_stage_command(
    "directions",
    "Compute, per checkpoint, what every pair is scored along.\n\nExample: `diffprune directions my.yaml`",
)


@app.command(rich_help_panel=STAGES)
def score(config: ConfigPath, set_: Overrides = None, out: Out = None, retry_failed: RetryFailed = False) -> None:
    """Score every pair, shard by shard.

    Example: `diffprune score my.yaml --retry-failed`
    """
    from pipeline.stages import runner

    with _loaded(config, set_, out) as loaded:
        runner.run_stage("score", loaded, retry_failed=retry_failed)


@app.command(rich_help_panel=STAGES)
def select(
    config: ConfigPath,
    set_: Overrides = None,
    out: Out = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be kept; write nothing.")] = False,
) -> None:
    """Choose the pairs to keep from finished scores; never rescores.

    Example: `diffprune select my.yaml --set select.name=half --set select.keep=0.5 --dry-run`
    """
    from pipeline.stages import looking, runner

    with _loaded(config, set_, out) as loaded:
        if dry_run:
            looking.show_plan(loaded)
        else:
            runner.run_stage("select", loaded)


_stage_command(
    "emit",
    "Write manifests, uid lists, the training command and, if asked for, pruned tars.\n\n"
    "Example: `diffprune emit my.yaml --set emit.materialize=true`",
)
_stage_command("report", "Write the report page.\n\nExample: `diffprune report my.yaml`")


@app.command(rich_help_panel=AFTER)
def status(run: Run) -> None:
    """How far a run is, from its files alone: works from any machine, while it runs or after.

    Example: `diffprune status s3://bucket/runs/mine`
    """
    from pipeline.engine.status import print_status

    print_status(run)


@app.command(rich_help_panel=AFTER)
def show(
    run: Run,
    uid: Annotated[str, typer.Argument(metavar="UID", help="A pair's uid, or a unique prefix of it.")],
    neighbours: Annotated[int, typer.Option(min=0, help="Nearest pairs to list, where embeddings were stored.")] = 5,
    image: Annotated[str | None, typer.Option(metavar="FILE", help="Write the pair's image here.")] = None,
) -> None:
    """Explain one pair: image, caption, terms per checkpoint, rank, nearest neighbours, why it was kept or not.

    Example: `diffprune show runs/demo 3f9a --image pair.jpg`
    """
    from pipeline.showing import print_story, tell

    print_story(tell(run, uid, neighbours=neighbours), image=image)


@app.command(rich_help_panel=AFTER)
def compare(
    run: Run,
    first: Annotated[str, typer.Argument(metavar="A", help="A selection's name.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another selection's name.")],
) -> None:
    """Overlap of two selections of a run, and where they differ.

    Example: `diffprune compare runs/mine default half`
    """
    from pipeline.stages.looking import show_comparison

    show_comparison(run, first, second)


@app.command(rich_help_panel=AFTER)
def verify(run: Run) -> None:
    """Check what a run wrote against itself; exit status 1 and the reasons if anything is off.

    Example: `diffprune verify runs/mine`
    """
    from pipeline.emit.verify import verify as find_problems
    from pipeline.text import plural

    problems = find_problems(run)
    for problem in problems:
        typer.echo(problem)
    if problems:
        typer.echo(f"{plural(len(problems), 'problem')} found in {run}", err=True)
        raise typer.Exit(1)
    typer.echo(f"{run}: all files are consistent")


_stage_command(
    "evaluate",
    "Train on the kept pairs and on baselines of the same size, over several seeds.\n\n"
    "Example: `diffprune evaluate my.yaml --set evaluate.seeds=5`",
    TRUST,
)
_stage_command(
    "validate",
    "Measure how far the scores can be trusted, by retraining.\n\n"
    "Example: `diffprune validate my.yaml --set validation.halves=128`",
    TRUST,
)


def main() -> None:
    """Entry point of the `diffprune` command."""
    leave(invoke(sys.argv[1:]))


def leave(status: int) -> NoReturn:
    """End the process with this status, and at once.

    Threads of Arrow may still hold a file of Python's, and to let go of it while the interpreter shuts down aborts the
    process (status 134 in place of 0, now and then). Nothing is left to that shutdown: Ray and trackers are closed.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # whoever reads it may be gone
            stream.flush()
    os._exit(status)


def invoke(arguments: list[str]) -> int:
    """Run one command line and return its exit status (contract: 0 complete, 2 config or usage, 130 Ctrl-C, 1 else)."""
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        result: Any = app(arguments, prog_name="diffprune", standalone_mode=False)
    except DiffpruneError as error:
        errors.print(f"[bold red]error:[/] {escape(str(error))}")
        return error.exit_status
    except (KeyboardInterrupt, typer.Abort):
        result = INTERRUPTED
    except Exception as error:
        raised = getattr(error, "cause", None) or error  # in a task of Ray, maybe
        if _is_of_storage(raised):
            message = " ".join(f"{type(raised).__name__}: {raised}".split())
            errors.print(f"[bold red]error:[/] storage: {escape(message)}")
            return 1
        if not isinstance(error, _USAGE_ERROR):
            raise
        message = " ".join(error.format_message().split())
        if message:  # empty when the help was asked for by giving no command
            errors.print(f"[bold red]error:[/] {escape(message)} (see `{_command_path(error)} --help`)")
        return 2
    if result == INTERRUPTED:  # typer makes this status of a KeyboardInterrupt
        errors.print("stopped; the same command goes on from here")
    return result if isinstance(result, int) else 0


#: The base of typer's usage errors; typer may bring its own copy of click, so click's class is not it.
_USAGE_ERROR: Any = typer.BadParameter.__mro__[1]


#: Packages whose errors are about storage that cannot be reached or used.
_STORAGE = {"aiobotocore", "aiohttp", "botocore", "gcsfs", "google"}


def _is_of_storage(error: Exception) -> bool:
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _STORAGE


def _command_path(error: Any) -> str:
    context = getattr(error, "ctx", None)
    return str(context.command_path) if context is not None else "diffprune"


if __name__ == "__main__":
    main()
