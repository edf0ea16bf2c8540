"""`lmssl finetune`: the whole protocol, one line per finished run, results as JSON and as a table."""

from __future__ import annotations

import json
import os
import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lmssl.errors import ExportError, TrainingError
from lmssl.finetune.rows import read_rows
from lmssl.finetune.scores import better, require_libraries
from lmssl.finetune.task import TaskFile, implied_task, load_task
from lmssl.shipped import find

RUNS, RESULTS, TASK, MODEL = "runs.jsonl", "results.json", "task.json", "model"
VERSIONS = ("lmssl", "transformers", "torch", "scikit-learn", "scipy")


def finetune(
    model: str,
    task: TaskFile,
    out: Path,
    *,
    random_weights: bool = False,
    show_progress: bool = False,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Fine-tune a model at every rate and seed of a task; returns what `results.json` holds.

    The same call continues what was interrupted: finished runs are not repeated.

    Args:
        model: a transformers folder, or an id on the Hub.
        out: folder for results and, in `model/`, the best of the runs by the validation rows.
        random_weights: take only the architecture; what pretraining is worth is the difference.
    Raises:
        LmsslError: a library is missing, or anything about the model, the rows or `out` is wrong.
        TrainingError: several processes, or a run that diverged.
    """
    require_libraries()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TrainingError("fine-tuning runs in one process", where="WORLD_SIZE", remedy="start it without a launcher")
    from lmssl.finetune.splits import read_splits

    splits = read_splits(task, report)  # wrong rows are refused before torch is imported

    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    from lmssl.finetune.run import Bench
    from lmssl.finetune.start import open_start

    disable_progress_bar()
    set_verbosity_error()
    start = open_start(model, random_weights=random_weights)
    asked = {"model": model, "random_weights": random_weights, "task": task.model_dump(mode="json")}
    asked |= {"weights": start.fingerprint(), "rows": splits.fingerprint()}  # paths may hold something else by now
    finished = _open(out, asked)
    bench = Bench(start, task, splits, out)
    baseline = bench.baseline()
    _announce(bench, report)
    for lr in task.protocol.lr:
        for seed in task.protocol.seeds:
            if any(row["lr"] == lr and row["seed"] == seed for row in finished):
                continue
            outcome, trained = bench.run(lr=lr, seed=seed, show_progress=show_progress)
            with _writing(out):
                if _is_best(asdict(outcome), finished, task.main_metric):
                    _save(trained, start.tokenizer, out)
                finished.append(asdict(outcome))
                with (out / RUNS).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(finished[-1]) + "\n")
            shown = "  ".join(f"{name} {value:.4f}" for name, value in outcome.scores["validation"].items())
            report(f"lr {lr:g}  seed {seed}  loss {outcome.train_loss:.4f}  {shown}  ({outcome.seconds:.1f} s)")
    results = asked | _summary(bench, finished, baseline)
    with _writing(out):
        (out / RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def _summary(bench: Any, runs: list[dict[str, Any]], baseline: dict[str, dict[str, float]]) -> dict[str, Any]:
    metric, splits = bench.task.main_metric, bench.splits
    return {
        "metric": metric,
        "labels": list(splits.labels),
        "num_rows": {"train": len(splits.train)} | {k: len(v) for k, v in splits.scored().items()},
        "num_cut_rows": {"train": bench.train.num_cut} | {k: v.num_cut for k, v in bench.scored.items()},
        "baseline": baseline,
        "runs": runs,
        "chosen": chosen(runs, metric, baseline["validation"][metric]),
        "versions": {name: version(name) for name in VERSIONS},
    }


def task_of(path: Path, overrides: Sequence[str]) -> TaskFile:
    """The task of a task file, or the one that a data file stands for.

    Raises:
        LmsslError: the file or an override is wrong.
    """
    if path.suffix in (".yaml", ".yml") or not path.exists():
        return load_task(find(path), overrides)
    _, row = next(read_rows(path), ("", {}))
    return implied_task(path, row, overrides)


def default_out(model: str, task: TaskFile, *, random_weights: bool) -> Path:
    """`runs/finetune/TASK-MODEL`, where an export is called as its run is."""
    parts = [part for part in Path(model).parts if not part.startswith("export") and part not in ("/", ".", "..")]
    name = f"{task.name}-{parts[-1] if parts else 'model'}"
    return Path("runs/finetune") / (f"{name}-random" if random_weights else name)


def chosen(runs: Sequence[dict[str, Any]], metric: str, baseline: float) -> dict[str, Any]:
    """The rate with the best median on the validation rows, and the spread over its seeds.

    `num_failed` counts its seeds that did not beat the baseline, as some do on small sets (Mosbach et al. 2021).
    """
    by_rate: dict[float, list[dict[str, Any]]] = {}
    for run in runs:
        by_rate.setdefault(run["lr"], []).append(run)
    middle = {lr: statistics.median(r["scores"]["validation"][metric] for r in rows) for lr, rows in by_rate.items()}
    best = next(iter(middle))
    for lr in middle:
        if better(metric, middle[lr], middle[best]):
            best = lr
    rows = by_rate[best]
    found: dict[str, Any] = {"lr": best, "num_seeds": len(rows)}
    for split in rows[0]["scores"]:
        found[split] = {
            name: _spread([row["scores"][split][name] for row in rows]) for name in rows[0]["scores"][split]
        }
    found["num_failed"] = sum(not better(metric, r["scores"]["validation"][metric], baseline) for r in rows)
    return found


def print_table(results: dict[str, Any], console: Console) -> None:
    """Medians over seeds for every rate, the baseline, and what was chosen."""
    metric, names = results["metric"], list(next(iter(results["baseline"].values())))
    splits = list(results["baseline"])
    task, kind = results["task"], "random weights of " if results["random_weights"] else ""
    title = f"{task['name']}: {kind}{results['model']}, median of {results['chosen']['num_seeds']} seeds (min-max)"
    table = Table(title=title, title_justify="left")
    table.add_column("lr")
    for split in splits:
        for name in names:
            table.add_column(f"{split} {name}", justify="right", style="bold" if name == metric else None)
    without = "untrained" if task["task"]["kind"] == "instructions" else "majority"
    table.add_row(without, *(f"{results['baseline'][split][name]:.4f}" for split in splits for name in names))
    for lr in dict.fromkeys(run["lr"] for run in results["runs"]):
        rows = [run for run in results["runs"] if run["lr"] == lr]
        mark = " *" if lr == results["chosen"]["lr"] and len(task["protocol"]["lr"]) > 1 else ""
        cells = [_cell(_spread([run["scores"][s][n] for run in rows])) for s in splits for n in names]
        table.add_row(f"{lr:g}{mark}", *cells)
    console.print(table)
    failed = results["chosen"]["num_failed"]
    if failed:
        console.print(f"{failed} of {results['chosen']['num_seeds']} seeds did not beat the baseline")


def _open(out: Path, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """Take the folder, or go on in it; returns the finished runs."""
    known = out / TASK
    with _writing(out):
        before = json.loads(known.read_text(encoding="utf-8")) if known.exists() else {}
        if before == asked:
            lines = (out / RUNS).read_text(encoding="utf-8").split("\n")[:-1] if (out / RUNS).exists() else []
            return [json.loads(line) for line in lines]
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            what = "results of another task, model or protocol" if known.exists() else "other files"
            if all(before.get(name) == asked[name] for name in ("model", "random_weights", "task")):
                changed = [name for name in ("weights", "rows") if before.get(name) != asked[name]]
                what = f"results of other {' and '.join(changed)}, which have changed since"
            raise ExportError(f"{out} holds {what}", where="--out", remedy="choose another folder or remove it")
        out.mkdir(parents=True, exist_ok=True)
        known.write_text(json.dumps(asked, indent=2) + "\n", encoding="utf-8")
    return []


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ExportError(
            f"the results cannot be written: {error.strerror}", where=str(out), remedy="choose another --out"
        ) from error


def _announce(bench: Any, report: Callable[[str], None]) -> None:
    splits, protocol = bench.splits, bench.task.protocol
    sizes = ", ".join(f"{len(v):,} {k}" for k, v in {"training": splits.train, **splits.scored()}.items())
    labels = (
        f"; labels {', '.join(splits.labels[:8])}{', ...' if len(splits.labels) > 8 else ''}" if splits.labels else ""
    )
    report(f"{sizes} rows{labels}")
    for name, encoded in {"training": bench.train, **bench.scored}.items():
        if encoded.num_cut:
            report(f"{encoded.num_cut:,} {name} rows have more than {bench.max_tokens} tokens and are cut")
    report(f"{len(protocol.lr)} rates x {len(protocol.seeds)} seeds, {protocol.epochs:g} epochs each")


def _is_best(outcome: dict[str, Any], before: Sequence[dict[str, Any]], metric: str) -> bool:
    score = outcome["scores"]["validation"][metric]
    return all(better(metric, score, run["scores"]["validation"][metric]) for run in before)


def _save(model: Any, tokenizer: Any, out: Path) -> None:
    partial = out / f".tmp-{MODEL}"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(out / MODEL, ignore_errors=True)
    partial.rename(out / MODEL)


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _cell(spread: dict[str, float]) -> str:
    if spread["min"] == spread["max"]:
        return f"{spread['median']:.4f}"
    return f"{spread['median']:.4f} ({spread['min']:.4f}-{spread['max']:.4f})"
