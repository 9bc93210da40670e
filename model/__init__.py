"""The paper: "Attention Is All You Need" (Vaswani et al. 2017), with torch and the standard library alone."""
