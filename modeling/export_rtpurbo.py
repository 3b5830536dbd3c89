"""Write the code that travels with a checkpoint: a flat folder of files that transformers loads as remote code.

Remote code may import only from its own folder, so imports between our folders are rewritten to that form. The set of
files is what `modeling_rtpurbo.py` reaches. Works from the checkout, from an installed package, and from the module
cache of transformers, where the files are flat already.
"""

from __future__ import annotations

import re
from pathlib import Path

AUTO_MAP = {
    "AutoConfig": "configuration_rtpurbo.RTPurboConfig",
    "AutoModelForCausalLM": "modeling_rtpurbo.RTPurboForCausalLM",
}
_ENTRIES = ("configuration_rtpurbo", "modeling_rtpurbo")
_IMPORT = re.compile(r"^[ \t]*from (?:\.|\.\.kernels\.)(\w+) import", re.M)
_PARENT = re.compile(r"^([ \t]*)from \.\.kernels\.(\w+) import", re.M)
_NESTED = re.compile(r"^\s*(?:from\s+\.\.|from\s+\.\w+\.\w+|from\s+\.\s+import)", re.M)


def _source(name: str) -> Path:
    here = Path(__file__).resolve().parent
    for folder in (here, here.parent / "kernels"):
        path = folder / f"{name}.py"
        if path.is_file():
            return path
    raise FileNotFoundError(f"{name}.py is part of the model's code and is missing beside {here}")


def code_files() -> dict[str, str]:
    """The flat code: `{file name: text}`.

    Raises:
        FileNotFoundError: a file that the code imports is missing.
        RuntimeError: a file imports in a form that does not survive flattening.
    """
    files: dict[str, str] = {}
    queue = list(_ENTRIES)
    while queue:
        name = queue.pop()
        if f"{name}.py" in files:
            continue
        text = _source(name).read_text(encoding="utf-8")
        queue.extend(_IMPORT.findall(text))
        text = _PARENT.sub(r"\1from .\2 import", text)
        if _NESTED.search(text):
            raise RuntimeError(f"{name}.py: a relative import that cannot be flattened")
        files[f"{name}.py"] = text
    return dict(sorted(files.items()))


def export_code(folder: str | Path) -> list[str]:
    """Write the flat code into `folder` and return the file names."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    files = code_files()
    for name, text in files.items():
        (target / name).write_text(text, encoding="utf-8")
    return list(files)
