"""The engine with its rank on a real GPU, with mmlane and without it.

    python -m bench.gpu_engine [--modes off lane] [--model DIR] [--out DIR]

It runs in a checkout, with the Python of an environment that has torch for CUDA, sglang 0.5.16 and this plugin
(`pip install .`). Where one of these or the GPU is missing, it says so and ends. `--again` makes the table from
results that are there; that works anywhere.

**What is real:** the GPU; the engine's HTTP server, tokenizer and scheduler (TP 1, `--mm-feature-transport
cpu`); JPEG images over HTTP, all different; preprocessing, which is done on the GPU by the engine's default; the
way of the features to the GPU.

**What is not:** the model. Its weights are the devkit's, tiny and random, and it runs by the engine's
pure-torch paths, so that no compiled kernels are needed (sgl-kernel, flashinfer). Figures compare transports;
they say nothing about the speed of a model. Two files in `inside/`, which goes on PYTHONPATH, send the engine
to these paths. The installed engine is not changed.

- `mmlane_bench_gpu.py`: an out-of-tree platform, the engine's own extension point. It is the devkit's platform
  for CPUs, with the GPU as its device.
- `sitecustomize.py`: the engine's `is_cuda()` answers False. Many of its modules call this when they are
  imported, and import compiled kernels where the answer is True. mmlane does not call it, and goes by
  `--device cuda`.

Each mode has a server of its own, one after the other; `off` is the installed plugin with `MMLANE=off`. Each
kind of request has two rounds that do not count and six that do. A figure is the time until all requests of a
round are answered. Then the lane's own numbers are read, once no ticket is out, and what is new in /dev/shm is
listed when all processes of the server have ended; as root, each server has one of its own.
"""
