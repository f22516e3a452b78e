"""What the engine's transport of features costs in the engine itself, with mmlane in each mode and without it.

    python -m bench.engine [--quick] [--releases 0.5.12.post1 ...] [--modes off backport lane]

The real engine on this machine's CPU (devkit), TP 2, one server at a time. `off`: the plugin is not installed;
any other mode: installed, with `MMLANE=<mode>`. Each release has a server per mode and round, in the order of the
modes and then backwards, so that a drift of the machine affects all modes equally; `--quick` does one round.
Figures are medians over what all rounds measured, and ratios are to `off` of the same release in the same run.

**Requests** go to /generate over HTTP, max_new_tokens 4, from as many threads as there are to be requests in
flight. A few that do not count go first. Images are 640x480, a few that come again and again: the engine's caches
then answer for the vision tower, and what remains is the way there. With `--no-caches` the radix cache and the
cache of embeddings are off, and the vision tower, which on a CPU takes most of the time, runs for each request.

Embeddings are what the engine's offline API calls a processor's output with precomputed embeddings; they pass by
the vision tower. JSON has no tensors, so the probe makes one in the tokenizer's process, a new one for each
request, and hands it to `TokenizerManager.generate_request`, as `sglang.Engine` does. The prompt has one image
token, so the model looks at the first row; the others are there to be transported.

**Inside** the engine a probe (`probe/sitecustomize.py`, on PYTHONPATH, the same in every mode) surrounds what
there is when a tokenizer or a scheduler is made, the plugin's replacements included, and notes for each call:

    blocked     in `TokenizerManager._send_one_request`, all n samples together: the event loop does nothing
                else. Where it is a coroutine, its steps without what it waits for
    wrapping    of that, in `wrap_shm_features`
    rank 0, 1   in `recv_requests` of a rank, calls that returned features only. It includes waiting for the peer
    ... CPU     of that, CPU time of the calling thread
    puts        into the lane, of the time blocked; of these, committing memory, and copying. What copying takes
                beyond its CPU time, it waits for the GIL or for a core
    inline      bytes of tensors that are still tensors after wrapping, and are pickled into the message
    faults      minor page faults of the calling thread in these calls
    process faults    of the whole process, per request, with what the model does

At one request in flight calls belong to the request in whose time they fall, and are added up; figures are medians
over requests. At more they are the sum of all calls over the number of requests.

Page faults stand for bytes touched for the first time, 4 KiB each: a segment that is made, filled and given back
for each request costs one per page and process. They are not exact: the kernel maps up to 16 shared pages at one
read fault, reused memory has none, and huge pages have fewer.

**Memory** is looked at every 25 ms: `shared`, what is in the server's /dev/shm and in its processes' memfds, and
`all`, that and anonymous memory (RssAnon) of all its processes; the peak above what there was when the server was
ready, over the number of requests in flight. A server runs its cases in one order, the same in every mode,
and memory that it keeps shows in later cases too.

**A server that dies** is started again for the next case; the workload that ended it is not tried again.
"""
