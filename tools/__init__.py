"""Tools for developers: a cost model, a cluster of three hosts on one machine, benchmarks, a mutation check."""
