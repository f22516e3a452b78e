"""What it costs to hand a CPU tensor from one process to several others: `mmlane bench`, on the user's machine.

Every way has a producing process and reading processes of its own, all at the same time; they take turns in rounds
(`comparing`). The ways with an engine call the installed engine's own functions: its `wrap_shm_features`, its
coding of a request, its `recv_requests` over gloo groups (`via_engine`); with mmlane in it they call the same ones
(`via_plugin`). The lane on its own needs no engine (`via_lane`).

**Cost** of a message = from before it is put until every reader has summed its tensors once, less a second, warm
sum by the same reader, plus what freeing takes on either side. To a GPU: until its bytes are there, in every
reader. `n` puts of the same tensors are the samples of one request. The source's values are other ones in every
round, random words; every sum of every round is compared with the source's, and in rounds that do not count
sampled pages as well. Clocks are CLOCK_MONOTONIC, copies and sums use one thread, and there is no garbage
collection.

**memcpy**, the limit, is torch's `copy_` between two buffers of the producer, both in memory already, once for all
`n`; each way measures it in each of its turns.

`bench/transport` of the source repository measures more ways, sizes and figures with the same modules. Of these,
those of a way and of its processes need torch, and no others.
"""
