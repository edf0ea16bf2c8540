"""The whole way of a model, in ten to thirty minutes on a CPU: from text to a table of labelled results.

    python recipes/end_to_end/end_to_end.py causal        # or masked; from a clone, with lmssl[finetune] installed

Trains a tokenizer and a model on the documentation that every Python ships, evaluates it, exports it, pushes it to a
stand-in for the Hub on this machine, downloads it from there, and fine-tunes what was downloaded, and the same
architecture from random weights, to tell which package a docstring is from. Modules of the test rows are in no
training row, and no row names its package; the model has read all docstrings. Every command is printed as it is run.
benchmarks/bench_transfer.py measures what pretraining is worth with text that the model has not read.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))  # the stand-in is what lmssl's own tests push to

from hub_stand_in import HubStandIn  # noqa: E402
from lmssl.data.python_docs import library_folder, list_files, read_docs  # noqa: E402
from lmssl.data.records import Record  # noqa: E402

REPO = "tester/end-to-end"  # the stand-in knows this user
DOWNLOAD = """
import sys
from huggingface_hub import snapshot_download
from transformers import AutoConfig
assert "lmssl" not in sys.modules
print("downloaded", AutoConfig.from_pretrained(snapshot_download(sys.argv[1], local_dir=sys.argv[2])).architectures[0])
"""


def build(objective: str, tiny: bool) -> dict[str, Any]:
    """The tokenizer's build file."""
    return {
        "name": "end-to-end",
        "licence": "Documentation of CPython, PSF License Version 2",
        "kind": "bpe" if objective == "causal" else "wordpiece",
        "objective": objective,
        "vocab_size": 512 if tiny else 4096,
        "mixture": [{"name": "python", "kind": "python_docs"}],
        "sample_bytes": 200_000 if tiny else 1 << 30,
    }


def recipe(objective: str, tiny: bool, work: Path) -> dict[str, Any]:
    """The run: about a million parameters, 6 million tokens (causal) or 12 million (masked)."""
    width = 32 if tiny else 128
    batch = 1024 if tiny else 4096
    steps = 4 if tiny else 1500 if objective == "causal" else 3000
    family = {"kind": "llama" if objective == "causal" else "bert", "num_hidden_layers": 2 if tiny else 4}
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_attention_heads": 2 if tiny else 4}
    return {
        "name": "end-to-end",
        "out": str(work / "run"),
        "tokenizer": {"path": str(work / "tokenizer")},
        "data": {
            "sequence_length": 128,
            "mixture": [{"name": "python", "kind": "python_docs"}],
            "validation": {"ratio": 0.02, "tokens": 2000 if tiny else 20_000},
            "cache": str(work / "cache"),
            "workers": 0,
        },
        "objective": {"kind": objective},
        "model": {**family, **sizes},
        "optim": {"kind": "adamw", "lr": 3e-3},
        "schedule": {"kind": "wsd", "warmup_tokens": batch * (steps // 10), "decay_ratio": 0.3},
        "train": {"tokens": batch * steps, "batch_tokens": batch, "micro_batch_sequences": 8 if tiny else 32},
        "checkpoint": {"every_steps": None},
    }


def labelled(num_packages: int, num_rows: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Docstrings of the packages that have most of them; every third module of a package is for the test.

    A document begins with the name of what it describes, and so with that of its package: that line is left out, and
    so are texts that name the package later.
    """
    texts: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for path in list_files():
        parts = Path(path).relative_to(library_folder()).parts
        if len(parts) > 1 and parts[0] != "pydoc_data":
            bodies = (item.text.partition("\n")[2].strip() for item in read_docs(path) if isinstance(item, Record))
            texts[parts[0]]["/".join(parts)] += [
                body for body in bodies if len(body) > 60 and parts[0] not in body.lower()
            ]
    counts = Counter({name: sum(map(len, modules.values())) for name, modules in texts.items() if len(modules) > 8})
    sides: tuple[list[dict[str, str]], list[dict[str, str]]] = ([], [])
    draw = random.Random(1)
    for name, _ in counts.most_common(num_packages):
        found: tuple[list[str], list[str]] = ([], [])
        for number, module in enumerate(sorted(texts[name])):
            found[number % 3 == 2].extend(texts[name][module])
        for side, rows, count in zip(sides, found, (num_rows, num_rows // 2), strict=True):
            side += [
                {"text": text, "label": name} for text in draw.sample(sorted(set(rows)), min(count, len(set(rows))))
            ]
    return sides


def task(tiny: bool, work: Path) -> dict[str, Any]:
    """The task file of `lmssl finetune`."""
    return {
        "name": "packages",
        "task": {"kind": "classification"},
        "data": {"train": str(work / "train.jsonl"), "validation": str(work / "test.jsonl")},
        "protocol": {
            "epochs": 1 if tiny else 8,
            "batch_size": 16,
            "lr": [1e-3],
            "seeds": [1, 2] if tiny else [1, 2, 3],
        },
    }


def run(*command: str | Path, env: dict[str, str] | None = None) -> None:
    """Print a command and run it.

    Raises:
        SystemExit: it failed; its exit code is ours.
    """
    words = [str(word) for word in command]
    shown = ["lmssl", *words[3:]] if words[1:3] == ["-m", "lmssl"] else ["python", *words[1:]]
    print(f"\n$ {shlex.join(word if chr(10) not in word else '...' for word in shown)}", flush=True)
    done = subprocess.run(words, env=env, cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def main() -> None:
    """Every step in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("objective", choices=("causal", "masked"))
    parser.add_argument("--work", type=Path, help=r"default: runs/end-to-end-OBJECTIVE; it must not exist")
    parser.add_argument("--tiny", action="store_true", help="every step, shrunken: shows that they fit together")
    args = parser.parse_args()
    work: Path = (args.work or Path("runs") / f"end-to-end-{args.objective}").resolve()
    if work.exists():
        parser.error(f"{work} exists; remove it or give another --work")
    work.mkdir(parents=True)
    sections = {
        "build.yaml": build(args.objective, args.tiny),
        "recipe.yaml": recipe(args.objective, args.tiny, work),
        "task.yaml": task(args.tiny, work),
    }
    for name, section in sections.items():
        (work / name).write_text(json.dumps(section, indent=2), encoding="utf-8")
    lmssl = (sys.executable, "-m", "lmssl")
    run(*lmssl, "tokenizer", work / "build.yaml", "--out", work / "tokenizer")
    run(*lmssl, "train", work / "recipe.yaml")
    run(*lmssl, "eval", work / "run")
    run(*lmssl, "export", work / "run")
    with HubStandIn().running() as hub:
        online = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        online |= hub.environment(str(work / "hub"))
        run(*lmssl, "push", work / "run/export", "--repo", REPO, env=online)
        run(sys.executable, "-c", DOWNLOAD, REPO, work / "downloaded", env=online)
    train, test = labelled(2 if args.tiny else 6, 40 if args.tiny else 50)
    for name, rows in (("train.jsonl", train), ("test.jsonl", test)):
        (work / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    script, out = Path(__file__).parents[1] / "finetune/classify_with_trainer.py", work / "classifier"
    rows = (work / "train.jsonl", work / "test.jsonl", "--lr", "1e-3", "--epochs", "1" if args.tiny else "8")
    run(sys.executable, script, work / "downloaded", *rows, "--out", out)
    run(*lmssl, "finetune", work / "downloaded", work / "task.yaml", "--out", work / "pretrained")
    random_weights = ("--random-weights", "--out", work / "random")
    run(*lmssl, "finetune", work / "downloaded", work / "task.yaml", *random_weights)
    print(f"\n{len(train)} labels, {len(test)} test rows; accuracy, median of the seeds (lowest to highest)\n")
    for name in ("random", "pretrained"):
        results = json.loads((work / name / "results.json").read_text(encoding="utf-8"))
        found, majority = results["chosen"]["validation"]["accuracy"], results["baseline"]["validation"]["accuracy"]
        if name == "random":
            print(f"  majority            {majority:.3f}")
        print(f"  {name + ' weights':<18}  {found['median']:.3f}  ({found['min']:.3f} to {found['max']:.3f})")


if __name__ == "__main__":
    main()
