"""Drop the outputs of the run-notebooks: they are source, and the runner refuses stored outputs."""

import json
from pathlib import Path

for path in sorted(Path(__file__).resolve().parent.parent.glob("nbs/runs/*.ipynb")):
    text = path.read_text(encoding="utf-8")
    nb = json.loads(text)
    for cell in nb["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    new = json.dumps(nb, indent=1, ensure_ascii=False) + "\n"
    if new != text:
        path.write_text(new, encoding="utf-8")
        print(f"cleared {path.name}")
