"""A Python process without this package, which loads a saved model and generates: does the folder stand on its own?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import torch

from .auto import RTPurboForCausalLM

_GENERATED = 16
# Imports take most of its time (some 10 s of a core, more from a cold disk), so they come before the question.
_PROGRAM = """
import json, sys, torch, transformers, transformers.modeling_utils, transformers.generation.utils
transformers.utils.logging.disable_progress_bar()
load = transformers.AutoModelForCausalLM.from_pretrained
asked = sys.stdin.readline()
if asked:
    path, ids, new, device, dtype = json.loads(asked)
    model = load(path, trust_remote_code=True, dtype=getattr(torch, dtype)).to(device).eval()
    out = model.generate(torch.tensor([ids], device=device), max_new_tokens=new, do_sample=False)
    print("\\n" + json.dumps([type(model).__module__.split(".")[0], out[0, len(ids):].tolist()]))
"""


class CleanProcess:
    """Started ahead of its `check`, it imports what it needs while the caller is still busy. A context manager.

    It holds no GPU memory before `check`, and is gone after it or at the end of the context.
    """

    def __init__(self) -> None:
        variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        pipe = subprocess.PIPE
        # -P: the current folder is not searched, nor is the script's
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM], env=variables, stdin=pipe, stdout=pipe, stderr=pipe, text=True
        )

    def __enter__(self) -> CleanProcess:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()

    def check(self, saved: Path, model: RTPurboForCausalLM, ids: list[int]) -> None:
        """Let the process load `saved` and generate greedily what `model` generates; `model` goes to the CPU.

        Args:
            saved: folder of a checkpoint or adapter.
            model: what was saved there.
            ids: the prompt.

        Raises:
            RuntimeError: it does not load, loads our package's code, or generates other tokens.
        """
        device, dtype = str(model.device), str(model.dtype).removeprefix("torch.")
        prompt = torch.tensor([ids], device=device)
        expected = cast(Any, model).generate(prompt, max_new_tokens=_GENERATED, do_sample=False)[0, len(ids) :].tolist()
        cast(torch.nn.Module, model).to("cpu")  # two copies may not fit the device
        torch.cuda.empty_cache()
        question = json.dumps([str(saved.resolve()), ids, _GENERATED, device, dtype])
        answer, log = self._process.communicate(question + "\n")
        if self._process.returncode:
            raise RuntimeError(f"the saved model does not load in a clean process:\n{log[-2000:]}")
        module, tokens = json.loads(answer.strip().splitlines()[-1])
        if module != "transformers_modules" or tokens != expected:
            raise RuntimeError(f"the reloaded model ({module}) generates other tokens than the saved one")
