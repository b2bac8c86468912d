"""The lean decoder and the speculative loop against Hugging Face in the same process: launches and forwards (counts), and ratios of times.

    python benchmarks/decoding.py                 # a small shape, CPU or GPU; writes benchmarks/results/decoding.json
    python -m vlarepro.evaluation.specdec_latency gpu OUT.json   # the true size, on a GPU

Counts are exact; times are interleaved and their ratio is taken within this run. On a CPU a verify pass costs more than a decode step
(compute-bound), so the speed-ups here understate a GPU's.
"""

import time
from pathlib import Path

import numpy as np
import torch

from vlarepro.core.paths import write_json
from vlarepro.core.provenance import device_name
from vlarepro.core.seeds import set_threads
from vlarepro.decoding.decoder import Launches, LeanDecoder
from vlarepro.decoding.speculate import NGram, Oracle, decode
from vlarepro.models.vlm import build_vlm

PROMPT, NEW, BLOCK, REPEATS = 256, 48, 8, 3
SIZE = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2)


def clock(run):
    start = time.perf_counter()
    out = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return out, time.perf_counter() - start


@torch.no_grad()
def main():
    set_threads()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_vlm(SIZE, 1024, 0, device=device).eval()
    ids = torch.randint(0, 1024, (1, PROMPT), generator=torch.Generator().manual_seed(0)).to(device)
    decoder, prompt = LeanDecoder(model, PROMPT + NEW + 32), dict(tokens=ids)
    plain = decode(decoder, prompt, NEW)
    options = dict(max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    arms = {
        "hf_generate": lambda: model.generate(ids, **options)[0, PROMPT:].tolist(),
        "hf_prompt_lookup": lambda: model.generate(ids, **options, prompt_lookup_num_tokens=BLOCK)[0, PROMPT:].tolist(),
        "lean": lambda: decode(decoder, prompt, NEW),
        "lean_ngram": lambda: decode(decoder, prompt, NEW, draft=NGram(plain.tokens, 6, BLOCK)),
        "lean_told_4.6": lambda: decode(decoder, prompt, NEW, draft=Oracle(plain.tokens, [3, 4, 4, 3, 4], BLOCK)),
    }
    seconds, out = {k: [] for k in arms}, {}
    for _ in range(REPEATS):                       # interleaved
        for k, run in arms.items():
            out[k], t = clock(run)
            seconds[k].append(t)
    launches = {}
    for k in ("hf_generate", "lean"):
        with Launches(fused_norm=k == "lean") as n:
            arms[k]()
        launches[k] = n.total
    texts = {k: v if isinstance(v, list) else v.tokens[0] for k, v in out.items()}
    best = {k: min(v) for k, v in seconds.items()}
    result = {
        "device": device_name(), "prompt": PROMPT, "new": NEW, "block": BLOCK, "weights": "random",
        "equal_to_generate": {k: t == texts["hf_generate"] for k, t in texts.items()},
        "launches_of_a_text": launches, "launch_ratio": launches["hf_generate"] / launches["lean"],
        "target_forwards": {k: v.target_forwards for k, v in out.items() if not isinstance(v, list)},
        "tau": {k: v.tau for k, v in out.items() if not isinstance(v, list)},
        "speedup_over_hf_generate": {k: best["hf_generate"] / v for k, v in best.items()},
        "median_over_min": {k: float(np.median(v) / min(v)) for k, v in seconds.items()},
    }
    write_json(Path(__file__).parent / "results" / "decoding.json", result)
    for k, v in result.items():
        print(f"{k}: {v}")


if __name__ == "__main__":
    main()
