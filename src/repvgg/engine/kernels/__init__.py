"""A file a kernel: the IR that computes one kind of layer, and the layout of the weights that it reads."""
