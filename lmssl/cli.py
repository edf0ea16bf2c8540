"""The verbs. Each imports what it needs inside its function, so that `--help` and `show` answer at once."""

from __future__ import annotations

import errno
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from lmssl import __version__
from lmssl.errors import LmsslError, Preempted, RecipeError
from lmssl.output import complain, silence
from lmssl.train.signals import noted_interrupts
from lmssl.verbs import export, push, train, verify

INTERRUPTED = 130
BROKEN_PIPE = 141
_FULL = (errno.ENOSPC, errno.EDQUOT)

# Typer brings its own copy of click from 0.26 on, so only what typer itself names is the same class everywhere.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]

app = typer.Typer(
    name="lmssl",
    help="Self-supervised pretraining of language models, native to the Hugging Face ecosystem.",
    epilog="Start with `lmssl demo`: minutes on a laptop, no download.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeArgument = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A recipe file; shipped ones begin with recipes/.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to it, such as optim.lr=3e-4.")
]

ModelArgument = Annotated[
    Path, typer.Argument(metavar="MODEL_OR_RUN", help="A transformers folder, or a run folder such as runs/gpt-10m.")
]
Ema = Annotated[bool, typer.Option("--ema", help="Of a run, the moving average that train.ema_decay kept.")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"lmssl {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; so does LMSSL_DEBUG=1.")] = False,
) -> None:
    # `main` takes --debug out of the arguments before they come here; it stands here for the help.
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def demo(
    out: Annotated[
        Path | None, typer.Option(help=r"Run folder. \[default: the first free one of runs/demo, runs/demo-2, ...]")
    ] = None,
) -> None:
    """Pretrain a small model on Python's own documentation, export it and let it speak."""
    from lmssl.demo import run_demo

    run_demo(out)


@app.command()
def tokenizer(
    build: Annotated[Path, typer.Argument(metavar="BUILD", help="A build file, such as tokenizer/bpe-4k/build.yaml.")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help=r"Folder to write. \[default: tokenizer/<name>]")] = None,
) -> None:
    """Train a tokenizer and write it as a folder that AutoTokenizer reads."""
    from lmssl.data.corpus import read_texts
    from lmssl.recipe.load import load_section
    from lmssl.shipped import find
    from lmssl.tokenizer.load import load_tokenizer
    from lmssl.tokenizer.train import TokenizerBuild, build_tokenizer

    section = load_section(TokenizerBuild, find(build), overrides or ())
    texts = read_texts(section.mixture, max_bytes=section.sample_bytes, max_document_bytes=section.max_document_bytes)
    folder = build_tokenizer(section, texts, out or Path("tokenizer") / section.name)
    typer.echo(f"{folder}: {load_tokenizer(folder).num_tokens:,} tokens")


@app.command()
def extend_tokenizer(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A tokenizer folder, such as tokenizer/bpe-16k.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    token: Annotated[
        list[str] | None, typer.Option(help="A token that text gives wherever it stands in it; may be repeated.")
    ] = None,
    special: Annotated[
        list[str] | None, typer.Option(help="A control token, which text never gives; may be repeated.")
    ] = None,
) -> None:
    """Write a copy of a tokenizer that knows further tokens, for continuing a model: see docs/training.md."""
    from lmssl.shipped import find
    from lmssl.tokenizer.extension import extend_tokenizer as extend

    extended = extend(find(folder), out, tokens=token or (), special=special or ())
    typer.echo(f"{out}: {extended.num_tokens:,} tokens")


@app.command()
def prepare(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help=r"Cores to use. \[default: all, divided among launched ranks]")
    ] = None,
) -> None:
    """Tokenize the corpora of a recipe into the cache; under accelerate launch or torchrun all ranks share the work."""
    from rich.console import Console

    from lmssl.prepare import prepare as run
    from lmssl.recipe.load import load_recipe
    from lmssl.shipped import find

    loaded = load_recipe(find(recipe), overrides or ())
    rank, world_size, local = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1))
    )
    console = Console(soft_wrap=True, highlight=False) if rank == 0 else None
    began = time.monotonic()
    found = run(
        loaded.recipe,
        rank=rank,
        world_size=world_size,
        workers=workers or max(1, (os.cpu_count() or 1) // local),
        clock=time.monotonic,
        report=typer.echo,
        console=console,
    )
    seconds = time.monotonic() - began
    if console is not None:
        console.print(
            f"{found.num_chunks:,} chunks, {found.num_documents:,} documents, {found.num_tokens:,} tokens "
            f"({found.num_bytes / 1e6:,.1f} MB of text); {found.num_built:,} chunks built by this process group in "
            f"{seconds:,.1f} s, {found.built_tokens / seconds / 1e6:.2f} M tokens/s"
        )


app.command()(train)


@app.command()
def show(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    model: Annotated[
        bool, typer.Option("--model", help="Build the real model, without weights, and count it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print a recipe in full: every value with its origin, and the numbers that follow."""
    from lmssl import show as shown
    from lmssl.recipe.load import load_recipe
    from lmssl.shipped import find

    loaded = load_recipe(find(recipe), overrides or ())
    numbers, counts = shown.derived_numbers(loaded.recipe), None
    if model:
        number, counts = shown.built_model(loaded.recipe)
        numbers.append(number)
    typer.echo((shown.as_json if as_json else shown.as_text)(loaded, numbers, counts))


@app.command()
def data(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    position: Annotated[
        int | None, typer.Option(help="Print the sequence at a position, and where it is from.")
    ] = None,
    step: Annotated[int | None, typer.Option(help="Print the sequences of a training step, from 0.")] = None,
    text: Annotated[
        str | None, typer.Option("--find", metavar="TEXT", help="Say which positions hold documents with a text.")
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Count the first epoch; tokenizes all of it.")] = False,
    count: Annotated[int | None, typer.Option(help=r"Sequences to print. \[default: 1, or the step's batch]")] = None,
    split: Annotated[
        str,
        typer.Option(help="train, validation (held-out sequences) or one of validation.sets; --position counts in it."),
    ] = "train",
    limit: Annotated[int, typer.Option(help="Documents that --find lists.")] = 20,
    full: Annotated[bool, typer.Option("--full", help="Print texts in full.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")] = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="PAGE", help="With --stats: write them as an HTML page as well.")
    ] = None,
) -> None:
    """Show the data of a run: any position or step with its sources, where a text is, what an epoch holds."""
    from lmssl.recipe.load import load_recipe
    from lmssl.shipped import find
    from lmssl.trace import Question, answer

    loaded = load_recipe(find(recipe), overrides or ())
    answer(loaded.recipe, Question(position, step, text, stats, count, split, limit, full, as_json, html))


@app.command()
def schema(
    out: Annotated[Path | None, typer.Option(help=r"File to write. \[default: print it]")] = None,
) -> None:
    """Write the JSON Schema of a recipe, which lets editors complete and check recipes."""
    from lmssl.recipe.schema import schema_text

    if out is None:
        typer.echo(schema_text(), nl=False)
        return
    try:
        out.write_text(schema_text(), encoding="utf-8")
    except OSError as error:
        raise LmsslError(
            f"the schema cannot be written: {error.strerror}", where=str(out), remedy="choose another --out"
        ) from error


@app.command()
def finetune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="An export, or a model on the Hub.")],
    task: Annotated[Path, typer.Argument(metavar="TASK", help="A task file (.yaml), or a file of labelled rows.")],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help=r"Folder of the results. \[default: runs/finetune/TASK-MODEL]")
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Take only the architecture, to see what pretraining is worth.")
    ] = False,
) -> None:
    """Fine-tune a model on labelled data with transformers' Trainer: several seeds, median, majority baseline."""
    from rich.console import Console

    from lmssl.finetune import protocol

    loaded = protocol.task_of(task, overrides or ())
    folder = out or protocol.default_out(model, loaded, random_weights=random_weights)
    results = protocol.finetune(
        model, loaded, folder, random_weights=random_weights, show_progress=sys.stderr.isatty(), report=typer.echo
    )
    protocol.print_table(results, Console())
    typer.echo(f"results: {folder / protocol.RESULTS}; the best model: {folder / protocol.MODEL}")


app.command()(export)
app.command()(push)
app.command()(verify)


@app.command(name="eval")
def evaluate(
    model: ModelArgument,
    suite: Annotated[
        Path | None, typer.Option(help=r"What to ask: see docs/evaluate.md. \[default: a run's own held-out text]")
    ] = None,
    step: Annotated[int | None, typer.Option(help=r"Which checkpoint of a run. \[default: the newest]")] = None,
    out: Annotated[Path | None, typer.Option(help="Add the results to this file, too, as JSON lines.")] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a forward, padding included.")] = 8192,
    bf16: Annotated[bool, typer.Option("--bf16", help="Matrix products in bfloat16: faster, less exact.")] = False,
    ema: Ema = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one result a line.")] = False,
) -> None:
    """Evaluate a model or run: loss, minimal pairs, multiple choice, lm-eval tasks, samples; results join the run."""
    from lmssl.evaluate.command import Order, evaluate_now
    from lmssl.train.launch import launched

    order = Order(model, suite, step, out, batch_tokens, bf16, ema)
    with launched() as accelerator:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        evaluate_now(order, accelerator, time=now, as_json=as_json)


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What is continued, or filled where a mask stands.")],
    step: Annotated[int | None, typer.Option(help=r"Which checkpoint of a run. \[default: the newest]")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest continuation.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1, help="Draw among the likeliest tokens of this share.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=1, help="Candidates for each mask.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    ema: Ema = False,
) -> None:
    """Let a model continue a prompt, fill its masks, or fill T5's sentinels."""
    from lmssl.evaluate.generate import Sampling, look
    from lmssl.evaluate.subject import open_subject

    subject = open_subject(model, step=step, ema=ema)
    typer.echo(look(subject, prompt, Sampling(max_new_tokens, temperature, top_p, seed), top_k=top_k))


def main(arguments: list[str] | None = None) -> int:
    """Run a verb; returns the exit code of the process."""
    # Looking for pydantic plugins reads the metadata of every installed package, a tenth of what `show` takes.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given or os.environ.get("LMSSL_DEBUG", "") not in ("", "0")
    with noted_interrupts() as noted:
        return _guarded(lambda: _run([argument for argument in given if argument != "--debug"]), debug, noted)


def _run(arguments: list[str]) -> int:
    # Not through `app()`, whose own handling of interrupts, pipes and mistakes would come first.
    command = typer.main.get_command(app)
    code = 0
    try:
        with command.make_context("lmssl", arguments) as context:
            command.invoke(context)
    except typer.Exit as leave:
        code = leave.exit_code
    sys.stdout.flush()
    return code


def _guarded(run: Callable[[], int], debug: bool, noted: list[int]) -> int:
    try:
        return run()
    except LmsslError as error:
        if debug:
            traceback.print_exc()
        else:
            _complain("stopped" if isinstance(error, Preempted) else "error", str(error))
        return error.exit_code
    except UsageError as error:
        _complain("error", _usage(error))
        return RecipeError.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted(debug)
    except BrokenPipeError:
        silence(sys.stdout)  # the reader has left
        return BROKEN_PIPE
    except OSError as error:
        if debug or error.errno not in _FULL:
            raise
        where = str(error.filename or "the output, or a file that this verb writes")
        remedy = "free space there, and give the command again; --debug shows what was being written"
        told = LmsslError(f"nothing more can be written: {error.strerror}", where=where, remedy=remedy)
        _complain("error", str(told))
        silence(sys.stdout)  # or Python would try once more at exit
        return LmsslError.exit_code
    except Exception as error:
        if not noted:
            raise
        shown = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return _interrupted(debug, f"; then {shown} (--debug shows where)")


def _interrupted(debug: bool, then: str = "") -> int:
    if debug:
        traceback.print_exc()
    _complain("interrupted", f"by the keyboard{then}")
    return INTERRUPTED


def _complain(label: str, text: str) -> None:
    rank = os.environ.get("RANK", "0")
    who = f"[rank {rank}] " if rank != "0" else ""
    coloured = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    shown = typer.style(f"{label}:", fg="red", bold=True) if coloured else f"{label}:"
    complain(f"{who}{shown} {text}")


def _usage(error: Any) -> str:
    """A mistake on the command line in the same three parts as every other error."""
    first, _, hint = error.format_message().split("\n")[0].rstrip(".").partition(" Did you mean ")
    first, _, options = first.partition(" (Possible options: ")
    hint = hint or (f"{options.rstrip(')')}?" if options else "")
    what = first[:1].lower() + first[1:].rstrip(".")
    verb = error.ctx.command_path if error.ctx is not None else "lmssl"
    remedy = f"did you mean {hint}" if hint else f"see `{verb} --help`"
    option = getattr(error, "option_name", None) or ""
    if "." in option:
        remedy = f"overrides have no dashes: {option.lstrip('-')}=VALUE"
    return str(LmsslError(what, where=verb, remedy=remedy))
