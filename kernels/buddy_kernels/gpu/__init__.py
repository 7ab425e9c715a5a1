"""The kernels of a decode step on a GPU, in Triton: one row is one sequence's next token.

Every buffer keeps a row in its place, whatever the row's path. Which rows a kernel works on is a list on the device
(`row_lists.RowList`), so that a launch is the same for every path and a CUDA graph holds for all of them: programs past
the end of the list leave at once, and a layer that no row runs reads no weights. A launch changes what routing and the
cache remember: one that is not a step, such as a warm-up before a capture, must have a live count of 0.
"""
