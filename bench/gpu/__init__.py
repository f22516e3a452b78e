"""What it costs to bring a CPU tensor from one process to the GPU of another, and what a pinned lane is worth.

    python -m bench.gpu [--quick] [--out DIR] [--devices 0,1] [--only MEASURE ...]

torch alone, no engine; any machine with one NVIDIA GPU or more, best with nothing else running on it. Every
measure has processes of its own, spawned for it, and its ways take turns in every round, forwards and backwards;
the first rounds do not count. Figures are medians, least and most in parentheses; ratios are those of medians.
Time is CLOCK_MONOTONIC, from before the first copy is queued (`non_blocking=True`) until `torch.cuda.synchronize`
returns: the driver stages copies from pageable memory and mostly blocks while it does so, and CUDA events would
leave out what the host does. What arrived is summed on the device, and compared. GB are 10^9 bytes, MiB are 2^20.

**Ways** to have the bytes:

- `torch pinned`, `pageable`, `shared`: the consumer's own memory: `pin_memory=True` (cudaHostAlloc), anonymous,
  and a memfd mapped MAP_SHARED;
- `engine segment`: a segment in /dev/shm for each tensor, mapped copy-on-write by the consumer, as the engine does
  from 0.5.21 on (managers/mm_utils.py, `ShmPointerMMData`);
- `lane pageable`, `lane pinned`: this project's, taken as `view`, without a pinned zone or all in one;
- `cuda ipc pool`: the producer copies into a pool on its GPU and sends the pool's handle and offsets; the consumer
  copies out of it, having opened it from its own GPU: the handle's device is replaced (0.5.23, multimodal/
  transport/cuda_ipc.py, `_reconstruct_from_ipc_extra`). `..., not redirected` opens the handle as it comes
  (0.5.10.post1, utils/cuda_ipc_transport_utils.py). The pool has the engine's default size, 1 GiB
  (SGLANG_MM_FEATURE_CACHE_MB in 0.5.23). The producer synchronizes before it sends; the engine's newer releases
  order by stream instead, which saves next to nothing where the source is pageable.

**Measures:**

- `contexts`: what a consumer adds to the GPU memory in use (cudaMemGetInfo in another process, whose contexts were
  there before), less what its own allocator reserved. That is its context on its own GPU, and the needless one on
  the producer's that comes of opening a handle as it comes. To tell them apart takes two GPUs.
- `h2d`: GB/s of the first copy of a tensor just taken, and of further copies of the same (`again`). What came
  through a lane or a segment was just written by another process, perhaps on another NUMA node; a consumer's own
  memory was not.
- `concurrent`: GB/s of all processes together, from the first start to the last end, all reading the same tensor
  (`torch pinned`: each its own), on the devices round robin.
- `registration`: seconds per GiB of cudaHostRegister, as the lane calls it, and cudaHostUnregister, of a shared
  mapping. `fresh`: nothing of the file is in memory; `populated`: all of it, page tables included. The
  peer is a copy of as many pageable bytes to the device.
- `first byte`: from before the producer's first put until all is on the consumer's device, for 32 images of
  1280x720 as Qwen2-VL's patches. `smart_resize` (transformers, image_processing_qwen2_vl.py) makes them 1288x728,
  multiples of 28: 92 x 52 patches of 3 channels * 2 frames * 14 * 14 in float32, so 32 tensors of (4784, 1176),
  687 MiB. All ways send their messages through the benchmark's pipes: some tenths of a millisecond, and as much
  for each image where they go `image by image`: then one is copied to the device while the next is put. The engine
  sends one message for all images of a request. `put`: the producer's part. `GPU MiB`: contexts and pool of both
  processes, without the features themselves.

`--rehearse` goes through all of it with small CPU tensors in place of the device's: rehearsal, not a measurement.
"""
