"""What the tests of the lane are made with: one kind of process, one kind of wait, and ways to look at a lane.

| module | what |
| --- | --- |
| `waiting` | waiting for what has to happen; threads beside a test |
| `child` | a function in a process of its own, and all that can be done to a process |
| `peers` | children that are producers or readers, and do what they are told |
| `breakpoints` | threads held up, processes stopped or killed, at the lane's named points |
| `lane_with_readers` | a lane and its readers in the process of the test |
| `payloads` | tensors that tell where they are from |
| `programs` | Python programs, as text |
| `confinement` | other users, limits, control groups, mounts, filtered system calls |
| `sockets` | bare connections and listeners, which say anything |
| `kernel` | what the kernel knows of lanes and processes |
| `libc` | calls that Python has no name for |
| `fake_cuda` | a stand-in for a GPU |
"""
