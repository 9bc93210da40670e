"""The ablations of Table 3: which rows, how they run, what they show."""
