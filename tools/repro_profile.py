"""Run the whole pipeline in another profile, in a copy of this checkout, which stays as it was.

usage: python tools/repro_profile.py PROFILE

The copy lies in scratch/profiles/PROFILE and is kept, so a second run is fast. It holds the tracked files and those that git
does not ignore, `params.yaml` with `active: [PROFILE]`, and its own DVC cache.
"""

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


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    profile = sys.argv[1]
    sys.path.insert(0, str(ROOT))
    from vlarepro.core.params import nearest, profile_params

    try:
        profile_params(profile)
    except KeyError as e:
        print(f"error: {e.args[0]}", file=sys.stderr)
        return 2
    copy = ROOT / "scratch" / "profiles" / profile
    sync(copy)
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    keys = ("active", "worlds", "spanvla_in", "specdec_in", "lastvla_in")
    for key in keys:
        text, n = re.subn(rf"^{key}: \[.*\]", f"{key}: [{profile}]", text, flags=re.M)
        if n != 1:
            print(f"error: params.yaml has no line `{key}: [...]` ({nearest(key, keys)})", file=sys.stderr)
            return 2
    (copy / "params.yaml").write_text(text, encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(copy), "DVC_NO_ANALYTICS": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["dvc", "repro"], cwd=copy, env=env)
    if done.returncode:
        return done.returncode
    return subprocess.run([sys.executable, "-m", "vlarepro.report.cli", "report", "--summary"], cwd=copy, env=env).returncode


if __name__ == "__main__":
    sys.exit(main())
