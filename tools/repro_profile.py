"""Run the whole pipeline in another profile, in a copy of this checkout, which stays as it was.

usage: python tools/repro_profile.py PROFILE [--override FILE] [STAGE ...]

The copy lies in scratch/profiles/PROFILE and is kept, so a second run is fast. It holds the tracked files and those that git
does not ignore, `params.yaml` with `active: [PROFILE]`, and its own DVC cache. With STAGE names only these stages (and what they
need) run.

FILE changes settings of the profile in the copy, for a trial with smaller models or fewer steps. It is a mapping with the keys
  params       what changes in params.yaml
  <name>       what changes in this profile's block of configs/<name>.yaml; `take: OTHER` starts from profile OTHER's block
  miniature    {world: W, at: FOLDER}: first make world W and lay it out at FOLDER as real data lie (tools/paper_miniature.py)
Keys that neither block knows are refused. configs/miniature.yaml tries the paper profile this way without any real data.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def sync(copy: Path) -> None:
    "Make the copy's source files equal to the checkout's; outputs and the DVC cache of the copy stay."
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True)
    files = {f for f in listed.stdout.decode().split("\0") if f and (ROOT / f).is_file() and not f.startswith("results/")}
    copy.mkdir(parents=True, exist_ok=True)
    if not (copy / ".git").exists():
        subprocess.run(["git", "init", "-q"], cwd=copy, check=True)
    own = {"params.yaml", "dvc.lock", "data.dvc"}  # the copy's pipeline state
    kept = copy / ".synced"
    for gone in set(kept.read_text().split("\n") if kept.exists() else []) - files - own:
        (copy / gone).unlink(missing_ok=True)
    for f in files:
        src, dst = ROOT / f, copy / f
        if f in own - {"params.yaml"} and dst.exists():
            continue
        if f != "params.yaml" and dst.exists() and dst.read_bytes() == src.read_bytes():
            continue
        dst.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(src, dst)
    kept.write_text("\n".join(sorted(files)))


def merged(base, change, known=None, at=""):
    "A mapping with some values changed; a key that neither `base` nor `known` has is refused."
    if not isinstance(change, dict) or not isinstance(base, dict):
        return change
    known = known if isinstance(known, dict) else {}
    out = dict(base)
    for k, v in change.items():
        if k not in base and k not in known:
            raise KeyError(f"{at}{k} is no setting: {', '.join(map(str, base))}")
        out[k] = merged(base.get(k, known.get(k)), v, known.get(k), f"{at}{k}.")
    return out


def override(copy: Path, profile: str, change: dict) -> None:
    "Change params.yaml and configs/*.yaml of the copy."
    import yaml
    plain = lambda d: yaml.dump(d, sort_keys=False, width=160, default_flow_style=None, Dumper=_Plain)
    class _Plain(yaml.SafeDumper):
        def ignore_aliases(self, data): return True
    for name, wanted in change.items():
        if name == "miniature":
            continue
        path = copy / ("params.yaml" if name == "params" else f"configs/{name}.yaml")
        if not path.is_file():
            raise KeyError(f"{name}: there is no {path.name}")
        d = yaml.safe_load(path.read_text(encoding="utf-8"))
        if name == "params":
            d = merged(d, wanted)
        else:
            wanted, own = dict(wanted), d.get(profile, {})
            base = d[wanted.pop("take")] if "take" in wanted else own
            d[profile] = merged(base, wanted, own, f"{name}.")
        path.write_text(plain(d), encoding="utf-8")


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("profile")
    p.add_argument("--override", type=Path, help="a file of settings, see above")
    p.add_argument("stages", nargs="*", help="only these stages and what they need")
    a = p.parse_intermixed_args()
    profile = a.profile
    sys.path.insert(0, str(ROOT))
    import yaml

    from vlarepro.core.params import nearest, profile_params

    try:
        profile_params(profile)
        change = yaml.safe_load(a.override.read_text(encoding="utf-8")) if a.override else {}
    except (KeyError, OSError) as e:
        print(f"error: {e.args[0] if isinstance(e, KeyError) else e}", file=sys.stderr)
        return 2
    copy = ROOT / "scratch" / "profiles" / profile
    sync(copy)
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    keys = ("active", "worlds", "minidrive_in", "spanvla_in", "specdec_in", "lastvla_in")
    for key in keys:
        text, n = re.subn(rf"^{key}: \[.*\]", f"{key}: [{profile}]", text, flags=re.M)
        if n != 1:
            print(f"error: params.yaml has no line `{key}: [...]` ({nearest(key, keys)})", file=sys.stderr)
            return 2
    (copy / "params.yaml").write_text(text, encoding="utf-8")
    for f in (ROOT / "configs").glob("*.yaml"):
        shutil.copy2(f, copy / "configs" / f.name)
    try:
        override(copy, profile, change)
    except KeyError as e:
        print(f"error: {a.override}: {e.args[0]}", file=sys.stderr)
        return 2
    env = {**os.environ, "PYTHONPATH": str(copy), "DVC_NO_ANALYTICS": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    if (m := change.get("miniature")) and not (copy / m["at"]).exists():
        for cmd in (["dvc", "repro", "data.dvc"], [sys.executable, str(copy / "tools" / "paper_miniature.py"), f"data/{m['world']}", m["at"]]):
            if rc := subprocess.run(cmd, cwd=copy, env=env).returncode:
                return rc
    done = subprocess.run(["dvc", "repro", *a.stages], cwd=copy, env=env)
    if done.returncode or a.stages:
        return done.returncode
    return subprocess.run([sys.executable, "-m", "vlarepro.report.cli", "report", "--summary"], cwd=copy, env=env).returncode


if __name__ == "__main__":
    sys.exit(main())
