"""What is there for a CPU's sake: the matrix product, attention and dropout. Equal to torch's own, but faster."""
