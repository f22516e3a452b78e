"""What it costs to hand a CPU tensor from one process to several others on the same machine.

    python -m bench.transport [--quick]

The ways, each with a producing process and reading processes of its own, all in one run, on the same payloads,
taking turns in every round of every case:

- `lane`, this project's, with tensors taken as `view`, `cow` and `clone`;
- `engine`, as the releases 0.5.9, 0.5.12.post1 and the newest do it: their own `wrap_shm_features`, their own
  coding of a request, their own `recv_requests`, over real gloo groups as wide as there are readers;
- `torch.multiprocessing` with the sharing strategy `file_system`;
- `iceoryx2`, publish-subscribe, one copy into a loaned sample, tensors over the received ones;
- `memcpy`, the limit: torch's `copy_` between two buffers of the producer, both in memory already, measured by
  each of the above in each of its turns.

**Cost** of a message = from before it is put until every reader has summed its tensors once, less a second, warm
sum by the same reader, plus what freeing takes on either side:

    max over readers (end of its first sum - before the first put - its second sum)
    + max over readers (dropping the tensors, and giving back)
    + the producer's freeing (dropping the source tensor; unlinking, closing, draining)

and its parts, which overlap in time and so do not add up to it:

    put_s               in the producer's put, all `n` together; the sending of tickets is not in it
    take_s              in the readers' take, from message to tensor, all `n` together; the slowest reader
    first_read_extra_s  the first sum less the second; the slowest reader
    free_reader_s, free_producer_s

`n` puts of the same tensors are the engine's fan-out over `n` samples: readers take all of them, then sum each.
`items` tensors share the bytes of a message evenly: a request with that many images.

Clocks are CLOCK_MONOTONIC, which all processes of a machine share. All copies and sums use `--threads` threads
(1); Python's garbage collector is off, in all of them. Tickets and pickled pointers go through one
`multiprocessing.Pipe` a reader, the same for every way, and no payload does. The source's memory is the
benchmark's and is not freed in any figure; its values are other ones in every round, random 64-bit integers.
Every sum of every round is compared with the source's, and in the first two rounds of a case, which do not count
otherwise, sampled pages as well. The first of these is `cold_s`: a way's transport is opened anew for each
case. A way that is slow gets fewer rounds, three at least.

**Memory** is looked at in these two rounds, while every reader holds its tensors; the larger figure counts: growth
of what is in /dev/shm and in memfds, and of the anonymous memory of the way's processes, since before the
transport was opened. So what it keeps in reserve is in it. The source is not, nor what is needed only in passing,
such as a segment that is gone by then. Where a way moves its source into shared memory (torch.multiprocessing),
the benchmark still holds the old one. As root, each way has a /dev/shm of its own; otherwise other programs that
use it during the measurement disturb the figure.

**One way** is latency, measured separately: from before the put until the one reader has the tensor. The next
message is put when that one has been freed, and is a tensor of its own. `pipe_s` is an empty message on the same
pipe, sent before each: what is left when a transport takes no time.

What the benchmark leaves out: requests. The engine's messages are requests with little else in them; the other
ways' are bare tickets. That is tens of microseconds, and shows at 64 KiB only.
"""
