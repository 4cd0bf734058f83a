"""
verl_platform.py - a CPU for verl 0.9.1, which knows GPUs and NPUs only: a platform through its
plugin door (VERL_PLATFORM=cpu, and this file in VERL_USE_EXTERNAL_MODULES). bridges/check.py uses
it. It is for tests: slow, one process a model.
"""

import contextlib
import types

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry

MEMORY = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")


class Device(types.ModuleType):
    """torch.cpu, and answers to what verl asks of torch.cuda only."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if hasattr(torch.cpu, name):
            return getattr(torch.cpu, name)
        if name in MEMORY:
            return lambda *args, **kwargs: 0
        if name == "mem_get_info":
            return lambda *args: (8 << 30, 16 << 30)               # free, total
        if name == "get_device_name":
            return lambda *args: "CPU"
        return lambda *args, **kwargs: None


@PlatformRegistry.register(platform="cpu")
class CPU(PlatformBase):
    device_name = "cpu"
    vendor_name = "generic"
    device_module = Device("cpu")

    def is_available(self):
        return True

    def is_platform_available(self, use_smi_check=False):
        return True

    def current_device(self):
        return "cpu"

    def device_count(self):
        return 1

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    def manual_seed_all(self, seed):
        torch.manual_seed(seed)

    def communication_backend_name(self):
        return "gloo"

    def get_device_capability(self, device=0):
        return None, None

    # Ray is told of one GPU that is not there, so that verl finds a place for its workers.
    def visible_devices_envvar(self):
        return "CUDA_VISIBLE_DEVICES"

    def ray_resource_name(self):
        return "GPU"

    def ray_resource_options(self, number):
        return {"num_gpus": number}

    def ray_noset_envvars(self):
        return []

    def is_ipc_supported(self):
        return False                                    # weights go through shared memory

    # What a CPU need not do.
    def set_device(self, device):
        pass

    def synchronize(self, device=None):
        pass

    def set_allocator_settings(self, settings):
        pass

    def empty_cache(self):
        pass

    def nvtx_range(self, message):
        return contextlib.nullcontext()

    def profiler_start(self):
        pass

    def profiler_stop(self):
        pass

    def cudart(self):
        return None


# verl asks for "cpu:gloo,<device>:<backend>", and torch refuses the CPU twice.
init_process_group = torch.distributed.init_process_group


def init_with_one_cpu(backend=None, *args, **kwargs):
    if backend == "cpu:gloo,cpu:gloo":
        backend = "gloo"
    return init_process_group(backend, *args, **kwargs)


torch.distributed.init_process_group = init_with_one_cpu
