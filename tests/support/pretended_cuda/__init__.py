"""A GPU that isn't there: `pytest --pretend-cuda` runs tests on it, on a CPU build of torch.

A pretended tensor says `cuda:0` and keeps a CPU tensor inside, which computes. What a GPU would refuse raises: an
operation on tensors of two devices, `numpy()` of a device's tensor. What the host would have to wait for is counted, by
the line of the project that caused it. So it shows tensors in the wrong place and needless waiting; it can't show what
depends on memory, kernels or streams.

    plugin    the option, what it changes of the tests, the fixture with the counts
    guard     guard.cpp, compiled: without it autograd ends the process where it meets a CUDA tensor
    tensor    pretended tensors, and the dispatch mode that makes them
    rules     which operations may mix devices, and which wait for the device
    counts    operations and waits, by line
    runtime   what `torch.cuda` answers; threads
"""
