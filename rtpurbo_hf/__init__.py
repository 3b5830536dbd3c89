"""rtpurbo_hf: turn a full-attention Hugging Face LLM into a sparse one (the RTPurbo method, arXiv 2605.16928)."""

from importlib import import_module
from os.path import abspath, dirname, isfile, join

# In a plain checkout, modeling/, kernels/ and training/ lie beside this folder; installed, they lie in it.
_root = dirname(dirname(abspath(__file__)))
if isfile(join(_root, "modeling", "modeling_rtpurbo.py")):
    __path__.append(_root)

__version__ = "0.1.0"

_PUBLIC = {
    "RTPurboConfig": "auto",
    "RTPurboForCausalLM": "auto",
    "RTPurboCache": "modeling.cache_rtpurbo",
    "load_base": "sources",
    "adapt": "adaptation",
    "calibrate": "training.calibration",
    "Calibration": "training.calibration",
    "initialise_indexers": "training.indexer_init",
    "IndexerTrainer": "training.indexer_trainer",
    "IndexerTrainingArguments": "training.indexer_arguments",
    "SelfDistillationTrainer": "training.distillation",
    "SelfDistillationArguments": "training.distillation_arguments",
    "compare_modes": "evaluation.fidelity",
    "checkpoint_info": "info",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
