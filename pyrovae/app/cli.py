"""The command line: train, evaluate, sample, report, compare, export, new, list.

What stands here is what a user may write. A command imports its work when it begins, so that help, completion and
complaints take no longer than they must.
"""

from __future__ import annotations

import glob
import os
import re
import sys
import traceback
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pyrovae import __version__
from pyrovae.app.process import Patient, Stop, at_once, keep_freed_memory
from pyrovae.app.settings import Settings, parse_settings
from pyrovae.app.several import several
from pyrovae.arguments import MOST, one_line
from pyrovae.data.names import DATASETS
from pyrovae.errors import INTERRUPTED, exit_code
from pyrovae.models import MODELS
from pyrovae.objectives import OBJECTIVES

app = typer.Typer(
    help="Variational autoencoders as Pyro programs: train a pair, measure log p(x), swap the objective.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console(soft_wrap=True, markup=False, emoji=False)  # what users name things is printed as it is
DataDir = Annotated[str | None, typer.Option(help="Folder of the data sets; else $PYROVAE_DATA, else a cache folder.")]
Device = Annotated[str, typer.Option(help='"auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", ...')]
Checkpoint = Annotated[str, typer.Option(help='"last" or "best".', autocompletion=lambda: ["last", "best"])]
Trust = Annotated[
    bool, typer.Option("--trust", help="Import the class that the run names, though it is not pyrovae's.")
]
Override = Annotated[bool, typer.Option("--override", help="Go on with a warning where the run's files were changed.")]
SampleSeed = Annotated[int, typer.Option(help="Of the samples.", min=0, max=MOST)]


def data_names() -> list[str]:
    """What a shell completes: a path follows after a colon."""
    return [name.removesuffix("PATH") for name in DATASETS]


def run_names(incomplete: str) -> list[str]:
    """What a shell completes: the runs under runs/, and any folder as it is written."""
    written = [*glob.glob("runs/*/"), *glob.glob(f"{glob.escape(incomplete)}*/")]
    return sorted({name.rstrip("/") if Path(name, "config.json").is_file() else name for name in written})


RunFolder = Annotated[Path, typer.Argument(help="Folder of a run.", autocompletion=run_names)]


def say_version(wanted: bool) -> None:
    """Print the version, and end."""
    if wanted:
        out.print(f"pyrovae {__version__}")
        raise typer.Exit


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks (anywhere on the line).")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=say_version)
    ] = False,
) -> None:
    """What every command takes; ``main`` reads it before any command runs."""


@app.command()
def train(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help='A model (see "pyrovae list"), or my_module:MyPair, your own class.', autocompletion=lambda: [*MODELS]
        ),
    ] = "vae",
    data: Annotated[
        str,
        typer.Option(help='A data set (see "pyrovae list"), folder:PATH or npz:PATH.', autocompletion=data_names),
    ] = "digits",
    data_dir: DataDir = None,
    objective: Annotated[
        str, typer.Option(help='An objective (see "pyrovae list").', autocompletion=lambda: [*OBJECTIVES])
    ] = "elbo",
    particles: Annotated[
        int | None, typer.Option(help="Particles per datum (per group); the objective's default.")
    ] = None,
    groups: Annotated[int | None, typer.Option(help="Groups of particles (miwae, piwae).")] = None,
    latent_dim: Annotated[int | None, typer.Option(help="Latent units; the model's default.")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training data.")] = 200,
    batch_size: Annotated[int, typer.Option(help="Data per step.")] = 100,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 1e-3,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Of everything random.", min=0, max=MOST)] = 0,
    run_dir: Annotated[
        Path | None, typer.Option(help="Folder of the run; a new one under runs/ by default.", autocompletion=run_names)
    ] = None,
    samples: Annotated[int, typer.Option(help="Samples per test datum of the final NLL.")] = 5000,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    processes: Annotated[
        int, typer.Option(help="On this machine, which share every batch; torchrun starts them on many.", min=1)
    ] = 1,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write every epoch into the run, for tensorboard --logdir runs.")
    ] = False,
    trust: Trust = False,
    override: Override = False,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Any other argument of model, objective, training or data, in JSON."
        ),
    ] = None,
) -> None:
    """Train a model, measure its test NLL and active units, and draw pictures, all into runs/NAME.

    With neither model nor data named: a VAE on the embedded digits in whose samples one reads digits, with 4 latent
    units, hidden layers [64, 64] and a rate that falls from 0.01 (schedule "cosine") where nothing else is given.
    """
    how = ("run_dir", "resume", "processes", "tensorboard", "trust", "override", "set_")
    given = {k: v for k, v in context.params.items() if k not in how}
    explicit = {k for k in given if getattr(context.get_parameter_source(k), "name", "DEFAULT") != "DEFAULT"}
    job = Settings(**given, settings=parse_settings(set_ or [])).by_default(explicit)
    job.check_names()
    if processes > 1 and os.environ.get("WORLD_SIZE") != str(processes):
        raise typer.Exit(several(processes, context.obj))
    explicit |= {"settings"} if set_ else set()
    with at_once():
        from pyrovae.app import train as work
        from pyrovae.app.job import Terms
    work.train(
        job, run_dir=run_dir, resume=resume, explicit=explicit, tensorboard=tensorboard, terms=Terms(trust, override),
        out=out,
    )  # fmt: skip


@app.command()
def evaluate(
    run: RunFolder,
    samples: Annotated[int, typer.Option(help="Importance samples per test datum.")] = 5000,
    checkpoint: Checkpoint = "last",
    data_dir: DataDir = None,
    device: Device = "auto",
    seed: SampleSeed = 0,
    ais: Annotated[bool, typer.Option("--ais", help="Anneal 100 of the test data as well.")] = False,
    diagnostics: Annotated[
        bool, typer.Option("--diagnostics", help="What each unit carries, and where the bound is lost.")
    ] = False,
    trust: Trust = False,
    override: Override = False,
) -> None:
    """Measure a run's test NLL with its standard error, and its active units; writes results.json."""
    with at_once():
        from pyrovae.app import measure as work
        from pyrovae.app.job import Terms
    work.evaluate(
        run, samples=samples, checkpoint=checkpoint, root=data_dir, device=device, seed=seed, ais=ais,
        diagnostics=diagnostics, terms=Terms(trust, override), out=out,
    )  # fmt: skip


@app.command()
def sample(
    run: RunFolder,
    number: Annotated[int, typer.Option("--number", "-n", help="How many.")] = 64,
    draws: Annotated[bool, typer.Option("--draws", help="Draw x too, instead of giving its mean.")] = False,
    label: Annotated[
        str | None, typer.Option(help="Of a conditional model: a class, or attributes as 0.5,-1; else all classes.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of the latents; below 1 keeps to the prior's modes.")] = 1.0,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A .png, .npz or .csv; samples-SEED.png (of no images: .npz) in the run."),
    ] = None,
    checkpoint: Checkpoint = "last",
    seed: SampleSeed = 0,
    trust: Trust = False,
    override: Override = False,
) -> None:
    """Draw new data from a run's model, into a picture (.png), arrays (.npz) or a table (.csv)."""
    with at_once():
        from pyrovae.app import samples as work
        from pyrovae.app.job import Terms
    work.sample(
        run, number=number, draws=draws, label=label, temperature=temperature, output=output, checkpoint=checkpoint,
        seed=seed, terms=Terms(trust, override), out=out,
    )  # fmt: skip


@app.command()
def report(
    run: RunFolder,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The page; report.html in the run.")] = None,
    checkpoint: Checkpoint = "last",
    data_dir: DataDir = None,
    device: Device = "auto",
    trust: Trust = False,
) -> None:
    """Write a page about a run, which needs no network: likelihood, curves, pictures, a latent space to explore."""
    with at_once():
        from pyrovae.app.report import command as work
    work.report_of(run, output=output, checkpoint=checkpoint, root=data_dir, device=device, trust=trust, out=out)


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.", autocompletion=run_names)],
    html: Annotated[bool, typer.Option("--html", help="Write a page, with curves laid over each other.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page; compare.html in the folder that the runs lie in.")
    ] = None,
    override: Override = False,
) -> None:
    """Put the results of several runs side by side in one table, and their curves on one page."""
    with at_once():
        from pyrovae.app import tables as work
        from pyrovae.runs import COMPARED, Run
    # where runs/* is written, the page of an earlier call is named as well
    named = [folder for folder in folders if folder.name != COMPARED or folder.is_dir()] or folders
    compared = [Run(folder, override=override) for folder in named]
    work.compare(compared, out, strict=not (html or output))
    if html or output:
        with at_once():
            from pyrovae.app.report import command as pages
        pages.compare(compared, output=output, out=out)


@app.command()
def export(
    run: RunFolder,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of encoder.onnx and decoder.onnx; that of the run.")
    ] = None,
    checkpoint: Checkpoint = "last",
    trust: Trust = False,
    override: Override = False,
) -> None:
    """Write encoder and decoder of a run as ONNX, for any batch size, each checked against the model."""
    with at_once():
        from pyrovae.app import export as work
        from pyrovae.app.job import Terms
    work.export(run, output=output, checkpoint=checkpoint, terms=Terms(trust, override), out=out)


@app.command()
def new(
    path: Annotated[Path, typer.Argument(metavar="FILE.py", help="The file to write, such as my_model.py.")],
    table: Annotated[bool, typer.Option("--table", help="For the rows of a table; else for images.")] = False,
) -> None:
    """Write a commented pair of your own into a file, which trains at once: pyrovae train my_model:MyPair."""
    from pyrovae.app import new as work

    work.new(path, table=table, out=out)


@app.command(name="list")
def list_() -> None:
    """What there is: models, objectives and data sets, with one line each."""
    with at_once():
        from pyrovae.app import tables as work
    work.catalogue(out)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: the exit codes of :mod:`pyrovae.errors`, one line for an error and no traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    keep_freed_memory()
    printed, said = Patient(sys.stdout), Patient(sys.stderr)
    with Stop().listening() as stop, redirect_stdout(printed), redirect_stderr(said):  # type: ignore[type-var]
        try:
            with warnings.catch_warnings():
                warnings.showwarning = print_warning
                refuse_empty(arguments)
                again = [*arguments, *["--debug"] * debug]
                code = app(arguments, prog_name="pyrovae", standalone_mode=False, obj=again) or 0
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except Exception as error:
            code = answer(error, debug)
        if code == INTERRUPTED or stop.number:  # some releases of typer return the code, others raise
            code = fail(f"{stop.word}{'; go on with --resume' if 'train' in arguments else ''}", stop.code)
        if code == 0 and printed.lost:
            code = fail(f"standard output could not be written ({printed.lost.strerror}); all else is done", 6)
    sys.exit(code)


def refuse_empty(arguments: list[str]) -> None:
    """Refuse "", which most often is a shell's variable that was never set, and as a path would be this folder."""
    if empty := [i for i, argument in enumerate(arguments) if re.fullmatch("(--[^=]*=)?", argument)]:
        words = " ".join(arguments[: empty[0] + 1])
        raise ValueError(f'an argument is empty, got "pyrovae {words}": write it, or leave the option out')


def answer(error: Exception, debug: bool) -> int:
    """Say what went wrong; the exit code."""
    if type(error).__name__ == "NoArgsIsHelpError":
        return 2  # the help is on the screen already
    if debug:
        traceback.print_exc()
    if type(error).__name__ == "ElsewhereError" or getattr(error, "told", False):
        return exit_code(error)  # another process of the job says it
    if hasattr(error, "format_message"):  # typer's own: an unknown option, a value of the wrong type
        return fail(error.format_message(), getattr(error, "exit_code", 2))
    code = exit_code(error)
    what, *frames = re.split(r"\n?Exception raised from|\n?frame #0:", str(error))  # torch's, in C++
    what = re.sub(
        r"\[enforce fail.*tried to allocate (\d+) bytes.*", r"\1 bytes of memory were asked for in vain", what
    )
    unknown = code == 1 or frames or not what
    what = f"{type(error).__name__}: {what}; --debug shows where" if unknown else what
    return fail(" ".join([what, *getattr(error, "__notes__", ())]), code)


def print_warning(message: Warning | str, *_: object, **__: object) -> None:
    """A warning as one line, without the source line that gave it."""
    print("warning: " + one_line(message, longest=None), file=sys.stderr)


def fail(what: str, code: int) -> int:
    """An error as one line; the exit code."""
    print("error: " + one_line(what, longest=None), file=sys.stderr)
    return code
