"""Write docs/environments.md from the table in auto_round/envs.py. `--check` only tells whether it is up to date."""

from __future__ import annotations

import sys
from pathlib import Path

from auto_round.envs import VARIABLES

TARGET = Path(__file__).resolve().parent.parent / "docs" / "environments.md"

HEAD = """# Environment variables

Made from `auto_round/envs.py` by `tools/make_env_docs.py`; edit the table there. `auto-round list env` prints the same
with the values now in force. An empty value counts as unset, and a wrong one is an error that says what is allowed.

| variable | values | default | meaning |
|---|---|---|---|
"""

TAIL = """
From Python:

```python
from auto_round import envs

envs.AR_LOG_LEVEL                      # the typed value, read now
envs.is_set("AR_WORK_SPACE")           # False when it is unset or empty
envs.set_config(AR_LOG_LEVEL="DEBUG")  # for this process and its children; None unsets
```

Other variables that begin with `AR_` mean nothing here; the command line warns about those that are set.
"""


def render() -> str:
    rows = []
    for v in VARIABLES:
        default = "unset" if v.default is None else f"`{int(v.default) if isinstance(v.default, bool) else v.default}`"
        rows.append(f"| `{v.name}` | {v.allowed()} | {default} | {v.doc} |")
    return HEAD + "\n".join(rows) + "\n" + TAIL


def main() -> int:
    text = render()
    if "--check" in sys.argv[1:]:
        same = TARGET.exists() and TARGET.read_text(encoding="utf-8") == text
        print("up to date" if same else f"{TARGET.name} is stale; run tools/make_env_docs.py")
        return 0 if same else 1
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
