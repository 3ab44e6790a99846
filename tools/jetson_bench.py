#!/usr/bin/env python3
# Copyright (c) mmbasis authors. All rights reserved.
"""FPS, latency, power and energy of networks on NVIDIA Jetson.

Copy this file and the folder ``jetson`` beside it to the board. Needs Python
3.6, numpy and the system's TensorRT; no package of OpenMMLab and no torch.
``python3 jetson_bench.py --help`` shows examples; docs/jetson.md explains.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from jetson.cli import main  # noqa: E402

if __name__ == '__main__':
    sys.exit(main())
