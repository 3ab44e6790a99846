# Copyright (c) mmbasis authors. All rights reserved.
"""Measures FPS, latency, power and energy of networks on a Jetson board.

The package needs Python 3.6, the standard library and numpy; nothing of
OpenMMLab and no torch. ``tools/jetson_bench.py`` is its command line; the
parts can be used as a library:

- ``backends``: the engines that run a model (TensorRT, trtexec, ONNX Runtime,
  PyTorch);
- ``timing``: warm-up and timed windows; ``stats``: quantiles and intervals;
- ``sources``, ``sampler``, ``energy``: power sensors, the process that reads
  them, energy of a window;
- ``device``, ``settings``: the state of the board and its temporary changes;
- ``onnx_file``: the precision of a file; ``extras``: whether outputs agree,
  what lies around the engine;
- ``protocol``: a whole comparison; ``layers``: latency tables;
- ``report``, ``plot``: tables, CSV, JSON and the picture.
"""
