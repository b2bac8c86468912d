"""Bring the language sets that were published for nuScenes into the layout that vlarepro reads.

usage: python tools/nuscenes_texts.py ROOT [--qa FILE ...] [--captions FILE ...] [--explanations FILE ...] [--spatial FILE ...] [--text-key KEY]

ROOT is the folder of nuScenes; ROOT/language/ gets
  qa.json             NuScenes-QA as it is published (NuScenes_train_questions.json, NuScenes_val_questions.json), all files joined
  captions.json       nu-Caption: sample token -> text
  explanations.json   Nu-X: sample token -> {"text": ...}
  spatial.json        questions with sample_token, question, answer and options, as SURDS has them after its own preparation
A file of texts is a mapping from sample tokens, or a list of records with a sample token (`sample_token` or `token`) and a text under
KEY (default: the first of text, caption, explanation, answer). Of several texts for a sample the first is kept, and how many were left
out is said. Tokens that the tables do not know are refused.
"""

import argparse
import json
import sys
from pathlib import Path

TEXT_KEYS = ("text", "caption", "explanation", "answer")
QA_KEYS = ("sample_token", "question", "answer", "template_type", "num_hop")


def known_tokens(root: Path) -> set:
    "Sample tokens of every version below the root."
    out = set()
    for path in sorted(root.glob("v1.0-*/sample.json")): out |= {r["token"] for r in json.loads(path.read_text(encoding="utf-8"))}
    if not out: raise FileNotFoundError(f"no v1.0-*/sample.json below {root}: give the folder of nuScenes")
    return out


def texts(path: Path, key: "str | None") -> list:
    "(token, text) of a file."
    d = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(d, dict) and not isinstance(next(iter(d.values()), ""), (dict, str)): d = next(v for v in d.values() if isinstance(v, list))
    rows = d.items() if isinstance(d, dict) else ((r.get("sample_token", r.get("token")), r) for r in d)
    out = []
    for i, (token, r) in enumerate(rows):
        if isinstance(r, dict):
            name = key or next((k for k in TEXT_KEYS if k in r), None)
            if name is None or name not in r:
                raise KeyError(f"{path}, record {i} has no text under {key or ', '.join(TEXT_KEYS)}: it has {', '.join(r)}; give --text-key")
            r = r[name]
        if not isinstance(token, str) or not isinstance(r, str):
            raise ValueError(f"{path}, record {i}: expected a sample token and a text, got {token!r} and {type(r).__name__}")
        out.append((token, r))
    return out


def questions(paths: list, needs: tuple) -> list:
    "Records of question files."
    out = []
    for path in paths:
        d = json.loads(path.read_text(encoding="utf-8"))
        for i, q in enumerate(d["questions"] if isinstance(d, dict) else d):
            if gone := [k for k in needs if k not in q]: raise KeyError(f"{path}, question {i} lacks {', '.join(gone)}: it has {', '.join(q)}")
            out.append(q)
    return out


def write(root: Path, name: str, content, tokens: set) -> None:
    unknown = tokens - known_tokens(root)
    if unknown: raise ValueError(f"{name}: {len(unknown)} of {len(tokens)} sample tokens are in no table below {root}, first {min(unknown)}")
    path = root / "language" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content), encoding="utf-8")
    part.replace(path)
    print(f"{path}: {len(tokens)} samples")


def main(argv=None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("root", type=Path)
    for kind in ("qa", "captions", "explanations", "spatial"): p.add_argument(f"--{kind}", type=Path, nargs="+", default=[])
    p.add_argument("--text-key")
    a = p.parse_args(argv)
    try:
        for name, needs in (("qa", QA_KEYS), ("spatial", ("sample_token", "question", "answer", "options"))):
            if paths := getattr(a, name):
                rows = questions(paths, needs)
                write(a.root, name, {"questions": rows}, {q["sample_token"] for q in rows})
        for name in ("captions", "explanations"):
            if paths := getattr(a, name):
                rows = [r for path in paths for r in texts(path, a.text_key)]
                first = {}
                for token, text in rows: first.setdefault(token, text)
                if len(rows) > len(first): print(f"{name}: {len(rows) - len(first)} further texts of samples that have one are left out", file=sys.stderr)
                write(a.root, name, {t: {"text": x} for t, x in first.items()} if name == "explanations" else first, set(first))
    except (OSError, KeyError, ValueError) as e:
        print(f"error: {e.args[0] if isinstance(e, KeyError) else e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
