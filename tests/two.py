"""python -m tests.two METHOD [flags]: the method's main in float64 (workers import this file, so they compute in float64 too)."""

import importlib
import sys

import common

import torch

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
module = importlib.import_module(sys.argv[1])
check, prepare = module.check, module.prepare


def main(cfg):
    return module.main(cfg)


if __name__ == "__main__":
    common.launch(main, common.cli(module.Config, module.PRESETS, module.__doc__, sys.argv[2:]), check, prepare)
