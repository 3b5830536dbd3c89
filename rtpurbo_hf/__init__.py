"""rtpurbo_hf: turn a full-attention Hugging Face LLM into a sparse one (the RTPurbo method)."""

from os.path import abspath, dirname, isfile, join

# In a plain checkout, modeling/, kernels/ and training/ lie beside this folder; installed, they lie in it.
_root = dirname(dirname(abspath(__file__)))
if isfile(join(_root, "modeling", "modeling_rtpurbo.py")):
    __path__.append(_root)
