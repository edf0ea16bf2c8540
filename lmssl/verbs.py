"""Training and what comes after it; like the verbs of `cli`, they import what they need inside their functions."""

from __future__ import annotations

import gc
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from lmssl.errors import RecipeError

ExportAverage = Annotated[int, typer.Option("--average", min=1, help="Average the weights of so many checkpoints.")]
ExportDtype = Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")]
ExportEma = Annotated[bool, typer.Option("--ema", help="Export the moving average that train.ema_decay kept.")]
ExportStep = Annotated[int | None, typer.Option("--step", help=r"Which checkpoint. \[default: the newest]")]
ShardSize = Annotated[str, typer.Option("--max-shard-size", help="Of one file of weights, such as 500MB.")]
License = Annotated[str | None, typer.Option("--license", help="For the card, in the Hub's words: apache-2.0, mit.")]


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE", help="A recipe file; shipped ones begin with recipes/. Without one: --from-checkpoint's."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to it, such as optim.lr=3e-4.")
    ] = None,
    from_checkpoint: Annotated[
        str | None, typer.Option(metavar="RUN[@STEP]", help="Begin at a checkpoint of another run, in a new folder.")
    ] = None,
    decay: Annotated[bool, typer.Option("--decay", help="From there on, let the learning rate fall.")] = False,
    decay_tokens: Annotated[
        float | None, typer.Option(min=1, help=r"Over so many tokens. \[default: by schedule.decay_ratio]")
    ] = None,
) -> None:
    """Pretrain; the same command continues an interrupted run."""
    from lmssl.recipe.load import load_recipe
    from lmssl.shipped import find
    from lmssl.train.launcher import Launcher, same_on_all_ranks

    launcher = Launcher()
    given = overrides or []
    if recipe is not None and from_checkpoint is not None and re.match(r"[a-z_]+[\w.]*=", recipe):
        given, recipe = [recipe, *given], None
    if from_checkpoint is not None and (decay or decay_tokens is not None):
        from lmssl.train.branch import branch_recipe

        tokens = None if decay_tokens is None else int(decay_tokens)
        path = None if recipe is None else find(Path(recipe))
        loaded = branch_recipe(
            from_checkpoint,
            recipe=path,
            overrides=given,
            decay_tokens=tokens,
            decide=lambda newest: same_on_all_ranks("step of --from-checkpoint", newest, os.environ),
        )
    elif from_checkpoint is not None or decay or decay_tokens is not None:
        raise RecipeError(
            "--from-checkpoint and --decay belong together",
            where="lmssl train",
            remedy="write --from-checkpoint RUN@STEP --decay; to begin a new run with its weights: model.from=RUN",
        )
    elif recipe is None:
        raise RecipeError("there is no recipe", where="lmssl train", remedy="write lmssl train RECIPE")
    else:
        loaded = load_recipe(find(Path(recipe)), given)  # a wrong recipe is refused before torch is imported

    if loaded.recipe.data.workers:
        from lmssl.data import fork_server

        fork_server.start()
    _imported()(loaded, launcher)


def _imported() -> Callable[..., Path]:
    """The function that trains; imported without garbage collection, a fifth of the time that torch and others take."""
    gc.disable()
    try:
        from lmssl.train.run import train

        return train
    finally:
        gc.freeze()  # later collections need not look at a million imported objects
        gc.enable()


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, such as runs/gpt-10m.")],
    step: ExportStep = None,
    out: Annotated[
        Path | None, typer.Option(help=r"Folder to write. \[default: RUN/export, or RUN/export-ema]")
    ] = None,
    ema: ExportEma = False,
    average: ExportAverage = 1,
    dtype: ExportDtype = "float32",
    max_shard_size: ShardSize = "5GB",
    gguf: Annotated[bool, typer.Option("--gguf", help="Also write a file for llama.cpp.")] = False,
    onnx: Annotated[bool, typer.Option("--onnx", help="Also write a file for onnxruntime.")] = False,
) -> None:
    """Write a checkpoint as a folder that stock Auto classes load, proven equal in a fresh process."""
    from lmssl.export import ExportWeights, export_run

    weights = ExportWeights(ema, average, dtype)
    export_run(
        run,
        step,
        out or run / ("export-ema" if ema else "export"),
        weights=weights,
        max_shard_size=max_shard_size,
        gguf=gguf,
        onnx=onnx,
        private=_private_words(),
    )


def push(
    source: Annotated[Path, typer.Argument(metavar="DIR|RUN", help="An export, or a run folder.")],
    repo: Annotated[str, typer.Option(metavar="ORG/NAME", help="The repository; it is made if there is none.")],
    public: Annotated[bool, typer.Option("--public", help="Let everybody see it; without, it is private.")] = False,
    license: License = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be uploaded.")] = False,
    revisions: Annotated[
        str | None, typer.Option(metavar="TEMPLATE", help="Also push every checkpoint of a run: step{step}.")
    ] = None,
    step: ExportStep = None,
    ema: ExportEma = False,
    average: ExportAverage = 1,
    dtype: ExportDtype = "float32",
    max_shard_size: ShardSize = "5GB",
    token: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Upload an export, or the checkpoints of a run, to the Hugging Face Hub; repeated, it goes on where it stopped."""
    from lmssl.push.run import Push, refuse_token
    from lmssl.push.run import push as run

    refuse_token(token)
    wanted = Push(source, repo, public, license, dry_run, revisions, step, ema, average, dtype, max_shard_size)
    run(wanted, sleep=time.sleep, private=_private_words(), report=typer.echo)


def verify(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, such as runs/gpt-10m.")],
) -> None:
    """Read every checkpoint of a run in full, and name the damaged ones."""
    from lmssl.checkpoint.verify import verify as run_verify

    run_verify(run, typer.echo)


def _private_words() -> tuple[str, ...]:
    """What tells of this machine and who uses it."""
    import getpass
    import platform

    from lmssl.release.private import private_words

    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a number without a name, as containers have
        user = ""
    return private_words(home=Path.home(), working=Path.cwd(), host=platform.node(), user=user)
