"""How predictable the traces of minidrive are: a table of word sequences against a learned draft, and words with and without sight.

    OMP_NUM_THREADS=1 python benchmarks/corpus.py        # about a minute on one core; writes benchmarks/results/corpus.json

Simulates scenes, trains two small language models on their traces (one reads the scene's facts and the history, one the history alone) and replays
speculative decoding of what the first one writes. The table must stay at least 1.5 tokens below the draft, or the corpus is of no use for comparing drafts.
"""
# ruff: noqa: E402

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
from pathlib import Path

import torch

from vlarepro.core.deps import code_only, library_files
from vlarepro.core.paths import write_json
from vlarepro.core.provenance import provenance
from vlarepro.world.corpus import measure, wording_hash


def main():
    import hashlib

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    files = [f for f in library_files("from vlarepro.world.scenarios import make_scene")]
    world = hashlib.sha256("\n".join(code_only(f.read_text(encoding="utf-8")) for f in files).encode()).hexdigest()[:12]
    result = dict(measure(), code=wording_hash(), world=world, provenance=provenance("corpus", [0], code=wording_hash()))
    write_json(Path(__file__).resolve().parent / "results" / "corpus.json", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
